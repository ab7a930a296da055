"""Decoded images of one size in memory with their boxes, from which batches are taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..dense.cached import CachedImages, Progressed, decode_images
from ..imaging import MedicalImage
from ..imaging.preprocess import placement
from .dataset import DetectionDataset


@dataclass
class CachedBoxes(CachedImages):
    """Images (N, H, W, C) uint8 on the CPU or a GPU, and for each its boxes (B, 4) in its pixels and labels (B,).

    Boxes stay on the CPU, since they are moved one image at a time.
    """

    boxes: list[tuple[Tensor, Tensor]]

    @property
    def device(self) -> torch.device:
        """Where the rows of a batch are looked up: on the CPU, since boxes are there."""
        return torch.device("cpu")

    def labels(self, rows: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Returns boxes and labels of each image on the CPU."""
        return [self.boxes[row] for row in rows.tolist()]


def cache_boxes(
    dataset: DetectionDataset, config: PreprocessConfig, in_chans: int, progress: Progressed | None = None
) -> CachedBoxes:
    """Decodes all images of a dataset at the size of the network's input, and moves their boxes with them.

    Raises:
        ImageError: an image that cannot be read.
        DatasetError: a box outside of its image.
    """
    boxes: list[tuple[Tensor, Tensor]] = []

    def keep(row: int, image: MedicalImage, labels: list) -> None:
        found, numbers = labels
        inner, (left, _, top, _) = placement(image.size, config)
        scale = np.array([inner[1] / image.size[1], inner[0] / image.size[0]] * 2, np.float32)
        moved = found * scale + np.array([left, top] * 2, np.float32)
        boxes.append((torch.from_numpy(moved.astype(np.float32)), torch.from_numpy(numbers)))

    images, warnings = decode_images(dataset, config, in_chans, progress, keep)
    return CachedBoxes(dataset, images, boxes, warnings=warnings)
