"""Tolerant access to DICOM elements: an optional element that cannot be read must not block an image.

pydicom converts an element when it is asked for, and raises (and quotes the value) where the text is not what the value
representation promises: a decimal comma, brackets, words. The numbers here are parsed from the stored text instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_TEXT = ("DS", "IS", "LO", "SH", "CS", "ST", "LT", "UT", "UN")


def read_numbers(ds: Dataset, keyword: str) -> list[float | None]:
    """Returns the values of a numeric element; None stands for one that is not a finite number.

    An element that is absent or holds only empty values gives an empty list.
    """
    tag = _tag(keyword)
    if tag not in ds.keys():  # noqa: SIM118  (`in ds` looks the keyword up again)
        return []
    item: Any = ds.get_item(tag)
    if item.VR in ("US", "SS") and isinstance(item.value, bytes) and len(item.value) == 2:
        little = getattr(item, "is_little_endian", True)
        return [float(int.from_bytes(item.value, "little" if little else "big", signed=item.VR == "SS"))]
    if isinstance(item.value, bytes) and (vr := item.VR or _dictionary_vr(item.tag)) in _TEXT:
        pieces: Iterable[Any] = item.value.decode("ascii", "replace").split("\\") if vr != "UN" else ("unreadable",)
    else:
        try:
            value = ds[keyword].value
        except Exception:  # conversion fails in any way
            return [None]
        pieces = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    stripped = [piece.strip(" \t\0") if isinstance(piece, str) else piece for piece in pieces]
    if all(piece is None or piece in ("", b"") for piece in stripped):
        return []
    return [_number(piece) for piece in stripped]


def read_integer(ds: Dataset, keyword: str) -> int | None:
    """Returns the first value of an element as an integer, or None where it is absent or is not one."""
    values = read_numbers(ds, keyword)
    return int(values[0]) if values and values[0] is not None and values[0] == int(values[0]) else None


def read_value(ds: Dataset, keyword: str) -> Any:
    """Returns the value of an element, or None where it is absent, empty or not readable."""
    if _tag(keyword) not in ds.keys():  # noqa: SIM118
        return None
    try:
        value = ds.get(keyword)
    except Exception:  # conversion fails in any way
        return None
    return None if value in (None, "") or value == [] else value


@cache
def _tag(keyword: str) -> Any:
    from pydicom.tag import Tag

    return Tag(keyword)


def _number(piece: Any) -> float | None:
    if isinstance(piece, str):
        if not _NUMBER.fullmatch(piece):
            return None
    elif piece is None:
        return None
    try:
        number = float(piece)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _dictionary_vr(tag: Any) -> str:
    from pydicom.datadict import dictionary_VR

    return dictionary_VR(tag)
