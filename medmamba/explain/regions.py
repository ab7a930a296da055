"""Baselines, which stand for absent evidence, and segments, whose pixels are removed together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.preprocess import normalise

BASELINES = {
    "mean": "all pixels in the mean colour of this image",
    "black": "all pixels black",
    "grey": "the mean that preprocessing subtracts, mid-grey in the published recipe",
    "blur": "this image, strongly blurred (Gaussian, sigma = height / 10)",
}


def make_baseline(x: Tensor, kind: str | float, config: PreprocessConfig) -> Tensor:
    """Returns a network input that stands for absent evidence.

    Args:
        x: (1, C, H, W) network input.
        kind: a name in `BASELINES`, or a grey level in [0, 1].

    Returns:
        A tensor with shape, dtype and device of x.

    Raises:
        ValueError: unknown name, or level out of range.
    """
    if isinstance(kind, int | float) and not isinstance(kind, bool):
        if not 0 <= kind <= 1:
            raise ValueError(f"a baseline level must be in [0, 1], black to white; got {kind}")
        return normalise(torch.full_like(x, float(kind)), config)
    if kind == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x).clone()
    if kind == "black":
        return normalise(torch.zeros_like(x), config)
    if kind == "grey":
        return torch.zeros_like(x)
    if kind == "blur":
        return gaussian_blur(x, x.shape[2] / 10)
    raise ValueError(f"unknown baseline {kind!r}; choose one of {', '.join(BASELINES)}, or a grey level in [0, 1]")


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blurs (B, C, H, W) with a Gaussian of `sigma` pixels; borders are replicated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    C = x.shape[1]
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)


def grid(height: int, width: int, n: int) -> Tensor:
    """Returns int64 labels (H, W) of about n equal rectangles, numbered from 0 row by row."""
    rows = max(1, min(height, round(math.sqrt(n * height / width))))
    cols = max(1, min(width, round(n / rows)))
    y, x = torch.arange(height) * rows // height, torch.arange(width) * cols // width
    return (y[:, None] * cols + x).contiguous()


def superpixels(pixels: Tensor, n: int, compactness: float = 0.3, iterations: int = 10) -> Tensor:
    """Segments an image by k-means over colour and position, initialised on a grid.

    Like SLIC (Achanta et al. 2012), but every centre competes for every pixel, and connectivity is not enforced.

    Args:
        pixels: (C, H, W) in [0, 1].
        n: approximate number of superpixels.
        compactness: weight of a distance of one grid cell relative to a full-range difference in one channel.
        iterations: of k-means.

    Returns:
        int64 labels (H, W), consecutive from 0.
    """
    C, H, W = pixels.shape
    cells = grid(H, W, n)
    per_pixel = compactness / math.sqrt(H * W / int(cells.max() + 1))
    y, x = torch.meshgrid(torch.arange(H) * per_pixel, torch.arange(W) * per_pixel, indexing="ij")
    features = torch.cat((pixels.cpu().float(), torch.stack((y, x)))).flatten(1).T.contiguous()  # (H * W, C + 2)
    labels = cells.flatten()
    for _ in range(iterations):
        labels = _renumber(labels)
        counts = labels.bincount().unsqueeze(1)
        centres = torch.zeros(len(counts), C + 2).index_add_(0, labels, features) / counts
        labels = torch.cdist(features, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return _renumber(labels).view(H, W)


def _renumber(labels: Tensor) -> Tensor:
    return labels.unique(return_inverse=True)[1]
