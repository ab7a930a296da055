"""What datasets of images with masks and of images with boxes have in common: examples and splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..data import DatasetError
from .splits import divided

E = TypeVar("E", bound="Examples")


class Examples(ABC):
    """Base of `SegmentationDataset` and `DetectionDataset`.

    A subclass is a dataclass with these fields; its examples have `image`, `label_file`, `split` and `patient`.
    """

    name: str
    classes: tuple[str, ...]
    examples: tuple[Any, ...]

    @abstractmethod
    def load(self, index: int) -> tuple[Any, ...]:
        """Reads one image; returns it with its labels."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def split_sizes(self) -> dict[str | None, int]:
        """Number of images in each split."""
        return dict(Counter(example.split for example in self.examples))

    def split(self: E, name: str) -> E:
        """Returns the images of one split.

        Raises:
            DatasetError: it has no images.
        """
        kept = tuple(example for example in self.examples if example.split == name)
        if not kept:
            there = ", ".join(map(str, self.split_sizes)) or "none"
            raise DatasetError(f"{self.name} has no images in split {name!r}; it has {there}")
        return replace(self, examples=kept)  # type: ignore[type-var]

    def divided(self: E, fractions: Sequence[float], seed: int = 0) -> E:
        """Returns a copy divided into train, val and test, all images of a patient on one side.

        Args:
            fractions: of train, val and test.
            seed: of the order.

        Raises:
            DatasetError: fractions that do not sum to 1, or too few patients for three splits.
        """
        places = divided([e.patient or str(e.image) for e in self.examples], fractions, seed, self.name)
        found = tuple(replace(e, split=place) for e, place in zip(self.examples, places, strict=True))
        return replace(self, examples=found)  # type: ignore[type-var]
