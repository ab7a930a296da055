"""The order of the slices of a DICOM series."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..formats import sniff
from .elements import read_numbers, read_value

_KEYWORDS = ["SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient"]


def series_order(paths: Sequence[str | os.PathLike[str]]) -> list[int]:
    """Returns the order in which to show files: those of a DICOM series together, by position in the patient.

    A series takes the place of its first file; other files stay where they are. Slices without a position are ordered
    by their instance number, and those without either as they came.

    Returns:
        The indices of `paths`, each once.
    """
    series: dict[str, int] = {}
    keys: list[tuple[int, float, float, int]] = []
    for i, path in enumerate(paths):
        found = _slice(path)
        if found is None:
            keys.append((i, 0.0, 0.0, i))
            continue
        name, position, number = found
        keys.append((series.setdefault(name, i), position, number, i))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _slice(path: str | os.PathLike[str]) -> tuple[str, float, float] | None:
    """Returns series, position along its normal in mm, and number of a file; None if it is in no series."""
    try:
        with open(path, "rb") as file:
            if sniff(file.read(512)) != "DICOM":
                return None
        import pydicom

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote values of the header
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
            name = read_value(ds, "SeriesInstanceUID")
            number = _numbers(ds, "InstanceNumber", 1)
            position = _numbers(ds, "ImagePositionPatient", 3)
            axes = _numbers(ds, "ImageOrientationPatient", 6)
    except (OSError, ImportError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if name is None:
        return None
    along = 0.0
    if position is not None and axes is not None:
        along = float(np.cross(axes[:3], axes[3:]) @ position)
    return str(name), along, float(number[0]) if number is not None else 0.0


def _numbers(ds: Any, keyword: str, count: int) -> np.ndarray | None:
    """Returns `count` finite numbers of an element, or None."""
    values = read_numbers(ds, keyword)
    if len(values) != count or any(value is None for value in values):
        return None
    return np.array(values, np.float64)
