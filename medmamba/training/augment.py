"""Batched augmentation on the device, with separate random parameters for each image.

The parameters are drawn on the CPU from a generator that depends on the seed and the step alone, for the batch of all
processes; each process uses its rows. So the images do not depend on how a run is divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..imaging.preprocess import LUMA
from .recipe import Augment, Recipe

# Changes among which `Augment.pick` chooses per image.
_PICKED = (
    "rotate",
    "shear",
    "translate",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "gamma",
    "blur",
    "noise",
    "erase",
)


@dataclass
class Draw:
    """Random parameters for n images: named arrays of n rows."""

    values: dict[str, np.ndarray]
    _there: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, start: int, stop: int) -> Draw:
        """Returns the parameters of images `start` to `stop`."""
        return Draw({name: value[start:stop] for name, value in self.values.items()})

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Returns an array as float32 on the device; the first call moves all arrays in one copy."""
        if device not in self._there:
            flat = {key: value.reshape(len(value), -1) for key, value in self.values.items()}
            packed = np.concatenate(list(flat.values()), 1, dtype=np.float32)
            moved = torch.from_numpy(packed).to(device, non_blocking=True)
            columns = moved.split([value.shape[1] for value in flat.values()], 1)
            shapes = [value.shape for value in self.values.values()]
            self._there[device] = {k: c.reshape(s) for k, c, s in zip(flat, columns, shapes, strict=True)}
        return self._there[device][name]


def draw(recipe: Recipe, count: int, rng: np.random.Generator) -> Draw:
    """Draws the parameters for augmenting and mixing `count` images."""
    a = recipe.augment

    def either_side(limit: float) -> np.ndarray:
        return rng.uniform(-limit, limit, count)

    area = rng.uniform(*a.crop_area, count)
    ratio = np.exp(rng.uniform(math.log(a.crop_ratio[0]), math.log(a.crop_ratio[1]), count))
    values = {
        "hflip": rng.random(count) < a.hflip,
        "vflip": rng.random(count) < a.vflip,
        "turns": rng.integers(1, 4, count) * (rng.random(count) < a.rot90),
        "crop_w": np.minimum(np.sqrt(area * ratio), 1),
        "crop_h": np.minimum(np.sqrt(area / ratio), 1),
        "crop_x": either_side(1),
        "crop_y": either_side(1),
        "rotate": np.deg2rad(either_side(a.rotate)),
        "shear": np.tan(np.deg2rad(rng.uniform(-a.shear, a.shear, (count, 2)))),
        "translate": rng.uniform(-a.translate, a.translate, (count, 2)),
        "brightness": 1 + either_side(a.brightness),
        "contrast": 1 + either_side(a.contrast),
        "saturation": 1 + either_side(a.saturation),
        "hue": 2 * math.pi * either_side(a.hue),
        "gamma": np.exp(either_side(a.gamma)),
        "blur": rng.uniform(0.1, 1.0, count) * (rng.random(count) < a.blur),
        "noise": rng.uniform(0, a.noise, count),
        "noise_seed": rng.integers(2**31, size=count),
        "erase": rng.uniform(0.02, 0.2, count) * (rng.random(count) < a.erase),
        "erase_box": rng.random((count, 3)),  # ratio, x, y
    }
    active = [name for name in _PICKED if getattr(a, name) > 0]
    if 0 < a.pick < len(active):
        rank = rng.random((count, len(active))).argsort(1).argsort(1)
        for column, name in enumerate(active):
            neutral = 1.0 if name in ("brightness", "contrast", "saturation", "gamma") else 0.0
            dropped = rank[:, column] >= a.pick
            values[name][dropped] = neutral
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind) > 0]
    mixed = np.zeros(count)  # 0: no mixing, 1: mixup, 2: cutmix
    share = np.ones(count)  # weight of the image itself
    if kinds:
        chosen = rng.integers(len(kinds), size=count)
        for i, kind in enumerate(kinds):
            alpha = getattr(recipe, kind)
            share = np.where(chosen == i, rng.beta(alpha, alpha, count), share)
            mixed = np.where(chosen == i, 1 + ("mixup", "cutmix").index(kind), mixed)
        off = rng.random(count) >= recipe.mix_prob
        share[off], mixed[off] = 1, 0
    values |= {"mixed": mixed, "share": share, "mix_box": rng.random((count, 2))}
    return Draw(values)


def augment(images: Tensor, draw: Draw, a: Augment, size: tuple[int, int]) -> Tensor:
    """Augments images (B, C, H, W) in [0, 1]; returns (B, C, *size) in [0, 1]."""
    device, n = images.device, len(images)

    def numbers(name: str) -> Tensor:
        return draw.tensor(name, device)

    if moves(a):
        images = _sample(images, affine(draw, size[0] / size[1], device), size)
    elif tuple(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    if a.brightness or a.contrast or a.saturation or a.hue:
        matrix, offset = colour(images, *map(numbers, ("brightness", "contrast", "saturation", "hue")))
        images = _mix_channels(images, matrix, offset).clamp(0, 1)
    if a.gamma:
        images = images.clamp(min=1e-4) ** numbers("gamma").view(n, 1, 1, 1)
    if a.blur:
        chosen = np.flatnonzero(draw.values["blur"])
        if len(chosen):
            sigma = draw.values["blur"][chosen] * 0.01 * min(size)
            index = torch.from_numpy(chosen).to(device, non_blocking=True)
            images = images.index_copy(0, index, gaussian_blur(images[index], sigma))
    if a.noise:
        seeds = torch.from_numpy(draw.values["noise_seed"]).to(device, non_blocking=True)
        images = (images + noise(seeds, images.shape[1:]) * numbers("noise").view(n, 1, 1, 1)).clamp(0, 1)
    if a.erase:
        box = numbers("erase_box")
        ratio = torch.exp((box[:, 0] * 2 - 1) * math.log(3))
        area = numbers("erase")
        inside = rectangle(
            (area / ratio).sqrt(), (area * ratio).sqrt(), box[:, 2], box[:, 1], images.shape[2:]
        )  # (B, 1, H, W)
        images = torch.where(inside, images.mean((2, 3), keepdim=True), images)
    return images


def augment_masks(masks: Tensor, draw: Draw, a: Augment, size: tuple[int, int]) -> Tensor:
    """Moves masks (B, M, H, W) uint8 as `augment` moves their images; returns (B, M, *size) of the same values."""
    if moves(a):
        return _sample(masks.float(), affine(draw, size[0] / size[1], masks.device), size, "nearest").to(torch.uint8)
    if tuple(masks.shape[2:]) != size:
        return F.interpolate(masks.float(), size, mode="nearest-exact").to(torch.uint8)
    return masks


def moves(a: Augment) -> bool:
    """Returns whether images are moved, turned, sheared, reflected or cropped."""
    moved = a.hflip or a.vflip or a.rot90 or a.rotate or a.shear or a.translate
    return bool(moved) or a.crop_area != (1, 1) or a.crop_ratio != (1, 1)


def affine(draw: Draw, aspect: float, device: torch.device) -> Tensor:
    """Returns matrices (B, 2, 3) that map output to input coordinates, both in [-1, 1]. `aspect` is height / width."""
    v = draw.values
    n = len(v["hflip"])

    def diagonal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack((x, np.zeros(n), np.zeros(n), y), 1).reshape(n, 2, 2)

    angle = v["rotate"] + v["turns"] * (math.pi / 2)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack((cos, -sin * aspect, sin / aspect, cos), 1).reshape(n, 2, 2)
    shear = np.stack((np.ones(n), v["shear"][:, 0], v["shear"][:, 1], np.ones(n)), 1).reshape(n, 2, 2)
    flip = diagonal(1 - 2.0 * v["hflip"], 1 - 2.0 * v["vflip"])
    crop = diagonal(v["crop_w"], v["crop_h"])
    linear = crop @ rotation @ shear @ flip
    # The crop lies anywhere inside the image; the translation is added.
    place = np.stack(((1 - v["crop_w"]) * v["crop_x"], (1 - v["crop_h"]) * v["crop_y"]), 1) + 2 * v["translate"]
    theta = np.concatenate((linear, place[:, :, None]), 2).astype(np.float32)
    return torch.from_numpy(theta).to(device, non_blocking=True)


def colour(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the four changes as one matrix (B, C, C) and one offset (B, C) over the channels."""
    n, channels = images.shape[:2]
    mean = images.mean((2, 3))  # (B, C)
    gain = (brightness * contrast).view(n, 1, 1)
    lift = brightness * (1 - contrast)  # times the mean grey, the fixed point of contrast
    if channels != 3:
        eye = torch.eye(channels, device=images.device)
        return gain * eye, (lift * mean.mean(1)).view(n, 1).expand(n, channels)
    luma = _constant(LUMA, mean)
    grey = luma.expand(3, 3)  # maps every channel to the luma
    s = saturation.view(n, 1, 1)
    saturate = s * torch.eye(3, device=images.device) + (1 - s) * grey
    # Rotation about the grey axis (Rodrigues), which leaves grey unchanged.
    cos, sin = hue.cos().view(n, 1, 1), hue.sin().view(n, 1, 1)
    axis = _constant([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], mean) / math.sqrt(3)
    turn = cos * torch.eye(3, device=images.device) + sin * axis + (1 - cos) / 3
    offset = (lift * (mean @ luma)).view(n, 1).expand(n, 3)  # grey, which saturation and hue leave unchanged
    return (turn @ saturate) * gain, offset


def gaussian_blur(images: Tensor, sigma: np.ndarray) -> Tensor:
    """Blurs images (B, C, H, W), each with its own sigma in pixels."""
    n, channels, height, width = images.shape
    radius = max(min(math.ceil(3 * float(sigma.max())), min(height, width) - 1), 1)
    x = torch.arange(-radius, radius + 1, device=images.device)
    widths = torch.from_numpy(sigma.astype(np.float32)).to(images.device, non_blocking=True)
    kernel = torch.exp(-0.5 * (x / widths.view(n, 1).clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B * C, 2 radius + 1)
    flat = F.pad(images.reshape(1, n * channels, height, width), (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return F.conv2d(flat, kernel[:, None, :, None], groups=n * channels).view(n, channels, height, width)


def rectangle(height: Tensor, width: Tensor, y: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns masks (B, 1, H, W), True inside a rectangle.

    Height, width, and the position y, x within the free space are in [0, 1].
    """
    rows = (torch.arange(size[0], device=y.device) + 0.5) / size[0]
    columns = (torch.arange(size[1], device=x.device) + 0.5) / size[1]
    height, width = height.clamp(max=1), width.clamp(max=1)
    top, left = ((1 - height) * y).view(-1, 1), ((1 - width) * x).view(-1, 1)
    in_rows = (rows > top) & (rows < top + height.view(-1, 1))
    in_columns = (columns > left) & (columns < left + width.view(-1, 1))
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


def mix(images: Tensor, targets: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Applies mixup and cutmix to neighbours, images 2i and 2i + 1 of a shuffled batch.

    Pairs stay together in any division of a batch into even parts, so the result does not depend on it.

    Args:
        images: (B, C, H, W).
        targets: (B, K) probabilities.
        draw: parameters from the function `draw`.
    """
    mixed = draw.values["mixed"]
    n = len(images)
    if not mixed.any():
        return images, targets
    order = np.arange(n) ^ 1
    order[order >= n] = n - 1  # the last image of an odd batch is mixed with itself
    partner = torch.from_numpy(order).to(images.device, non_blocking=True)
    share = draw.tensor("share", images.device)
    cut = draw.tensor("mixed", images.device) == 2
    box, side = draw.tensor("mix_box", images.device), (1 - share).sqrt()
    others = images[partner]
    inside = rectangle(side, side, box[:, 0], box[:, 1], images.shape[2:])  # (B, 1, H, W)
    # The fraction that the rectangle covers after rounding to pixels.
    share = torch.where(cut, 1 - inside.float().mean((1, 2, 3)), share)
    blended = torch.lerp(others, images, share.view(n, 1, 1, 1))
    pasted = torch.where(inside, others, images)
    images = torch.where(cut.view(n, 1, 1, 1), pasted, blended)
    return images, torch.lerp(targets[partner], targets, share.view(n, 1))


def noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns standard normal noise (B, *shape) from one int64 seed per image (B,), identical on every device.

    Hashes seed and position (two rounds of "lowbias32" by Chris Wellons), then applies the Box-Muller transform.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    place = torch.arange(2 * half, device=seeds.device)
    bits = _hash(place ^ _hash(seeds).view(-1, 1))  # (B, 2 * half), 32 bits in int64
    uniform = ((bits >> 8).float() + 0.5) / 2**24  # (0, 1)
    radius = (-2 * uniform[:, :half].log()).sqrt()
    angle = 2 * math.pi * uniform[:, half:]
    normal = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)
    return normal[:, :count].view(-1, *shape)


def _hash(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _constant(values: Sequence, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _sample(images: Tensor, theta: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    grid = F.affine_grid(theta, [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _mix_channels(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    flat = torch.baddbmm(offset.unsqueeze(2), matrix, images.flatten(2))  # (B, C, H * W)
    return flat.view(n, channels, height, width)
