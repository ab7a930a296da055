"""Notes on a picture that shows next to nothing: almost constant, two-valued or saturated.

A header that is read wrongly, a window that misses the data or a sentinel value leaves such pictures, and a classifier
answers them with confidence. Every reader ends here.

Thresholds, on the luminance of a grid of about 128 x 128 pixels, and only for pictures of at least 256:

- almost constant: the middle 99 % of the values span less than 1/64 of the range (4 of 256 levels)
- two-valued: 99.5 % of the values are within 1/512 of the smallest or the largest, and at least 0.5 % of either
- saturated: at least 90 % of the values are white, or 98 % are black (within 1/512)

A coarser grid of about 12 x 12 pixels is looked at first: nearly all pictures pass there, in microseconds.
"""

from __future__ import annotations

import numpy as np

from .image import warning_note

GRID, _COARSE_GRID = 128, 12
_SMALLEST = 256  # pixels; below, a few values are all there can be
_NEAR = 1 / 512
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def picture_notes(pixels: np.ndarray, raw: np.ndarray | None = None) -> list[str]:
    """Returns at most one note on a picture that shows next to nothing.

    Args:
        pixels: `(H, W, C)` in [0, 1] as handed to a model, or uint8 of 255 times that.
        raw: the values that they were made of, if at hand: where these are only two, the picture is a mask, and the
            note is not a warning.
    """
    if pixels.shape[0] * pixels.shape[1] < _SMALLEST or _passes(pixels):
        return []
    values = np.sort(_grid(pixels, GRID))
    last = len(values) - 1
    spread = values[int(last * 0.995)] - values[int(last * 0.005)]
    low, high = float(values[0]), float(values[-1])
    near_low = int(np.searchsorted(values, low + _NEAR, "right"))
    near_high = len(values) - int(np.searchsorted(values, high - _NEAR, "left"))
    share = 0.005 * len(values)
    if high - low > 2 * _NEAR and near_low + near_high >= 0.995 * len(values) and min(near_low, near_high) >= share:
        if raw is not None and _is_mask(raw):
            return ["the image has two values only, a mask"]
        return [
            warning_note("two-valued", f"almost all of the picture is at one of two values, {low:.2g} and {high:.2g}")
        ]
    white = len(values) - int(np.searchsorted(values, 1 - _NEAR, "left"))
    black = int(np.searchsorted(values, _NEAR, "right"))
    if spread < 1 / 64:
        level = float(values[last // 2])
        return [warning_note("almost-constant", f"the picture is almost constant, at {level:.2g} of 0..1")]
    if white >= 0.9 * len(values) or black >= 0.98 * len(values):
        part, colour = (white, "white") if white >= 0.9 * len(values) else (black, "black")
        return [warning_note("saturated", f"{part / len(values):.0%} of the picture is {colour}")]
    return []


def _grid(pixels: np.ndarray, side: int) -> np.ndarray:
    """Luminances of at most about `side` x `side` pixels, flat."""
    height, width, channels = pixels.shape
    grid = _unit(pixels[:: -(-height // side), :: -(-width // side)])
    return (grid @ _LUMINANCE if channels == 3 else grid).ravel()


def _passes(pixels: np.ndarray) -> bool:
    """Returns whether one channel on a coarse grid varies so much that no threshold is near."""
    height, width, channels = pixels.shape
    values = np.sort(_unit(pixels[:: -(-height // _COARSE_GRID), :: -(-width // _COARSE_GRID), channels // 2].ravel()))
    tenth, last = len(values) // 10, len(values) - 1
    if values[last - tenth] - values[tenth] < 1 / 16:
        return False
    first, end = values.searchsorted((values[0] + 2 * _NEAR, values[last] - 2 * _NEAR))
    return bool(end - first > len(values) // 5)


def _unit(values: np.ndarray) -> np.ndarray:
    return np.divide(values, np.float32(255), dtype=np.float32) if values.dtype == np.uint8 else values


def _is_mask(raw: np.ndarray) -> bool:
    if raw.dtype.kind == "b":
        return True
    return bool(((raw == raw.min()) | (raw == raw.max())).all())
