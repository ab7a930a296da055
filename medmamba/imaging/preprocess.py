"""Converts images to model input, and back to images for display."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PreprocessConfig
from .load import MedicalImage

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


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
    pixels = torch.from_numpy(np.ascontiguousarray(image.pixels)).permute(2, 0, 1)  # (C, H, W)
    pixels = resize(adapt_channels(pixels, in_chans).unsqueeze(0), config).squeeze(0)
    return normalise(pixels if device is None else pixels.to(device), config)


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
    inner, margins = placement((pixels.shape[-2], pixels.shape[-1]), config)
    pixels = _interpolate(pixels, inner, config.interpolation)
    return F.pad(pixels, margins) if any(margins) else pixels


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
    pixels = denormalise(tensor.detach().cpu().float(), config)
    pixels = pixels if pixels.shape[0] == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def _channelwise(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Returns (C, 1, 1) on the device of `like` without synchronising, unlike `new_tensor`."""
    return torch.tensor(values, dtype=like.dtype).view(-1, 1, 1).to(like.device, non_blocking=True)


def _interpolate(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    # Antialiasing makes this the same filter as Pillow's and torchvision's resize of images.
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
