"""Compares a dataset with its registry entry: wrong classes, missing images, another split."""

from __future__ import annotations

from dataclasses import dataclass

from .dataset import SPLITS, DatasetError, ImageDataset
from .registry import DatasetEntry


@dataclass(frozen=True)
class DatasetCheck:
    """How a collection compares with its registry entry.

    `status` is one of
        "complete": the classes, the number of images and the split are the published ones;
        "unknown": nothing contradicts the entry, but too little is known of the set to call it complete;
        "other release": complete, with the sizes of an earlier release;
        "other split": all images are there, split differently (results are not comparable without a note);
        "partial": images are missing;
        "larger": more images than the set has, another version or set;
        "other classes": these are not its classes.
    """

    status: str
    messages: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.status in ("complete", "unknown", "other release")

    def raise_if_not_ok(self, *allow: str) -> None:
        """Raises `DatasetError` unless ok or of a status in `allow`."""
        if not self.ok and self.status not in allow:
            raise DatasetError("; ".join(self.messages))


def check_dataset(dataset: ImageDataset, entry: DatasetEntry) -> DatasetCheck:
    """Compares an index (labels and counts, no pixels) with what the registry knows. Raises nothing."""
    if dataset.classes != entry.classes or (dataset.task == "multilabel") != (entry.task == "multilabel"):
        return DatasetCheck("other classes", (_class_message(dataset, entry),))
    total, expected = len(dataset), entry.n_images
    sizes = {split: n for split, n in dataset.split_sizes.items() if split is not None}
    if expected is None:
        return DatasetCheck("unknown", (f"the number of images of {entry.title} is not known",))
    for earlier in entry.other_splits:
        if sizes == dict(earlier):
            return DatasetCheck("other release", (f"{entry.title} with the sizes of an earlier release",))
    if total > expected:
        return DatasetCheck(
            "larger", (f"{dataset.name} has {total} images, {entry.title} has {expected}: another version or set?",)
        )
    if total < expected:
        return DatasetCheck("partial", _partial_messages(dataset, entry, sizes))
    wrong = _short_classes(dataset, entry)
    if wrong:
        return DatasetCheck("partial", (f"{entry.title}: as many images as published, but {wrong}",))
    if entry.splits is None:
        return DatasetCheck("complete", (f"{entry.title}: all {total} images; its split was never published",))
    if sizes and sizes != dict(entry.splits):
        return DatasetCheck(
            "other split",
            (
                f"{entry.title}: all {total} images, but split {_sizes(sizes)} where published is "
                f"{_sizes(dict(entry.splits))}; results are comparable only with that note",
            ),
        )
    if not sizes and entry.split_rule.kind == "official":
        return DatasetCheck("other split", (f"{entry.title}: all {total} images, but without their official split",))
    return DatasetCheck("complete", (f"{entry.title}: all {total} images",))


def _class_message(dataset: ImageDataset, entry: DatasetEntry) -> str:
    missing = [name for name in entry.classes if name not in dataset.classes]
    extra = [name for name in dataset.classes if name not in entry.classes]
    if not missing and not extra:
        return (
            f"{dataset.name} has the classes of {entry.title} in another order ({', '.join(dataset.classes)}); open it "
            f"with dataset={entry.name!r}"
        )
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unknown {', '.join(extra)}"] if extra else []
    return f"{dataset.name} does not have the classes of {entry.title}: {'; '.join(parts)}"


def _partial_messages(dataset: ImageDataset, entry: DatasetEntry, sizes: dict[str, int]) -> tuple[str, ...]:
    total, expected = len(dataset), entry.n_images or 0
    messages = [f"{dataset.name} has {total} of the {expected} images of {entry.title} ({total / expected:.1%})"]
    if sizes and entry.splits:
        absent = [name for name in SPLITS if name not in sizes]
        counts = [(name, sizes.get(name, 0), entry.splits[name]) for name in SPLITS]
        short = [f"{name} {found} of {published}" for name, found, published in counts if 0 < found < published]
        if absent:
            messages.append(f"no {', '.join(absent)} images at all")
        if short:
            messages.append(f"short: {', '.join(short)}")
    wrong = _short_classes(dataset, entry)
    empty = [name for name, count in zip(dataset.classes, dataset.class_counts, strict=True) if count == 0]
    if wrong or empty:
        messages.append(wrong or f"no images of {', '.join(empty)}")
    messages.append(f"download the rest from {entry.source.url}" if entry.source.public else "the data are private")
    return tuple(messages)


def _short_classes(dataset: ImageDataset, entry: DatasetEntry) -> str:
    if entry.class_counts is None:
        return ""
    rows = zip(dataset.classes, dataset.class_counts.tolist(), entry.class_counts, strict=True)
    return ", ".join(f"{name} {found} of {published}" for name, found, published in rows if found != published)


def _sizes(sizes: dict[str, int]) -> str:
    return "/".join(str(sizes.get(name, 0)) for name in SPLITS)
