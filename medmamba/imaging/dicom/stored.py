"""Stored pixel values from decoded words: unused bits, HighBit and the sign (PS3.5 8.1.1)."""

from __future__ import annotations

import numpy as np

from ..image import ImageError, warning_note

# Share of neighbours across a carry that must be closer with the upper bits than without, to call them part of the
# values. An overlay or marker in these bits gives about 0, noise about 1/8, a picture that is cut off nearly 1.
_CONTINUATION = 0.25


def stored_range(bits: int, signed: bool) -> tuple[int, int]:
    """Returns the smallest and largest value of `bits` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def stored_values(
    words: np.ndarray, bits: int, high_bit: int | None, signed: bool, notes: list[str], *, compressed: bool = False
) -> np.ndarray:
    """Returns the values of `bits` bits in the decoded words, in the type of the words.

    The standard lets a reader assume nothing about the other bits of a word, so they are cleared (for signed values,
    filled with the sign). Two contradictions are looked for in the words themselves:

    - HighBit is not BitsStored - 1: the words are shifted down, unless they lie in the lower bits all the same.
    - The values go on above BitsStored, that is, clearing would tear neighbouring pixels apart.

    Args:
        words: decoded pixels `(H, W)` or `(H, W, C)`, an integer type.
        notes: what was done is appended.
        compressed: whether the words come out of a codestream.

    Raises:
        ImageError: BitsStored is impossible, or the values need more bits than it declares.
    """
    container = words.dtype.itemsize * 8
    if not 1 <= bits <= container:
        raise ImageError(
            f"BitsStored (0028,0101) of the DICOM header is {bits}, but the pixels have {container} bits; "
            "export the image again"
        )
    low, high = stored_range(bits, signed)
    shift = 0
    if high_bit is not None and high_bit != bits - 1:
        shift = _shift(words, bits, high_bit, notes)
    if not shift and (bits == container or (low <= words.min() and words.max() <= high)):
        return words
    unsigned = words.view(f"u{words.dtype.itemsize}") >> np.array(shift, f"u{words.dtype.itemsize}")
    values = unsigned & np.array(2**bits - 1, unsigned.dtype)
    if signed:
        spare = container - bits
        values = (values << np.array(spare, values.dtype)).view(words.dtype) >> np.array(spare, words.dtype)
    if not shift and container < 64 and _goes_on(words.astype(np.int64), values.astype(np.int64), bits):
        where = "codestream" if compressed else "pixel data"
        raise ImageError(
            f"BitsStored (0028,0101) of the DICOM header is {bits}, but the values in the {where} need more bits; "
            "export the image again with the right BitsStored"
        )
    notes.append(f"bits outside the {bits} stored ones ignored" if not shift else f"values shifted down {shift} bits")
    return values


def _shift(words: np.ndarray, bits: int, high_bit: int, notes: list[str]) -> int:
    container = words.dtype.itemsize * 8
    shift = high_bit + 1 - bits
    used = int(np.bitwise_or.reduce(words.view(f"u{words.dtype.itemsize}"), axis=None))
    if not 0 < shift <= container - bits:
        why = f"is impossible for {bits} bits stored in {container}"
    elif used % 2**shift and used < 2**bits:
        why = f"says that the lowest {shift} bits are unused, but they hold the values"
    else:
        return shift
    notes.append(warning_note("high-bit", f"HighBit (0028,0102) {why}; taken as {bits - 1}"))
    return 0


def _goes_on(words: np.ndarray, values: np.ndarray, bits: int) -> bool:
    """Returns whether the bits above BitsStored continue the values, judged by neighbours that differ in them."""
    carry = (words - values) >> bits
    close = changing = 0
    for axis in (0, 1):
        changes = np.diff(carry, axis=axis) != 0
        changing += int(changes.sum())
        close += int((np.abs(np.diff(words, axis=axis)[changes]) < 2 ** (bits - 1)).sum())
    return changing > 0 and close / changing > _CONTINUATION
