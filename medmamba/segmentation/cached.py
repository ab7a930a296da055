"""Decoded images and masks of one size in memory, from which batches are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.preprocess import adapt_channels, placement, resize
from .dataset import IGNORED, SegmentationDataset

if TYPE_CHECKING:
    from accelerate import Accelerator


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


@dataclass
class PairCache:
    """Decodes the images of a split at a size on first use, and keeps one size of each split in memory.

    Args:
        dataset: with splits.
        config: for crop mode and interpolation.
        in_chans: channels of the model.
        accelerator: on whose GPU the images are kept where they take less than a third of its free memory.
        progress: shows a progress bar.
        say: receives the warnings of the image reader.
    """

    dataset: SegmentationDataset
    config: PreprocessConfig
    in_chans: int
    accelerator: Accelerator
    progress: bool = False
    say: Callable[[str], None] | None = None
    _kept: dict[str, tuple[int, CachedPairs]] = field(default_factory=dict)

    def __call__(self, split: str, size: int) -> CachedPairs:
        """Returns the images and masks of a split, decoded at `size` pixels."""
        if split not in self._kept or self._kept[split][0] != size:
            self._kept.pop(split, None)
            self._kept[split] = (size, self._load(split, size))
        return self._kept[split][1]

    def _load(self, split: str, size: int) -> CachedPairs:
        from tqdm import tqdm

        part = self.dataset.split(split)
        visible = self.progress and self.accelerator.process_index == 0

        def bar(items: Iterable[int]) -> Iterable[int]:
            return tqdm(items, f"reading {split}", len(part), unit="img", disable=not visible)

        found = cache_pairs(part, dataclasses.replace(self.config, input_size=(size, size)), self.in_chans, bar)
        for line in found.warnings if self.say else ():
            self.say(f"{split}: {line}")  # type: ignore[misc]
        if self.accelerator.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.accelerator.device)
            if found.images.nbytes + found.masks.nbytes < free // 3:
                found.images = found.images.to(self.accelerator.device)
                found.masks = found.masks.to(self.accelerator.device)
        return found
