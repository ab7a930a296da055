"""Decoded images of one size in memory with their boxes, from which batches are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.preprocess import adapt_channels, placement, resize
from .dataset import DetectionDataset


@dataclass
class CachedBoxes:
    """Images (N, H, W, C) uint8 on the CPU or a GPU, and for each its boxes (B, 4) in its pixels and labels (B,).

    Attributes:
        index: the dataset they are of.
        warnings: warnings of the image reader, one line per kind.
    """

    index: DetectionDataset
    images: Tensor
    boxes: list[tuple[Tensor, Tensor]]
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the order of a batch is looked up: on the CPU, since boxes are there."""
        return torch.device("cpu")

    def batches(
        self, parts: Iterable[Tensor], device: torch.device
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yields the batch of each part in turn."""
        for rows in parts:
            yield self.batch(rows, device)

    def to(self, device: torch.device) -> None:
        """Moves the images to a device; boxes stay, since they are moved one image at a time."""
        self.images = self.images.to(device)

    @property
    def nbytes(self) -> int:
        """Size of the images in memory."""
        return self.images.nbytes

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Returns images (B, C, H, W) in [0, 1] on a device, and boxes and labels of each on the CPU."""
        chosen = self.images[rows.to(self.images.device)].to(device, non_blocking=True)
        return chosen.permute(0, 3, 1, 2).float() / 255, [self.boxes[row] for row in rows.tolist()]


def cache_boxes(
    dataset: DetectionDataset,
    config: PreprocessConfig,
    in_chans: int,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> CachedBoxes:
    """Decodes all images of a dataset at the size of the network's input, and moves their boxes with them.

    Raises:
        ImageError: an image that cannot be read.
        DatasetError: a box outside of its image.
    """
    height, width = config.input_size
    images = torch.empty((len(dataset), height, width, in_chans), dtype=torch.uint8)
    boxes: list[tuple[Tensor, Tensor]] = []
    kinds: dict[str, int] = {}
    rows: Iterable[int] = range(len(dataset))
    for row in progress(rows) if progress else rows:
        image, found, labels = dataset.load(row)
        for kind in image.warning_kinds:
            kinds[kind] = kinds.get(kind, 0) + 1
        pixels = torch.from_numpy(np.ascontiguousarray(image.pixels)).permute(2, 0, 1)
        pixels = resize(adapt_channels(pixels, in_chans)[None], config)[0]
        images[row] = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
        inner, (left, _, top, _) = placement(image.size, config)
        scale = np.array([inner[1] / image.size[1], inner[0] / image.size[0]] * 2, np.float32)
        moved = found * scale + np.array([left, top] * 2, np.float32)
        boxes.append((torch.from_numpy(moved.astype(np.float32)), torch.from_numpy(labels)))
    return CachedBoxes(dataset, images, boxes, [f"{kind}: {count} images" for kind, count in sorted(kinds.items())])
