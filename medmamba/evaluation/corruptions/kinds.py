"""Image corruptions as MedMNIST-C defines them (arXiv:2406.17536), on uint8 images.

Written from the definitions, for NumPy, Pillow and PyTorch only: the published package needs OpenCV and ImageMagick.
The tests compare every kind with it. Two kinds draw other shapes of the same size and number: `stain_deposit`, whose
published marks are scanned pictures, and `characters`, whose published font is OpenCV's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

Picture = NDArray[np.uint8]
Corruption = Callable[[Picture, Any, np.random.Generator], Picture]


def corrupt(kind: str, image: Picture, parameter: Any, rng: np.random.Generator) -> Picture:
    """Returns a corrupted copy of an image.

    Args:
        kind: a key of `KINDS`.
        image: uint8 `(H, W, 3)`.
        parameter: severity, in the unit of the kind; see `published.PUBLISHED`.
        rng: source of all randomness.

    Raises:
        ValueError: unknown kind, or not an RGB image.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(KINDS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"corruptions need uint8 images (H, W, 3), got {image.dtype} {image.shape}")
    return KINDS[kind](image, parameter, rng)


def _gaussian_noise(image: Picture, sigma: float, rng: np.random.Generator) -> Picture:
    return _stored(image / 255 + rng.normal(scale=sigma, size=image.shape))


def _speckle_noise(image: Picture, sigma: float, rng: np.random.Generator) -> Picture:
    unit = image / 255
    return _stored(unit + unit * rng.normal(scale=sigma, size=image.shape))


def _shot_noise(image: Picture, photons: float, rng: np.random.Generator) -> Picture:
    return _stored(rng.poisson(image / 255 * photons) / photons)


def _impulse_noise(image: Picture, share: float, rng: np.random.Generator) -> Picture:
    hit, salt = rng.random(image.shape) <= share, rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(salt, 255, 0), image).astype(np.uint8)


def _pixelate(image: Picture, factor: float, _: np.random.Generator) -> Picture:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(image: Picture, quality: int, _: np.random.Generator) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def _brightness(image: Picture, factor: float, _: np.random.Generator) -> Picture:
    return np.array(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


def _contrast(image: Picture, factor: float, _: np.random.Generator) -> Picture:
    return np.array(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


def _gamma(image: Picture, gamma: float, _: np.random.Generator) -> Picture:
    table = (255.999 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[image]


def _saturate(image: Picture, added: float, _: np.random.Generator) -> Picture:
    """Adds to the saturation of HSV, whose hue and value stay: channels move away from the largest one."""
    unit = image / 255
    value = unit.max(axis=2, keepdims=True)
    spread = value - unit.min(axis=2, keepdims=True)
    old = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    new = np.clip(old + added, 0, 1)
    below = np.divide(
        value - unit, spread, out=np.zeros_like(unit), where=spread > 0
    )  # 0 at the largest, 1 at the least
    # A grey pixel has hue 0 (red) by convention.
    below = np.where(spread > 0, below, np.array([0.0, 1.0, 1.0]))
    return _stored(value * (1 - new * below))


def _gaussian_blur(image: Picture, size: int, _: np.random.Generator) -> Picture:
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # the rule of torchvision and OpenCV
    x = np.arange(size) - (size - 1) / 2
    row = np.exp(-0.5 * (x / sigma) ** 2)
    kernel = np.outer(row, row) / row.sum() ** 2
    return np.rint(_filtered(image / 255, kernel) * 255).clip(0, 255).astype(np.uint8)


def _defocus_blur(image: Picture, parameter: tuple[float, float], _: np.random.Generator) -> Picture:
    """Averages over a disk whose rim is smoothed by a Gaussian of 3x3 (5x5 above a radius of 8)."""
    radius, sigma = parameter
    reach = 8 if radius <= 8 else int(radius)
    x = np.arange(-reach, reach + 1)
    disk = (x[:, None] ** 2 + x**2 <= radius**2).astype(float)
    rim = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    row = np.exp(-0.5 * (rim / sigma) ** 2)
    return _stored(
        _filtered(image / 255, _filtered(disk[..., None], np.outer(row, row) / row.sum() ** 2)[..., 0] / disk.sum())
    )


def _motion_blur(image: Picture, parameter: tuple[int, float], rng: np.random.Generator) -> Picture:
    """Smears along a line in a random direction within 45 degrees of the rows, as ImageMagick's `-motion-blur`."""
    radius, sigma = parameter
    angle = math.radians(rng.uniform(-45, 45))
    width = 2 * math.ceil(radius) + 1
    weights = np.exp(-0.5 * (np.arange(width) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image.astype(np.float64), ((width, width), (width, width), (0, 0)), mode="edge")
    height, across = image.shape[:2]
    total = np.zeros(image.shape)
    for i, weight in enumerate(weights):
        dx, dy = math.ceil(i * math.cos(angle) - 0.5), math.ceil(i * math.sin(angle) - 0.5)
        total += weight * padded[width + dy : width + dy + height, width + dx : width + dx + across]
    return (total + 1e-6).astype(np.uint8)  # rounded down


def _zoom_blur(image: Picture, parameter: tuple[float, float], _: np.random.Generator) -> Picture:
    """Averages the image and enlargements of its middle, from 1 to a largest factor."""
    factors = np.arange(1, *parameter)
    unit = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    side = unit.shape[1]
    total = unit.clone()
    for factor in factors:
        inner = math.ceil(side / factor)
        top = (side - inner) // 2
        size = [round(inner * factor)] * 2
        part = unit[None, :, top : top + inner, top : top + inner]
        large = F.interpolate(part, size, mode="bilinear", align_corners=True)[0]
        trim = (large.shape[1] - side) // 2
        total += large[:, trim : trim + side, trim : trim + side]
    return _stored((total / (len(factors) + 1)).permute(1, 2, 0).numpy())


def _stain_deposit(image: Picture, parameter: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Blackens one to so many irregular marks, each about 0.6 of a square of so many pixels."""
    most, side = parameter
    found = image.copy()
    for _ in range(int(rng.integers(1, most + 1))):
        top, left = (int(rng.integers(10, length - side - 9)) for length in image.shape[:2])
        # A few overlapping disks make an outline like that of a drop.
        y, x = np.mgrid[:side, :side] / (side - 1)
        mark = np.zeros((side, side), bool)
        for radius in rng.uniform(0.2, 0.4, 4):
            cy, cx = rng.uniform(radius, 1 - radius, 2)
            mark |= (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        found[top : top + side, left : left + side][mark] = 0
    return found


def _bubble(image: Picture, parameter: tuple[int, int], rng: np.random.Generator) -> Picture:
    """Lays seven to so many pale, half transparent disks with a brighter rim of 2 pixels over the image."""
    largest, most = parameter
    height, width = image.shape[:2]
    layer = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    draw = ImageDraw.Draw(layer)
    for _ in range(int(rng.integers(7, most + 1))):
        radius = int(rng.integers(3, largest + 1))
        x, y = int(rng.integers(radius, width - radius + 1)), int(rng.integers(radius, height - radius + 1))
        for reach, alpha in ((radius + 2, 130), (radius, 100)):
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=(255, 255, 255, alpha))
    found = Image.fromarray(image)
    found.paste(layer, (0, 0), layer)
    return np.array(found)


def _black_corner(image: Picture, factor: float, _: np.random.Generator) -> Picture:
    """Blackens all outside a circle around the centre, as the tube of a dermatoscope does."""
    height, width = image.shape[:2]
    cy, cx = height // 2, width // 2
    radius = int(min(cy, cx, height - cy, width - cx) * factor)
    y, x = np.mgrid[:height, :width]
    return np.where(((y - cy) ** 2 + (x - cx) ** 2 <= radius**2)[..., None], image, 0).astype(np.uint8)


def _characters(image: Picture, parameter: tuple[int, int, float], rng: np.random.Generator) -> Picture:
    """Writes one to so many short words in random colours, 4 to 6 pixels high."""
    most_words, most_letters, largest = parameter
    found = Image.fromarray(image)
    draw = ImageDraw.Draw(found)
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(1, most_words + 1))):
        letters = int(rng.integers(3, most_letters + 1))
        scale = rng.integers(14, round(largest * 100) + 1) / 100
        word = "".join(chr(ord("a") + int(i)) for i in rng.integers(0, 26, letters))
        place = (int(rng.integers(10, width - 8 * letters)), int(rng.integers(10, height - 10)))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        # OpenCV's letters are 22 pixels high at scale 1, with the base line at `place`; Pillow's size is the em.
        draw.text(place, word, fill=colour, font=ImageFont.load_default(30 * scale), anchor="ls")
    return np.array(found)


def _stored(unit: NDArray[Any]) -> Picture:
    """Returns values in [0, 1] as bytes, rounded down as in the published code."""
    return (np.clip(unit, 0, 1) * 255).astype(np.uint8)


def _filtered(image: NDArray[Any], kernel: NDArray[Any]) -> NDArray[Any]:
    """Correlates each channel of `(H, W, C)` with a kernel, mirrored at the borders without repeating the edge."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[:, None]
    height, width = kernel.shape
    planes = F.pad(planes, (width // 2, width // 2, height // 2, height // 2), mode="reflect")
    weight = torch.from_numpy(np.ascontiguousarray(kernel, dtype=np.float32))[None, None]
    return F.conv2d(planes, weight)[:, 0].permute(1, 2, 0).numpy()


KINDS: dict[str, Corruption] = {
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "gaussian_noise": _gaussian_noise,
    "speckle_noise": _speckle_noise,
    "impulse_noise": _impulse_noise,
    "shot_noise": _shot_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "gaussian_blur": _gaussian_blur,
    "brightness_up": _brightness,
    "brightness_down": _brightness,
    "contrast_up": _contrast,
    "contrast_down": _contrast,
    "saturate": _saturate,
    "stain_deposit": _stain_deposit,
    "bubble": _bubble,
    "black_corner": _black_corner,
    "characters": _characters,
    "gamma_corr_up": _gamma,
    "gamma_corr_down": _gamma,
}
"""Corruptions by name."""
