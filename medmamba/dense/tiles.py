"""Overlapping tiles of large images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

MIN_TILE = 64  # pixels


def tiles(size: tuple[int, int], tile: int, overlap: float) -> Iterator[tuple[slice, slice]]:
    """Yields the rows and columns of tiles that cover an image (height, width) evenly, overlapping at least so much."""
    for rows in _along(size[0], tile, overlap):
        for columns in _along(size[1], tile, overlap):
            yield rows, columns


def _along(length: int, tile: int, overlap: float) -> list[slice]:
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - tile) / (tile * (1 - overlap))) + 1
    return [slice(start, start + tile) for start in np.linspace(0, length - tile, count).round().astype(int).tolist()]


def ramp(length: int) -> Tensor:
    """Returns positive weights (length,), a triangle that is highest in the middle."""
    x = torch.arange(length) + 0.5
    return torch.minimum(x, length - x) / length
