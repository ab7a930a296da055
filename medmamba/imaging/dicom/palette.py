"""Palettes of DICOM images: palette colour (PS3.3 C.7.6.3.1.5), segmented (C.7.9.2) and supplemental (C.7.6.19)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..image import warning_note
from .elements import read_value
from .tables import TableError, entry_bits, first_mapped, read_descriptor, read_entries

if TYPE_CHECKING:
    from pydicom import Dataset

COLORS = ("Red", "Green", "Blue")


class Palette:
    """Three tables with one scale.

    Attributes:
        first: first stored value that is mapped, the smallest of the three tables.
        tables: first value and RGB entries in [0, 1] of each channel.
    """

    def __init__(self, ds: Dataset, allowed: tuple[float, float], notes: list[str], *, big_endian: bool) -> None:
        """Reads the palette of `ds` for stored values in the range `allowed`; notes are appended.

        Raises:
            TableError: a table is absent, damaged or cut short.
        """
        tables, firsts, narrow, declared = [], [], [], []
        for color in COLORS:
            descriptor = read_descriptor(ds, f"{color}PaletteColorLookupTableDescriptor")
            data = read_value(ds, f"{color}PaletteColorLookupTableData")
            if data is not None:
                words = ds[f"{color}PaletteColorLookupTableData"].VR != "OB"
                table, bytes_only = read_entries(data, descriptor.entries, big_endian=big_endian, words=words)
            else:
                segments = read_value(ds, f"Segmented{color}PaletteColorLookupTableData")
                if segments is None:
                    raise TableError(f"the DICOM header has no {color.lower()} palette; export the image as RGB")
                table, bytes_only = expand_segments(segments, descriptor.entries, descriptor.bits, big_endian)
            tables.append(table)
            narrow.append(bytes_only)
            firsts.append(first_mapped(descriptor.first, descriptor.entries, allowed))
            declared.append(descriptor.bits)
        largest = max(int(table.max()) for table in tables)
        if all(narrow) or (largest < 2**8 and max(declared) == 8):
            bits = 8
        elif largest >= 2**8 and max(declared) == 8:
            bits = 16  # some writers declare 8 bits and spread the entries over 16
            notes.append(warning_note("table-bits", "the palette declares 8 bits, its entries have 16; taken as 16"))
        else:
            bits = entry_bits(max(declared), largest, notes, "palette")
        if bits > 8:  # a byte b stands for b / 255 beside tables of words
            tables = [
                table * ((2**bits - 1) / 255) if only else table for table, only in zip(tables, narrow, strict=True)
            ]
        self.first = min(firsts)
        self.tables = [(first, table / (2**bits - 1)) for first, table in zip(firsts, tables, strict=True)]

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Returns RGB `(..., 3)` in [0, 1] of integer stored values; those outside take the first or last entry."""
        index = stored.astype(np.int64)
        return np.stack([table[np.clip(index - first, 0, len(table) - 1)] for first, table in self.tables], axis=-1)


def has_palette(ds: Dataset) -> bool:
    """Returns whether a palette is declared."""
    return f"{COLORS[0]}PaletteColorLookupTableDescriptor" in ds


def pixel_presentation(ds: Dataset, groups: Sequence[Dataset]) -> str:
    """Returns PixelPresentation of a frame, from its functional groups (frame type macros) or the image; often ""."""
    for group in groups:
        for element in group:
            for item in element.value or [] if element.VR == "SQ" else []:
                if value := str(read_value(item, "PixelPresentation") or ""):
                    return value.upper()
    return str(read_value(ds, "PixelPresentation") or "").upper()


def expand_segments(data: Any, entries: int, bits: int, big_endian: bool) -> tuple[np.ndarray, bool]:
    """Returns the entries of a segmented table, and whether they are bytes.

    Segments have the width that the descriptor declares. Where that does not give the declared number of entries, the
    other width is tried, since writers confuse them.

    Raises:
        TableError: neither width does.
    """
    if not isinstance(data, bytes):
        data = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype("<u2").tobytes()
        big_endian = False
    wide = np.frombuffer(data[: len(data) // 2 * 2], ">u2" if big_endian else "<u2").astype(np.int64)
    narrow = np.frombuffer(data, np.uint8).astype(np.int64)
    if big_endian and len(narrow) % 2 == 0:
        narrow = narrow.reshape(-1, 2)[:, ::-1].ravel()
    choices = [(narrow, True), (wide, False)] if bits <= 8 else [(wide, False), (narrow, True)]
    for codes, bytes_only in choices:
        expanded = _expand(codes.tolist(), entries, 1 if bytes_only else 2)
        if expanded is not None:
            return np.array(expanded, np.int64), bytes_only
    raise TableError("a segmented palette of the DICOM header is damaged; export the image as RGB")


def _expand(codes: list[int], entries: int, width: int) -> list[int] | None:
    """Returns the entries of all segments, or None if the codes do not yield exactly `entries`."""
    out: list[int] = []
    position = 0
    while position + 1 < len(codes) and len(out) < entries:
        opcode, count = codes[position], codes[position + 1]
        if opcode == 2:  # indirect: `count` segments again, at a byte offset of 32 bits, low part first
            parts = codes[position + 2 : position + 2 + (4 if width == 1 else 2)]
            offset = sum(part << (8 * width * i) for i, part in enumerate(parts)) // width
            position += 2 + len(parts)
            for _ in range(count):
                step = _segment(codes, offset, out, entries)
                if step is None:
                    return None
                offset += step
            continue
        step = _segment(codes, position, out, entries)
        if step is None:
            return None
        position += step
    return out if len(out) == entries else None


def _segment(codes: list[int], position: int, out: list[int], entries: int) -> int | None:
    """Appends one discrete or linear segment; returns its length in codes, None where it is not possible."""
    if position + 2 >= len(codes) or codes[position] not in (0, 1):
        return None
    opcode, count = codes[position], codes[position + 1]
    if count == 0 or len(out) + count > entries:
        return None
    if opcode == 0:
        values = codes[position + 2 : position + 2 + count]
        if len(values) < count:
            return None
        out.extend(values)
        return 2 + count
    if not out:
        return None
    start, end = out[-1], codes[position + 2]
    out.extend(round(start + (end - start) * (i + 1) / count) for i in range(count))
    return 3
