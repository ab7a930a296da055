"""Converts images to model input, and back to images for display.

PyTorch is imported where it is used: processes that only read images do without it, and start in a tenth of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..config import PreprocessConfig
from .fit import LUMA, fit, placement
from .image import MedicalImage

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def preprocess(
    image: MedicalImage, config: PreprocessConfig, in_chans: int = 3, device: torch.device | None = None
) -> Tensor:
    """Converts an image to the input of a model: adapts channels, resizes, normalises.

    Args:
        image: pixels (H, W, C) in [0, 1], C 1 or 3, or C = in_chans.
        config: size, crop mode, interpolation, mean and std of the model.
        in_chans: channels the model takes. Grey is repeated for 3; colour becomes luma for 1.
        device: where the result is wanted. Resizing is always done on the CPU, so that it gives the same everywhere.

    Returns:
        (in_chans, height, width) float32, normalised.

    Raises:
        ValueError: channels that cannot be adapted.
    """
    pixels = tensor_of(fit(image, config, in_chans)).permute(2, 0, 1).expand(in_chans, -1, -1)
    return normalise((pixels if device is None else pixels.to(device)).contiguous(), config)


def tensor_of(fitted: np.ndarray) -> Tensor:
    """Returns what `fit` returned, or a stack of that, as float32 in [0, 1]."""
    import torch

    fitted = np.ascontiguousarray(fitted)
    pixels = torch.from_numpy(fitted if fitted.flags.writeable else fitted.copy())  # PyTorch would warn
    return pixels.float().div_(255) if fitted.dtype == np.uint8 else pixels


def adapt_channels(pixels: Tensor, in_chans: int) -> Tensor:
    """Converts (..., C, H, W) to (..., in_chans, H, W)."""
    channels = pixels.shape[-3]
    if channels == in_chans:
        return pixels
    if channels == 1:
        return pixels.expand(*pixels.shape[:-3], in_chans, *pixels.shape[-2:])
    if channels == 3 and in_chans == 1:
        return (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(-3, keepdim=True)
    raise ValueError(f"the image has {channels} channels and the model takes {in_chans}; give an image with {in_chans}")


def resize(pixels: Tensor, config: PreprocessConfig) -> Tensor:
    """Resizes (B, C, H, W) in [0, 1] to (B, C, *config.input_size) by `config.crop_mode`; stays in [0, 1]."""
    import torch.nn.functional as F

    inner, margins = placement((pixels.shape[-2], pixels.shape[-1]), config)
    pixels = _interpolate(pixels, inner, config.interpolation)
    return F.pad(pixels, margins) if any(margins) else pixels


def normalise(pixels: Tensor, config: PreprocessConfig) -> Tensor:
    """Normalises pixels in [0, 1] by the model's mean and std."""
    mean, std = _channelwise(config.mean, pixels), _channelwise(config.std, pixels)
    return (pixels - mean) / std


def denormalise(tensor: Tensor, config: PreprocessConfig) -> Tensor:
    """Inverts `normalise`: returns pixels in [0, 1] as the model sees them."""
    mean, std = _channelwise(config.mean, tensor), _channelwise(config.std, tensor)
    return (tensor * std + mean).clamp(0, 1)


def to_display(tensor: Tensor, config: PreprocessConfig) -> np.ndarray:
    """Converts network input (in_chans, H, W) to uint8 (H, W, 3), the image as the model sees it."""
    import torch

    pixels = denormalise(tensor.detach().cpu().float(), config)
    pixels = pixels if pixels.shape[0] == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def _channelwise(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Returns (C, 1, 1) on the device of `like` without synchronising, unlike `new_tensor`."""
    import torch

    return torch.tensor(values, dtype=like.dtype).view(-1, 1, 1).to(like.device, non_blocking=True)


def _interpolate(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    import torch.nn.functional as F

    if tuple(pixels.shape[-2:]) == size:
        return pixels
    # Antialiasing makes this the same filter as Pillow's and torchvision's resize of images.
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
