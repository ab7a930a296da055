"""Pixel padding: values that fill the area outside the picture (PS3.3 C.7.5.1.1.2 and C.7.6.24).

Padding is no part of the picture: it is left out of the range of values and of any scaling by it, and is drawn black,
also where the picture is inverted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..image import warning_note
from .elements import read_numbers
from .stored import stored_range

if TYPE_CHECKING:
    from pydicom import Dataset

_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
PADDING_KEYWORDS = [prefix + keyword for prefix in ("", "Float", "DoubleFloat") for keyword in _PADDING]


def padding_mask(
    ds: Dataset, words: np.ndarray, stored: np.ndarray, bits: int, signed: bool, notes: list[str]
) -> np.ndarray | None:
    """Returns the mask `(H, W)` of the padding, or None where there is none.

    Args:
        words: the pixels as decoded, before unused bits were cleared.
        stored: the stored values, `(H, W)`, integers or floating point; before any rescale, as the elements are.
    """
    is_float = stored.dtype.kind == "f"
    for prefix in ("Float", "DoubleFloat") if is_float else ("",):
        values = read_padding(ds, f"{prefix}{_PADDING[0]}", is_float)
        if not values:
            continue
        limits = read_padding(ds, f"{prefix}{_PADDING[1]}", is_float)
        ends = [values[0], *limits[:1]]
        if None in ends:
            notes.append(warning_note("padding-unreadable", "pixel padding of the file cannot be read; not applied"))
            return None
        mask = _between(words, stored, [float(end) for end in ends if end is not None], bits, signed)
        if mask is None or not (count := int(np.count_nonzero(mask))):
            return None
        if count == mask.size:
            notes.append(warning_note("padding-everywhere", "every pixel has the padding value; drawn as a picture"))
            return None
        notes.append(f"padding ({count / mask.size:.1%} of the pixels) drawn black")
        return mask
    return None


def read_padding(ds: Dataset, keyword: str, is_float: bool) -> list[float | None]:
    """Returns the values of a padding element; floating-point padding may be NaN or infinite."""
    if not is_float or keyword not in ds:
        return read_numbers(ds, keyword)
    try:
        value = ds[keyword].value
        return [] if value is None else [float(value)]
    except Exception:  # conversion fails in any way
        return [None]


def _between(words: np.ndarray, stored: np.ndarray, ends: list[float], bits: int, signed: bool) -> np.ndarray | None:
    if stored.dtype.kind == "f":
        if any(np.isnan(end) for end in ends):
            return np.isnan(stored)
        # The element has 32 bits where the pixels have: compare in their type.
        with np.errstate(over="ignore"):
            bottom, top = np.array(min(ends), stored.dtype), np.array(max(ends), stored.dtype)
        return stored == bottom if bottom == top else (stored >= bottom) & (stored <= top)
    container = words.dtype.itemsize * 8
    low, high = stored_range(bits, signed)
    whole = [_of_sign(int(end), max(container, 16), signed) for end in ends]
    if len(whole) == 1 and not low <= whole[0] <= high:
        # Written into the whole word, for example -32768 beside values of 12 bits.
        floor, ceiling = stored_range(container, signed)
        return words == np.array(whole[0], words.dtype) if floor <= whole[0] <= ceiling else None
    first, last = max(min(whole), low), min(max(whole), high)
    if first > last:
        return None
    if first == last:
        return stored == np.array(first, stored.dtype)
    return (stored >= np.array(first, stored.dtype)) & (stored <= np.array(last, stored.dtype))


def _of_sign(value: int, bits: int, signed: bool) -> int:
    """Returns a value with the sign convention of the pixels; elements may be read as US or SS."""
    if signed:
        return value - 2**bits if value >= 2 ** (bits - 1) else value
    return value + 2**bits if value < 0 else value
