"""Checks of images with masks or boxes before they are trained on, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..data import DatasetError
from ..dense.examples import Examples
from ..utils.checksums import file_hash

D = TypeVar("D", bound=Examples)


def with_splits(dataset: D, split: Sequence[float] | None, seed: int) -> D:
    """Returns a dataset with splits: its own, or new ones by patient where known.

    Args:
        dataset: `SegmentationDataset` or `DetectionDataset`.
        split: fractions of train, val and test for data without splits; default: 0.7, 0.1 and 0.2.
        seed: of new splits.

    Raises:
        DatasetError: it has splits already and fractions were given, or see `check_dense_splits`.
    """
    if set(dataset.split_sizes) <= {None}:
        dataset = dataset.divided(split or (0.7, 0.1, 0.2), seed)
    elif split is not None:
        raise DatasetError(f"{dataset.name} has splits already ({dataset.split_sizes}); leave split= out")
    check_dense_splits(dataset)
    return dataset


def check_readable(dataset: Examples, split: str) -> None:
    """Reads all images and labels of a split, if the dataset has it.

    Raises:
        ImageError, DatasetError: one cannot be read, or its label does not fit it.
    """
    if dataset.split_sizes.get(split):
        part = dataset.split(split)
        for row in range(len(part.examples)):
            part.load(row)


def check_dense_splits(dataset: Examples) -> None:
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


def check_copies(dataset: Examples, table: dict[str, str]) -> None:
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


def data_table(dataset: Examples) -> dict[str, str]:
    """Returns for each image a digest of its content and one of its label, split and patient."""
    files: dict[Path, str] = {}  # one file may hold the labels of all images
    rows = {}
    for example in dataset.examples:
        label = files.setdefault(example.label_file, "") or file_hash(example.label_file)[:16]
        files[example.label_file] = label
        rows[str(example.image)] = f"{file_hash(example.image)[:32]}:{label} {example.split} {example.patient}"
    check_copies(dataset, rows)
    return rows


def data_digest(dataset: Examples, table: dict[str, str]) -> str:
    """Returns a digest of the classes and of all images and labels; `table` is of `data_table`."""
    digest = hashlib.sha256(repr((dataset.classes, getattr(dataset, "exclusive", None))).encode())
    for example in dataset.examples:
        digest.update(f"{example.image.name}\0{table[str(example.image)]}\1".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
