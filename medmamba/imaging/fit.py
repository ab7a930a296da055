"""From a picture to the size and channels of a network, without PyTorch and in as few bytes as hold the answer."""

from __future__ import annotations

import numpy as np

from ..config import PreprocessConfig
from .image import MedicalImage
from .resample import resample

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def fit(image: MedicalImage, config: PreprocessConfig, in_chans: int = 3) -> np.ndarray:
    """Returns the pixels in the size of the network's input, not yet normalised.

    Args:
        image: pixels (H, W, C), C 1 or 3, or C = in_chans.
        config: size, crop mode and interpolation of the model.
        in_chans: channels the model takes.

    Returns:
        (height, width, c), c = in_chans, or 1 for grey, whose channels are all the same. uint8, 255 for 1, where the
        picture has 8 bits and is not resampled; else float32 in [0, 1].

    Raises:
        ValueError: channels that cannot be adapted.
    """
    levels = image.levels
    pixels = image.pixels if levels is None else levels
    pixels = one_channel(pixels) if pixels.shape[2] == 3 and in_chans == 1 else pixels
    if pixels.shape[2] not in (1, in_chans):
        channels = pixels.shape[2]
        raise ValueError(
            f"the image has {channels} channels and the model takes {in_chans}; give an image with {in_chans}"
        )
    inner, margins = placement((pixels.shape[0], pixels.shape[1]), config)
    if pixels.shape[:2] != inner:
        resized = resample(pixels, inner, config.interpolation)
        if pixels.dtype == np.uint8:
            resized /= np.float32(255)
        pixels = np.clip(resized, 0, 1, out=resized)
    return _place(pixels, margins) if any(margins) else pixels


def one_channel(pixels: np.ndarray) -> np.ndarray:
    """Returns the luminance (H, W, 1), float32 in [0, 1], of colours (H, W, 3) in [0, 1] or of 8 bits."""
    if pixels.dtype == np.uint8:
        pixels = np.divide(pixels, np.float32(255), dtype=np.float32)
    red, green, blue = (pixels[..., i] * np.float32(LUMA[i]) for i in range(3))
    return (red + green + blue)[..., None]


def placement(size: tuple[int, int], config: PreprocessConfig) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Returns where an image of this (height, width) lies in the network's input.

    Returns:
        Its size there, and the margins (left, right, top, bottom), negative where it is cropped.
    """
    height, width = config.input_size
    if config.crop_mode == "squash":
        return (height, width), (0, 0, 0, 0)
    factors = (height / size[0], width / size[1])
    factor = max(factors) if config.crop_mode == "center" else min(factors)
    inner = (max(round(size[0] * factor), 1), max(round(size[1] * factor), 1))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return inner, (left, width - inner[1] - left, top, height - inner[0] - top)


def _place(pixels: np.ndarray, margins: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the pixels with black margins (left, right, top, bottom); negative ones cut."""
    left, right, top, bottom = margins
    height, width = pixels.shape[:2]
    cut = pixels[max(-top, 0) : height + min(bottom, 0), max(-left, 0) : width + min(right, 0)]
    black = [max(margin, 0) for margin in (top, bottom, left, right)]
    return np.pad(cut, (black[:2], black[2:], (0, 0)))
