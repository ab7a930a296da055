"""Images with masks, made in code: bright discs on noise."""

from pathlib import Path

import numpy as np
from PIL import Image


def disc(size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image (H, W, 3) uint8 and its mask (H, W) bool."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    radius = rng.uniform(0.15, 0.25) * min(size)
    mask = (y - rng.uniform(0.3, 0.7) * height) ** 2 + (x - rng.uniform(0.3, 0.7) * width) ** 2 < radius**2
    pixels = rng.normal(80, 12, (height, width, 3)) + 100 * mask[..., None]
    return pixels.clip(0, 255).astype(np.uint8), mask


def write_pairs(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (48, 40)) -> None:
    """Writes `count` images and masks to folder/images and folder/masks."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        pixels, mask = disc(size, seed)
        Image.fromarray(pixels).save(folder / "images" / f"p{seed:03d}_a.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"p{seed:03d}_a.png")
