"""Lookup tables of the DICOM header: modality and VOI LUTs (PS3.3 C.11.1 and C.11.2), and their raw entries.

Descriptors often contradict their data. What they declare is compared with the entries, and where it cannot be meant,
the entries decide and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..image import ImageError, warning_note
from .elements import read_numbers, read_value

if TYPE_CHECKING:
    from pydicom import Dataset


class TableError(ImageError):
    """A lookup table that cannot be read. An optional one is left out, a needed one refuses the image."""


@dataclass(frozen=True)
class Descriptor:
    """Number of entries, first stored value mapped (as read, of either sign), bits of an entry."""

    entries: int
    first: int
    bits: int


def read_descriptor(ds: Dataset, keyword: str) -> Descriptor:
    """Returns a LUT descriptor; 0 entries stand for 65536, and negative ones were read as signed.

    Raises:
        TableError: not three whole numbers, or bits that no table can have.
    """
    values = read_numbers(ds, keyword)
    if len(values) != 3 or None in values:
        raise TableError("the descriptor of a lookup table in the DICOM header cannot be read; export the image again")
    entries, first, bits = (int(value or 0) for value in values)
    if not 1 <= bits <= 16 or not -(2**15) <= entries < 2**16:
        raise TableError("the descriptor of a lookup table in the DICOM header is damaged; export the image again")
    return Descriptor(entries % 2**16 or 2**16, first, bits)


def read_entries(data: Any, entries: int, *, big_endian: bool, words: bool = True) -> tuple[np.ndarray, bool]:
    """Returns the entries as int64, and whether each has a byte of its own only.

    Args:
        data: bytes, or the integers that pydicom made of 16-bit words.
        entries: how many there must be; more data than that is padding.
        words: whether bytes are 16-bit words (OW), whose bytes change places in a big-endian file.
    """
    if isinstance(data, bytes):
        if len(data) >= 2 * entries:
            table = np.frombuffer(data[: 2 * entries], ">u2" if big_endian else "<u2")
            return table.astype(np.int64), False
        packed = np.frombuffer(data, np.uint8)
        if big_endian and words and len(packed) % 2 == 0:
            packed = packed.reshape(-1, 2)[:, ::-1].ravel()
    else:
        table = np.atleast_1d(np.asarray(data, dtype=np.int64)) % 2**16
        if len(table) >= entries:
            return table[:entries], False
        packed = table.astype("<u2").view(np.uint8)  # two entries of 8 bits a word, the first in the low byte
    if len(packed) < entries:
        raise TableError("a lookup table of the DICOM header is shorter than it says; export the image again")
    return packed[:entries].astype(np.int64), True


def first_mapped(first: int, entries: int, allowed: tuple[float, float]) -> int:
    """Returns the first value mapped with the sign that suits the values looked up, which lie in `allowed`.

    Its representation is US or SS by the sign of these values, which a reader (of implicit VR above all) may not know.
    """
    low, high = allowed
    by_rule = first - 2**16 if low < 0 and first >= 2**15 else first + 2**16 if low >= 0 and first < 0 else first
    other = first if by_rule != first else first + 2**16 if first < 0 else first - 2**16 if first >= 2**15 else first

    def meets(start: int) -> bool:
        return start <= high and start + entries - 1 >= low

    return by_rule if meets(by_rule) or not meets(other) else other


def apply_lut(
    values: np.ndarray, lut: Dataset, allowed: tuple[float, float], notes: list[str], *, big_endian: bool
) -> tuple[np.ndarray, int]:
    """Looks `values` up; returns the entries and the largest entry that the table stands for.

    Not pydicom's apply_voi: it indexes in the type of the entries, so 12-bit values wrap in a LUT of 8-bit entries.

    Args:
        values: `(H, W)`, in the units that the table maps.
        allowed: range that the header allows `values`.

    Raises:
        TableError: the table cannot be read.
    """
    descriptor = read_descriptor(lut, "LUTDescriptor")
    data = read_value(lut, "LUTData")
    if data is None:
        raise TableError("a lookup table of the DICOM header has no entries; export the image again")
    table, _ = read_entries(data, descriptor.entries, big_endian=big_endian)
    bits = entry_bits(descriptor.bits, int(table.max()), notes)
    first = first_mapped(descriptor.first, descriptor.entries, allowed)
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, descriptor.entries - 1)
    return table[index], 2**bits - 1


def entry_bits(declared: int, largest: int, notes: list[str], what: str = "lookup table") -> int:
    """Returns the bits that entries up to `largest` were written with; where not `declared`, a note says so."""
    bits = declared
    if largest >= 2**declared:
        bits = largest.bit_length()
    elif declared > 8 and 0 < largest < 2**8:
        bits = 8
    if bits != declared:
        notes.append(
            warning_note(
                "table-bits", f"the {what} declares {declared} bits, its entries go up to {largest}; taken as {bits}"
            )
        )
    return bits
