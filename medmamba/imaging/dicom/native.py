"""Native pixel data of DICOM: its length against the header, and frames of single bits."""

from __future__ import annotations

import numpy as np

from ..image import ImageError


def check_native_length(actual: int, expected: int, frame_bytes: int, tail: bytes) -> list[str]:
    """Compares the length of native pixel data with what the header asks for; returns notes.

    Args:
        actual: bytes of Pixel Data.
        expected: bytes of all frames.
        frame_bytes: bytes of one frame, rounded up.
        tail: bytes from `expected` on.

    Raises:
        ImageError: too short, or longer by something that is no padding.
    """
    if actual < expected:
        raise ImageError(
            f"the pixel data cannot be decoded: damaged, truncated, or not as the header says ({actual} bytes, where "
            f"Rows, Columns, Bits Allocated, Samples per Pixel and Number of Frames ask for {expected}). Copy or "
            "export it again"
        )
    if actual <= expected + expected % 2:
        return []
    if any(tail):
        what = "Number of Frames" if len(tail) >= frame_bytes else "Rows, Columns and Bits Allocated"
        raise ImageError(
            f"the pixel data holds {actual} bytes, {actual - expected} more than the header asks for: {what} cannot "
            "be right; export the image again"
        )
    return [f"{actual - expected} bytes of padding after the pixel data ignored"]


def single_bits(data: bytes | bytearray, index: int, rows: int, columns: int, swapped: bool) -> np.ndarray:
    """Returns frame `index` of native pixels of one bit, `(rows, columns)` of uint8 0 or 1.

    Frames follow each other without padding, so that one may begin within a byte (PS3.5 8.1.1 and D.4), where
    pydicom 3.0 fails. `swapped`: the bits lie in big-endian words of 16 bits (VR OW of a big-endian file).
    """
    first, count = index * rows * columns, rows * columns
    start, stop = first // 16 * 2, -(-(first + count) // 16) * 2  # whole words
    words = np.frombuffer(bytes(data[start:stop]).ljust(stop - start, b"\0"), ">u2" if swapped else "<u2")
    bits = np.unpackbits(words.astype("<u2").view(np.uint8), bitorder="little")
    return bits[first - 8 * start :][:count].reshape(rows, columns)
