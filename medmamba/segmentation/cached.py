"""Decoded images and masks of one size in memory, from which batches are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.preprocess import adapt_channels, placement, resize
from .dataset import IGNORED, SegmentationDataset


@dataclass
class CachedPairs:
    """Images (N, H, W, C) uint8 and masks (N, M, H, W) uint8, on the CPU or a GPU.

    Attributes:
        index: the dataset they are of.
        warnings: warnings of the image reader, one line per kind.
    """

    index: SegmentationDataset
    images: Tensor
    masks: Tensor
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def device(self) -> torch.device:
        """Where images and masks are."""
        return self.images.device

    def batches(self, parts: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batch of each part in turn."""
        for rows in parts:
            yield self.batch(rows, device)

    def to(self, device: torch.device) -> None:
        """Moves images and masks to a device."""
        self.images, self.masks = self.images.to(device), self.masks.to(device)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.images.nbytes + self.masks.nbytes

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W) in [0, 1] and masks (B, M, H, W) uint8 on a device."""
        here = rows.to(self.images.device)
        images = self.images[here].to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        return images, self.masks[here].to(device, non_blocking=True)


def cache_pairs(
    dataset: SegmentationDataset,
    config: PreprocessConfig,
    in_chans: int,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> CachedPairs:
    """Decodes all images and masks of a dataset at the size of the network's input.

    Margins of padded images are marked as ignored in the masks.

    Raises:
        ImageError: an image that cannot be read.
        DatasetError: a mask that cannot be read, of another size, or with values that name no class.
    """
    height, width = config.input_size
    planes = 1 if dataset.exclusive or len(dataset.classes) == 1 else len(dataset.classes)
    images = torch.empty((len(dataset), height, width, in_chans), dtype=torch.uint8)
    masks = torch.empty((len(dataset), planes, height, width), dtype=torch.uint8)
    kinds: dict[str, int] = {}
    rows: Iterable[int] = range(len(dataset))
    for row in progress(rows) if progress else rows:
        image, mask = dataset.load(row)
        for kind in image.warning_kinds:
            kinds[kind] = kinds.get(kind, 0) + 1
        pixels = torch.from_numpy(np.ascontiguousarray(image.pixels)).permute(2, 0, 1)
        pixels = resize(adapt_channels(pixels, in_chans)[None], config)[0]
        images[row] = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
        masks[row] = resize_mask(torch.from_numpy(mask), config)
    return CachedPairs(dataset, images, masks, [f"{kind}: {count} images" for kind, count in sorted(kinds.items())])


def resize_mask(mask: Tensor, config: PreprocessConfig) -> Tensor:
    """Resizes a mask (M, H, W) as `resize` does its image, by the nearest pixel; margins are ignored."""
    inner, (left, right, top, bottom) = placement((mask.shape[1], mask.shape[2]), config)
    small = torch.nn.functional.interpolate(mask[None].float(), inner, mode="nearest-exact")[0].to(torch.uint8)
    return torch.nn.functional.pad(small, (left, right, top, bottom), value=IGNORED)
