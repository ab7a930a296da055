"""One in-memory index for every kind of image collection: `ImageDataset`, a list of `Record` and a way to read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import TASKS
from ..imaging.load import MedicalImage

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}

Transform = Callable[[MedicalImage], Tensor]


class DatasetError(ValueError):
    """A collection of images that cannot be used as requested. The message says what is wrong and how to fix it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a collection.

    Attributes:
        source: path relative to the collection (posix), absolute path, or row of an array.
        label: class index, or one 0/1 per class where several classes can hold at once.
        split: "train", "val", "test" or None.
        patient: the unit that must stay within one split: patient, lesion, study; None if unknown.
    """

    source: str | int
    label: int | tuple[int, ...]
    split: str | None = None
    patient: str | None = None


class Reader(Protocol):
    """Where the pixels of records come from. Must survive pickling, for workers that are started by spawn.

    A reader should also have a method `file_of(record) -> Path`, the file that decides what `read` returns: caches and
    unfinished runs then notice that it has changed. Without it they have to decode every image for that.
    """

    def read(self, record: Record) -> MedicalImage: ...


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """An indexed collection of labelled images. Images are decoded on access, labels are in memory.

    `dataset[i]` is `(transform(image), label)`: a float32 tensor, `(C, H, W)` in [0, 1] without a transform, and an
    int64 scalar (multi-class) or float32 `(K,)` of 0 and 1 (multi-label). Never changed in place: `split`, `subset`,
    `with_transform` and `with_records` return new ones that share the reader.

    Args:
        records: the images.
        classes: names in the order of the label indices.
        reader: gives the pixels of a record.
        task: "multiclass" (two classes included), "multilabel", or "ordinal": one class per image, and `classes` are
            grades in ascending order.
        transform: `MedicalImage` to float32 tensor, for example a model's preprocessing.
        name: for messages.
        notes: what the reader passed over, merged or guessed, for display; kept by all methods.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        reader: Reader,
        task: str = "multiclass",
        transform: Transform | None = None,
        name: str = "dataset",
        notes: Sequence[str] = (),
    ) -> None:
        self.records = tuple(records)
        self.classes = tuple(classes)
        self.reader = reader
        self.task = task
        self.transform = transform
        self.name = name
        self.notes = tuple(notes)
        if task not in TASKS:
            raise DatasetError(f"{name}: task must be one of {', '.join(TASKS)}, got {task!r}")
        if len(set(self.classes)) != len(self.classes):
            raise DatasetError(f"{name}: class names are not unique: {', '.join(self.classes)}")
        self._check_labels()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        transform = self.transform or to_tensor
        return transform(self.image(index)), self.targets[index]

    def __repr__(self) -> str:
        counts = ", ".join(f"{split or 'no split'} {n}" for split, n in self.split_sizes.items())
        return f"ImageDataset({self.name}: {len(self)} images, {len(self.classes)} classes, {self.task}; {counts})"

    def image(self, index: int) -> MedicalImage:
        """Returns the image as read, before the transform."""
        return self.reader.read(self.records[index])

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64 `(N,)` class indices, or `(N, K)` of 0 and 1 where the task is multi-label."""
        shape = (len(self), len(self.classes)) if self.task == "multilabel" else (len(self),)
        return np.array([record.label for record in self.records], dtype=np.int64).reshape(shape)

    @functools.cached_property
    def targets(self) -> Tensor:
        """The labels in the form of loss functions: int64 `(N,)` or float32 `(N, K)`."""
        labels = torch.from_numpy(self.labels)
        return labels.float() if self.task == "multilabel" else labels

    @property
    def patients(self) -> list[str | None]:
        return [record.patient for record in self.records]

    @property
    def splits(self) -> list[str | None]:
        return [record.split for record in self.records]

    @property
    def split_sizes(self) -> dict[str | None, int]:
        """Number of images by split, in the order train, val, test, None; splits without images are left out."""
        found = self.splits
        return {split: found.count(split) for split in (*SPLITS, None) if split in found}

    @property
    def class_counts(self) -> np.ndarray:
        """int64 `(K,)`: images that show each class."""
        if self.task == "multilabel":
            return self.labels.sum(axis=0)
        return np.bincount(self.labels, minlength=len(self.classes))

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """Returns the images at `indices`, in that order."""
        return self.with_records([self.records[int(index)] for index in indices])

    def split(self, name: str) -> ImageDataset:
        """Returns the images of one split.

        Raises:
            DatasetError: no image is in it.
        """
        chosen = [record for record in self.records if record.split == name]
        if not chosen:
            found = ", ".join(str(key) for key in self.split_sizes)
            raise DatasetError(
                f"{self.name} has no split {name!r} (found: {found}); take all images (split=None or --split all), or "
                "make one with make_splits(dataset)"
            )
        return self.with_records(chosen)

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        return ImageDataset(self.records, self.classes, self.reader, self.task, transform, self.name, self.notes)

    def with_records(self, records: Sequence[Record]) -> ImageDataset:
        return ImageDataset(records, self.classes, self.reader, self.task, self.transform, self.name, self.notes)

    def with_task(self, task: str) -> ImageDataset:
        """Returns the same images for another task, such as "ordinal" where the classes are grades in order.

        Raises:
            DatasetError: the labels do not fit the task.
        """
        return ImageDataset(self.records, self.classes, self.reader, task, self.transform, self.name, self.notes)

    def with_notes(self, *notes: str) -> ImageDataset:
        """Returns the same images with further notes."""
        both = (*self.notes, *notes)
        return ImageDataset(self.records, self.classes, self.reader, self.task, self.transform, self.name, both)

    def with_splits(self, splits: Sequence[str | None]) -> ImageDataset:
        """Returns the same images assigned to `splits`, one entry per image."""
        pairs = zip(self.records, splits, strict=True)
        return self.with_records([Record(one.source, one.label, split, one.patient) for one, split in pairs])

    def _check_labels(self) -> None:
        count = len(self.classes)
        for record in self.records:
            if isinstance(record.label, tuple):
                good = self.task == "multilabel" and len(record.label) == count and set(record.label) <= {0, 1}
            else:
                good = self.task != "multilabel" and 0 <= record.label < count
            if not good:
                raise DatasetError(
                    f"{self.name}: label {record.label} of {record.source} does not fit the {count} classes of a "
                    f"{self.task} task"
                )


def to_tensor(image: MedicalImage) -> Tensor:
    """Returns the pixels unchanged as float32 `(C, H, W)` in [0, 1]."""
    planes = np.require(image.pixels.transpose(2, 0, 1), requirements=("C", "W"))  # (H, W, C) -> (C, H, W)
    return torch.from_numpy(planes)


def split_name(name: str) -> str | None:
    """Returns "train", "val" or "test" for the usual spellings ("valid", "Validation", ...), else None."""
    return _SPLIT_NAMES.get(name.strip().lower())
