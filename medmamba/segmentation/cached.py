"""Decoded images and masks of one size in memory, from which batches are taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..dense.cached import CachedImages, Progressed, decode_images
from ..imaging import MedicalImage
from ..imaging.preprocess import placement
from .dataset import IGNORED, SegmentationDataset


@dataclass
class CachedPairs(CachedImages):
    """Images (N, H, W, C) uint8 and masks (N, M, H, W) uint8, on the CPU or a GPU."""

    masks: Tensor

    def to(self, device: torch.device) -> None:
        """Moves images and masks to a device."""
        super().to(device)
        self.masks = self.masks.to(device)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.images.nbytes + self.masks.nbytes

    def labels(self, rows: Tensor, device: torch.device) -> Tensor:
        """Returns masks (B, M, H, W) uint8 on a device."""
        return self.masks[rows.to(self.masks.device)].to(device, non_blocking=True)


def cache_pairs(
    dataset: SegmentationDataset, config: PreprocessConfig, in_chans: int, progress: Progressed | None = None
) -> CachedPairs:
    """Decodes all images and masks of a dataset at the size of the network's input.

    Margins of padded images are marked as ignored in the masks.

    Raises:
        ImageError: an image that cannot be read.
        DatasetError: a mask that cannot be read, of another size, or with values that name no class.
    """
    planes = 1 if dataset.exclusive or len(dataset.classes) == 1 else len(dataset.classes)
    masks = torch.empty((len(dataset), planes, *config.input_size), dtype=torch.uint8)

    def keep(row: int, image: MedicalImage, labels: list) -> None:
        masks[row] = resize_mask(torch.from_numpy(labels[0]), config)

    images, warnings = decode_images(dataset, config, in_chans, progress, keep)
    return CachedPairs(dataset, images, masks, warnings=warnings)


def resize_mask(mask: Tensor, config: PreprocessConfig) -> Tensor:
    """Resizes a mask (M, H, W) as `resize` does its image, by the nearest pixel; margins are ignored."""
    inner, (left, right, top, bottom) = placement((mask.shape[1], mask.shape[2]), config)
    small = torch.nn.functional.interpolate(mask[None].float(), inner, mode="nearest-exact")[0].to(torch.uint8)
    return torch.nn.functional.pad(small, (left, right, top, bottom), value=IGNORED)
