"""Checks of images with masks or boxes before they are trained on, and what identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import DatasetError
from ..utils.checksums import file_hash

if TYPE_CHECKING:
    from .dense import DenseDataset


def check_readable(dataset: DenseDataset, split: str) -> None:
    """Reads all images and labels of a split, if the dataset has it.

    Raises:
        ImageError, DatasetError: one cannot be read, or its label does not fit it.
    """
    if dataset.split_sizes.get(split):
        part = dataset.split(split)
        for row in range(len(part.examples)):
            part.load(row)


def check_dense_splits(dataset: DenseDataset) -> None:
    """Checks that there are images in train and val, and no patient in two splits.

    Raises:
        DatasetError: a split is missing, or patients are in several; up to five are listed.
    """
    if missing := [name for name in ("train", "val") if not dataset.split_sizes.get(name)]:
        raise DatasetError(
            f"{dataset.name} has no images in {' and '.join(missing)}; it has {dataset.split_sizes}. Provide splits "
            "train and val, or data without splits, which are then divided"
        )
    held: dict[str, set[str]] = {}
    for example in dataset.examples:
        if example.patient and example.split:
            held.setdefault(example.patient, set()).add(example.split)
    several = [f"{name} ({', '.join(sorted(splits))})" for name, splits in sorted(held.items()) if len(splits) > 1]
    if several:
        raise DatasetError(
            f"{dataset.name}: {len(several)} patients have images in more than one split: {'; '.join(several[:5])}. "
            "Results on such a test set are too optimistic; divide it by patient"
        )


def check_copies(dataset: DenseDataset, table: dict[str, str]) -> None:
    """Checks that no image file is in two splits.

    Args:
        table: of `data_table`.

    Raises:
        DatasetError: some are; up to five are listed.
    """
    first: dict[str, Any] = {}
    copies = []
    for example in dataset.examples:
        other = first.setdefault(table[str(example.image)].partition(":")[0], example)
        if other.split != example.split:
            copies.append(f"{other.image.name} ({other.split}) = {example.image.name} ({example.split})")
    if copies:
        raise DatasetError(
            f"{dataset.name}: {len(copies)} images are in more than one split: {'; '.join(copies[:5])}. Remove them "
            "from all but one"
        )


def data_table(dataset: DenseDataset) -> dict[str, str]:
    """Returns for each image a digest of its content and one of its label, split and patient."""
    files: dict[Path, str] = {}  # one file may hold the labels of all images
    rows = {}
    for example in dataset.examples:
        label = files.setdefault(example.label_file, "") or file_hash(example.label_file)[:16]
        files[example.label_file] = label
        rows[str(example.image)] = f"{file_hash(example.image)[:32]}:{label} {example.split} {example.patient}"
    check_copies(dataset, rows)
    return rows


def data_digest(dataset: DenseDataset, table: dict[str, str]) -> str:
    """Returns a digest of the classes and of all images and labels; `table` is of `data_table`."""
    digest = hashlib.sha256(repr((dataset.classes, getattr(dataset, "exclusive", None))).encode())
    for example in dataset.examples:
        digest.update(f"{example.image.name}\0{table[str(example.image)]}\1".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
