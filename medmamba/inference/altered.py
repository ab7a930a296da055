"""Slightly altered images: what another device or another export makes of the same kind of image.

Far must be further than these. A set whose images are all equally bright, such as cells from one microscope, would
otherwise call the same cells under a stronger lamp another kind of image.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np

from ..imaging.image import MedicalImage
from ..imaging.resample import resample

Pixels = np.ndarray


def _contrast(pixels: Pixels, factor: float) -> Pixels:
    mean = pixels.mean(dtype=np.float64)
    return (pixels - np.float32(mean)) * np.float32(factor) + np.float32(mean)


def _halved(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    small = resample(pixels, (max(height // 2, 1), max(width // 2, 1)), "bilinear")
    return resample(np.ascontiguousarray(small), (height, width), "bilinear")


def _compressed(pixels: Pixels) -> Pixels:
    from PIL import Image

    levels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=50)
    decoded = np.asarray(Image.open(buffer)).reshape(pixels.shape)
    return decoded.astype(np.float32) / np.float32(255)


def _warmer(pixels: Pixels) -> Pixels:
    grey = pixels.shape[2] == 1 or float(np.ptp(pixels, axis=2).max()) < 0.02  # no lamp gives an X-ray a tint
    return pixels * np.float32(0.9) if grey else pixels * np.array([1.1, 1, 0.9], np.float32)


ALTERATIONS: tuple[Callable[[Pixels], Pixels], ...] = (
    lambda pixels: pixels * np.float32(1.2),
    lambda pixels: pixels * np.float32(0.8),
    lambda pixels: _contrast(pixels, 1.25),
    lambda pixels: _contrast(pixels, 0.75),
    _warmer,
    _halved,
    _compressed,
)


def altered(image: MedicalImage, which: int) -> MedicalImage:
    """Returns an image with one alteration: brightness or contrast by a fifth to a quarter, a warmer light, half the
    size and back, or JPEG of quality 50.

    Args:
        which: any integer of at least 0; consecutive ones take turns.
    """
    found = copy.copy(image)
    pixels = image.pixels
    if pixels.shape[2] in (1, 3):
        pixels = ALTERATIONS[which % len(ALTERATIONS)](pixels)
    found.__dict__["pixels"] = np.clip(pixels, 0, 1).astype(np.float32)
    return found
