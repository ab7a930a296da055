"""What an image looks like to a model, as numbers: statistics of its pixels and of every stage of the network.

Out-of-distribution detection (`ood`) compares these with the training images. The features behind the network alone do
not suffice: a classifier keeps what tells its classes apart and drops the rest, so an X-ray can land among the nevi.
The early stages keep texture and colour, and the pixels say plainly what is grey, what is purple and what is dark.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..config import MedMambaConfig
from ..imaging.preprocess import denormalise

_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_CHROMA_QUANTILES = (0.1, 0.5, 0.9)
_BANDS, _CHROMA_BANDS = 5, 3
_GRID, _CHROMA_GRID = 8, 4
# Of amplitudes in [0, 1], before logarithms: what a level of 8 bits, up or down, or compression does must not matter.
_FLOOR, _CHROMA_FLOOR = 1e-3, 1e-2
COLOUR = 6 + len(_QUANTILES) + len(_CHROMA_QUANTILES) + 2
TEXTURE = 2 * _BANDS + 2 * _CHROMA_BANDS + 4
LAYOUT = _GRID**2 + 2 * _CHROMA_GRID**2
STILL = {"colour": 0.03, "texture": 0.3, "layout": 0.03}
"""By part, the deviation that is the least to count: a grey image that was saved in colour is off by a level or two."""
PIXELS = COLOUR + TEXTURE + LAYOUT
"""Number of pixel statistics: colour and brightness, texture, layout."""


def groups(config: MedMambaConfig) -> dict[str, slice]:
    """Returns the columns of each part of the signatures of a model; the last `dims[-1]` are the pooled features."""
    dims = config.dims
    widths = {"colour": COLOUR, "texture": TEXTURE, "layout": LAYOUT}
    widths |= {f"stage {i + 1}": 2 * dim for i, dim in enumerate(dims)}
    found, start = {}, 0
    for name, width in widths.items():
        found[name] = slice(start, start + width)
        start += width
    return found


def width(config: MedMambaConfig) -> int:
    """Returns the number of columns of a model's signatures."""
    return PIXELS + 2 * sum(config.dims)


@torch.inference_mode()
def signature(batch: Tensor, maps: Sequence[Tensor], features: Tensor, config: MedMambaConfig) -> Tensor:
    """Computes the signatures of images from one forward pass.

    Args:
        batch: (B, in_chans, H, W), as the network was given them.
        maps: of all stages, (B, dims[i], H_i, W_i).
        features: (B, dims[-1]), what the classifier was given.
        config: of the model.

    Returns:
        (B, S) float32 on the device of `batch`, see `groups`.
    """
    parts = [pixel_statistics(batch, config)]
    for i, found in enumerate(maps):
        mean, std = _mean_and_std(found.float().permute(0, 2, 3, 1).flatten(1, 2), 1)  # contiguous as (B, H, W, C)
        parts += [mean, std] if i + 1 < len(maps) else [std]
    return torch.cat([*parts, features.float()], 1)


def pixel_statistics(batch: Tensor, config: MedMambaConfig) -> Tensor:
    """Returns statistics of the pixels (B, `PIXELS`) of normalised images (B, in_chans, H, W).

    Colour and brightness (moments and quantiles of luma and chroma), texture (logarithms of the amplitude and of the
    sparseness of the bands of a Laplacian pyramid, and of gradients along rows and columns), layout (a thumbnail).
    """
    pixels = denormalise(batch.float(), config.preprocess)
    if pixels.shape[1] == 3:
        luma = (pixels * pixels.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)
        chroma = torch.cat((pixels[:, 2:] - luma, pixels[:, :1] - luma), 1)
    else:
        luma = pixels.mean(1, keepdim=True)
        chroma = luma.new_zeros((len(luma), 2, *luma.shape[2:]))
    planes = torch.cat((luma, chroma), 1)  # (B, 3, H, W)
    small = F.adaptive_avg_pool2d(planes, 64)
    flat = small.flatten(2)
    strength = flat[:, 1:].square().sum(1).sqrt()
    quantiles = torch.quantile(flat[:, 0], flat.new_tensor(_QUANTILES), dim=1).T
    colourful = torch.quantile(strength, flat.new_tensor(_CHROMA_QUANTILES), dim=1).T
    dark, light = (luma < 0.02).float().mean((1, 2, 3)), (luma > 0.98).float().mean((1, 2, 3))
    colour = [*_mean_and_std(planes.flatten(2), 2), quantiles, colourful, dark[:, None], light[:, None]]
    layout = [
        F.adaptive_avg_pool2d(small[:, :1], _GRID).flatten(1),
        F.adaptive_avg_pool2d(small[:, 1:], _CHROMA_GRID).flatten(1),
    ]
    return torch.cat([*colour, *_texture(planes), *layout], 1)


def _mean_and_std(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation along a dimension, much faster on a CPU than `torch.std_mean`."""
    mean = values.mean(dim, keepdim=True)
    return mean.squeeze(dim), (values - mean).square_().mean(dim).sqrt()


def _texture(planes: Tensor) -> list[Tensor]:
    """Statistics of bands an octave wide, of luma and chroma (B, 3, H, W)."""
    found, rest = [], planes
    for band in range(_BANDS):
        if min(rest.shape[2:]) < 2:
            rest = F.interpolate(rest, scale_factor=2)
        low = F.avg_pool2d(rest, 2)
        detail = rest - F.interpolate(low, size=rest.shape[2:], mode="nearest")
        amplitude = detail.square().mean((2, 3)).sqrt()
        size = detail[:, :1].abs().mean((2, 3))
        found += [(amplitude[:, :1] + _FLOOR).log(), (size + _FLOOR).log() - (amplitude[:, :1] + _FLOOR).log()]
        if band < _CHROMA_BANDS:
            found.append((amplitude[:, 1:] + _CHROMA_FLOOR).log())
        if band in (0, 1):
            luma = rest[:, :1]
            across, down = (luma.diff(dim=d).square().mean((1, 2, 3)).sqrt() for d in (3, 2))
            found.append((torch.stack((across, down), 1) + _FLOOR).log())
        rest = low
    return found


class Signatures:
    """Collects the signatures of predicted images, see `signatures`."""

    def __init__(self, most: int | None = None) -> None:
        self._parts: list[np.ndarray] = []
        self._left = most

    def add(self, found: Tensor) -> None:
        """Adds signatures (B, S), as long as there are fewer than `most`."""
        if self._left is not None:
            found = found[: self._left]
            self._left -= len(found)
        if len(found):
            self._parts.append(found.float().cpu().numpy())

    def array(self) -> NDArray[np.float32]:
        """Returns the signatures (N, S) in the order of the images."""
        return np.concatenate(self._parts) if self._parts else np.zeros((0, 0), np.float32)


_collecting = threading.local()


@contextmanager
def signatures(most: int | None = None) -> Iterator[Signatures]:
    """Collects the signatures of the images that models predict in this thread; nothing is computed twice.

    Args:
        most: no more than the first so many; None: all.

    >>> with signatures() as seen:
    ...     predictions = model.predict(images)
    >>> model.unusual.score(seen.array())
    """
    found, before = Signatures(most), collector()
    _collecting.sink = found
    try:
        yield found
    finally:
        _collecting.sink = before


def collector() -> Signatures | None:
    """Returns where signatures of this thread are collected, or None."""
    return getattr(_collecting, "sink", None)


def watch_maps(view: Any, maps: list[list[Tensor]]) -> None:
    """Has a view of a model (`utils.modes.eval_view`), or a copy, leave the maps of its stages in `maps`, per call."""

    def forward_pyramid(x: Tensor) -> list[Tensor]:
        found = type(view).forward_pyramid(view, x)
        maps.append(found)
        return found

    view.__dict__["forward_pyramid"] = forward_pyramid
