"""Decoded images of one size in memory, from which batches are taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging import MedicalImage
from ..imaging.preprocess import adapt_channels, resize

Progressed = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class CachedImages(ABC):
    """Base of `CachedPairs` and `CachedBoxes`: images (N, H, W, C) uint8, on the CPU or a GPU.

    Attributes:
        index: the dataset they are of.
        images: their pixels.
        warnings: warnings of the image reader, one line per kind.
    """

    index: Any
    images: Tensor
    warnings: list[str] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the rows of a batch are looked up."""
        return self.images.device

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.images.nbytes

    def to(self, device: torch.device) -> None:
        """Moves the images to a device."""
        self.images = self.images.to(device)

    def batches(self, parts: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Any]]:
        """Yields the batch of each part in turn."""
        for rows in parts:
            yield self.batch(rows, device)

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Returns images (B, C, H, W) in [0, 1] on a device, and the labels of each."""
        chosen = self.images[rows.to(self.images.device)].to(device, non_blocking=True)
        return chosen.permute(0, 3, 1, 2).float() / 255, self.labels(rows, device)

    @abstractmethod
    def labels(self, rows: Tensor, device: torch.device) -> Any:
        """Returns the labels of a batch."""


def decode_images(
    dataset: Any,
    config: PreprocessConfig,
    in_chans: int,
    progress: Progressed | None,
    keep: Callable[[int, MedicalImage, Any], None],
) -> tuple[Tensor, list[str]]:
    """Decodes all images of a dataset at the size of the network's input; returns them and the reader's warnings.

    Args:
        dataset: whose `load` returns an image and its labels.
        config: size, crop mode and interpolation.
        in_chans: channels of the model.
        progress: wraps the rows in a progress bar.
        keep: receives row, image and labels of each.

    Raises:
        ImageError: an image that cannot be read.
    """
    images = torch.empty((len(dataset), *config.input_size, in_chans), dtype=torch.uint8)
    kinds: Counter[str] = Counter()
    rows: Iterable[int] = range(len(dataset))
    for row in progress(rows) if progress else rows:
        image, *labels = dataset.load(row)
        kinds.update(image.warning_kinds)
        pixels = torch.from_numpy(np.ascontiguousarray(image.pixels)).permute(2, 0, 1)
        pixels = resize(adapt_channels(pixels, in_chans)[None], config)[0]
        images[row] = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
        keep(row, image, labels)
    return images, [f"{kind}: {count} images" for kind, count in sorted(kinds.items())]
