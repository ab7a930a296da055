"""Splits into train, val and test: grouped by patient and stratified, or the published random split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch

from .dataset import SPLITS, DatasetError, ImageDataset
from .registry import DatasetEntry

VAL_SHARE = 0.125
"""Of the training images, what `val_from_train` takes: the proportion of val to train that `make_splits` makes."""


def make_splits(
    dataset: ImageDataset, fractions: Sequence[float] = (0.7, 0.1, 0.2), *, stratify: bool = True, seed: int = 0
) -> ImageDataset:
    """Assigns every image to train, val or test, replacing what was assigned before.

    All images of a patient (`Record.patient`) stay together; an image without one forms its own group. With `stratify`
    every class is divided as closely to `fractions` as whole patients allow (exactly, to one image, where every
    patient has one image and one label). The result depends on the records, `fractions` and `seed` alone.

    Groups are taken one by one, those with the rarest class first, large before small, and each goes where it reduces
    the squared distance of the class counts to their targets most: the greedy rule of scikit-learn's
    `StratifiedGroupKFold`, for unequal parts and for several labels at once.

    Args:
        fractions: shares of train, val and test; they add up to 1, zero leaves a split out.

    Raises:
        DatasetError: fractions that make no sense, or too few patients to fill every split.
    """
    shares = np.asarray(fractions, dtype=float)
    if shares.shape != (3,) or shares.min() < 0 or abs(shares.sum() - 1) > 1e-6:
        raise DatasetError(f"fractions must be three shares of train, val and test that add up to 1, got {fractions}")
    group_of = _groups(dataset)
    n_groups = int(group_of.max()) + 1 if len(dataset) else 0
    wanted = [name for name, share in zip(SPLITS, shares, strict=True) if share > 0]
    if n_groups < len(wanted):
        raise DatasetError(
            f"{dataset.name}: {n_groups} patients (or images without one) cannot fill {len(wanted)} splits; add data "
            "or leave a split out with a fraction of 0"
        )
    counts = _class_counts(dataset, group_of, n_groups) if stratify else np.bincount(group_of)[:, None].astype(float)
    part = _assign(counts, shares, seed)
    empty = _unfilled(part, shares)
    if empty:
        raise DatasetError(f"{dataset.name}: {_why_empty(empty, dataset, counts, shares, seed)}")
    return dataset.with_splits([SPLITS[part[group]] for group in group_of])


def val_from_train(dataset: ImageDataset, share: float = VAL_SHARE, *, seed: int = 0) -> ImageDataset:
    """Moves a share of the training images to val, as `make_splits` would divide them; test stays as it is.

    For data that come with train and test only. Patients stay together. `ImageDataset.notes` says what was done.

    Raises:
        DatasetError: there are images in val, none in train, or too few to divide.
    """
    rows = [i for i, record in enumerate(dataset.records) if record.split == "train"]
    if not rows or "val" in dataset.splits:
        raise DatasetError(f"{dataset.name}: val is taken from train where there is a train and no val ({dataset!r})")
    divided = make_splits(dataset.subset(rows), (1 - share, share, 0), seed=seed)
    splits = dataset.splits
    for row, record in zip(rows, divided.records, strict=True):
        splits[row] = record.split
    known = any(dataset.records[row].patient is not None for row in rows)
    moved = divided.split_sizes.get("val", 0)
    return dataset.with_splits(splits).with_notes(
        f"no val: {moved} of {len(rows)} training images were taken for it, "
        f"{'by patient' if known else 'by image, as patients are unknown'}; test was not touched"
    )


def random_split(dataset: ImageDataset, sizes: Sequence[int], seed: int) -> ImageDataset:
    """Reproduces `torch.utils.data.random_split` after `torch.manual_seed(seed)` over an ImageFolder.

    By image, neither stratified nor grouped: for repeating published experiments, not for new ones. Images are counted
    by label, then by folder, then by file name: torchvision's order, where the classes are in alphabetical order.

    Args:
        sizes: images in train, val and test; they add up to the size of the dataset.
    """
    if len(sizes) != 3 or sum(sizes) != len(dataset):
        raise DatasetError(f"{dataset.name}: the sizes {tuple(sizes)} do not add up to its {len(dataset)} images")
    keys = [(record.label, PurePosixPath(str(record.source))) for record in dataset.records]
    folder_order = sorted(range(len(keys)), key=lambda i: (keys[i][0], str(keys[i][1].parent), keys[i][1].name))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    splits: list[str | None] = [None] * len(dataset)
    for place, position in enumerate(drawn):
        name = "train" if place < sizes[0] else "val" if place < sizes[0] + sizes[1] else "test"
        splits[folder_order[position]] = name
    return dataset.with_splits(splits)


def published_split(dataset: ImageDataset, entry: DatasetEntry) -> ImageDataset:
    """Returns the split of the paper, as far as it is known.

    Data that carry their split (MedMNIST) are returned as they are. For PAD-UFES-20, Fetal-Planes-DB, CPN X-ray and
    Kvasir it is `random_split` with the sizes and the seed of the registry; these come from another paper's code that
    compares itself with MedMamba, so who is in which part may differ from the authors' lists (see
    `entry.split_rule.note`). The images must be a plain tree `root/<class>/image`.

    Raises:
        DatasetError: the split was never published, or the number of images is not that of the published set.
    """
    rule = entry.split_rule
    if rule.kind == "official":
        if set(dataset.splits) != set(SPLITS):
            raise DatasetError(f"{entry.title} comes with an official split, but {dataset.name} carries none")
        return dataset
    if rule.kind != "random" or entry.splits is None or rule.seed is None:
        raise DatasetError(f"{entry.title}: {rule.note} Use make_splits(dataset)")
    if len(dataset) != entry.n_images:
        raise DatasetError(
            f"{dataset.name} has {len(dataset)} images, {entry.title} has {entry.n_images}: the published split cannot "
            "be drawn again. check_dataset says what differs"
        )
    return random_split(dataset, [entry.splits[name] for name in SPLITS], rule.seed)


def _assign(counts: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Returns the split index of each group, int64 `(groups,)`, from counts `(groups, K)` and shares `(3,)`."""
    totals = counts.sum(axis=0)  # (K,)
    weights = 1 / np.maximum(totals, 1) ** 2
    present = np.where(counts > 0, totals, np.inf)
    rarity = present.min(axis=1)  # images of the rarest class that the group shows
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    order = shuffled[np.lexsort((-counts.sum(axis=1)[shuffled], rarity[shuffled]))]
    lack = shares[:, None] * totals  # (3, K): images still missing
    part = np.empty(len(counts), dtype=int)
    for group in order:
        count = counts[group]
        change = (count * (count - 2 * lack) * weights).sum(axis=1)  # of the squared distance, by split
        change[shares == 0] = np.inf
        part[group] = int(change.argmin())
        lack[part[group]] -= count
    return part


def _unfilled(part: np.ndarray, shares: np.ndarray) -> list[str]:
    return [SPLITS[i] for i in range(3) if shares[i] > 0 and not (part == i).any()]


def _why_empty(empty: list[str], dataset: ImageDataset, counts: np.ndarray, shares: np.ndarray, seed: int) -> str:
    """Returns why a split stays empty, with fractions that would fill it if there are any."""
    largest = counts.sum(axis=1).max()
    few = counts.sum() / len(counts) > 2 and largest > shares[SPLITS.index(empty[0])] * counts.sum()
    sizes = ", ".join(f"{name} {share * len(dataset):.3g}" for name, share in zip(SPLITS, shares, strict=True) if share)
    if few:
        reason = f"a few patients hold most images, up to {largest:.0f} of {len(dataset)}"
    else:
        rarest = min(count for count in dataset.class_counts.tolist() if count)
        reason = f"{len(dataset)} images are few for these fractions ({sizes}), and a class has only {rarest}"
    text = f"nothing is left for {', '.join(empty)}: {reason}. Add data or change the fractions"
    for other in ((0.6, 0.2, 0.2), (0.5, 0.25, 0.25), (0.4, 0.3, 0.3), (0.34, 0.33, 0.33)):
        scaled = np.where(shares > 0, other, 0)
        scaled = scaled / scaled.sum()
        if not _unfilled(_assign(counts, scaled, seed), scaled):
            numbers = [f"{share:.3g}" for share in scaled]
            return f"{text}: ({', '.join(numbers)}) would do (--split {','.join(numbers)})"
    return text


def _groups(dataset: ImageDataset) -> np.ndarray:
    """Returns the patient number of each image, int64 `(N,)`, in order of first appearance."""
    numbers: dict[object, int] = {}
    keys = [record.patient if record.patient is not None else (i,) for i, record in enumerate(dataset.records)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _class_counts(dataset: ImageDataset, group_of: np.ndarray, n_groups: int) -> np.ndarray:
    """Returns images per group and class, float64 `(groups, K + 1)`; the last column counts images without a class."""
    labels = dataset.labels
    k = len(dataset.classes)
    onehot = labels if labels.ndim == 2 else np.eye(k, dtype=np.int64)[labels]  # (N, K)
    onehot = np.column_stack([onehot, onehot.sum(axis=1) == 0])
    counts = np.zeros((n_groups, k + 1))
    np.add.at(counts, group_of, onehot)
    return counts
