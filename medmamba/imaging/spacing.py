"""The distance of pixels in millimetres, where a file says so."""

from __future__ import annotations

import math
import os
from typing import Any

from .formats import sniff
from .image import is_dataset


def pixel_spacing(source: Any) -> tuple[float, float] | None:
    """Returns the (row, column) spacing in mm of a DICOM image; None for other sources, and where it has none.

    That is PixelSpacing, the distance in the patient. ImagerPixelSpacing of a projection X-ray, the distance at the
    detector, is not used, since the patient is enlarged there by an unknown factor (PS3.3 section 10.7.1.3).

    Args:
        source: as for `load_image`; files that cannot be read have None, since reading the image reports why.
    """
    if isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                if sniff(file.read(512)) != "DICOM":
                    return None
            import pydicom
            from pydicom.errors import InvalidDicomError

            try:
                source = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=["PixelSpacing"])
            except (InvalidDicomError, ValueError, AttributeError, NotImplementedError):
                return None
        except (OSError, ImportError):
            return None
    if not is_dataset(source):
        return None
    found = source.get("PixelSpacing")
    try:
        row, column = (float(value) for value in found)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return (row, column) if all(math.isfinite(v) and v > 0 for v in (row, column)) else None
