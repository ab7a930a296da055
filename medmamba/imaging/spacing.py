"""The distance of pixels in millimetres, where a file says so."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

from .formats import sniff
from .image import is_dataset

PATIENT, DETECTOR, FILM, UNSTATED = "in the patient", "at the detector", "on the film", "plane not stated"
_PROJECTION = ("CR", "DX", "MG", "RG", "RF", "XA", "PX", "IO")
"""Modalities whose image is a projection, enlarged by an unknown factor."""
_KEYWORDS = (
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelSpacingCalibrationType", "Modality"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)


class Spacing(NamedTuple):
    """The distance of the centres of neighbouring pixels, in mm.

    Attributes:
        row: from a row to the next, vertically.
        column: from a column to the next, horizontally.
        plane: where a length is that long: `PATIENT`, `DETECTOR`, `FILM` or `UNSTATED`. A structure in the patient is
            smaller than at the detector.
    """

    row: float
    column: float
    plane: str


def image_spacing(source: Any, frame: int = 0) -> Spacing | None:
    """Returns the spacing of a DICOM image and the plane that it is of (PS3.3 section 10.7.1.3); None if unknown.

    A projection X-ray whose PixelSpacing equals its ImagerPixelSpacing, or has no calibration, was not corrected for
    the enlargement of the patient.

    Args:
        source: as for `load_image`; files that cannot be read have None, since reading the image reports why.
        frame: of a multi-frame image, from 0.
    """
    ds = _header(source, _KEYWORDS)
    if ds is None:
        return None
    pixel = _measures(ds, frame) or _pair(ds, "PixelSpacing")
    imager, film = _pair(ds, "ImagerPixelSpacing"), _pair(ds, "NominalScannedPixelSpacing")
    if pixel and imager:
        return Spacing(*pixel, DETECTOR if pixel == imager else PATIENT)
    if pixel:
        projection = str(ds.get("Modality") or "") in _PROJECTION
        calibrated = bool(str(ds.get("PixelSpacingCalibrationType") or ""))
        return Spacing(*pixel, UNSTATED if projection and not calibrated else PATIENT)
    if imager:
        return Spacing(*imager, DETECTOR)
    return Spacing(*film, FILM) if film else None


def pixel_spacing(source: Any) -> tuple[float, float] | None:
    """Returns the (row, column) spacing in mm of a DICOM image; None for other sources, and where it has none.

    That is PixelSpacing, the distance in the patient. ImagerPixelSpacing of a projection X-ray, the distance at the
    detector, is not used, since the patient is enlarged there by an unknown factor (PS3.3 section 10.7.1.3).

    Args:
        source: as for `load_image`; files that cannot be read have None, since reading the image reports why.
    """
    ds = _header(source, ("PixelSpacing",))
    return None if ds is None else _pair(ds, "PixelSpacing")


def _header(source: Any, keywords: tuple[str, ...]) -> Any:
    """Returns the dataset of a DICOM file with these elements, the dataset that was passed, or None."""
    if isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                if sniff(file.read(512)) != "DICOM":
                    return None
            import pydicom
            from pydicom.errors import InvalidDicomError

            try:
                source = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=list(keywords))
            except (InvalidDicomError, ValueError, AttributeError, NotImplementedError):
                return None
        except (OSError, ImportError):
            return None
    return source if is_dataset(source) else None


def _measures(ds: Any, frame: int) -> tuple[float, float] | None:
    """Returns the spacing in the functional groups of an enhanced multi-frame image, per frame before shared."""
    for keyword, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        try:
            measures = ds[keyword].value[index].PixelMeasuresSequence[0]
        except (KeyError, IndexError, AttributeError, TypeError, ValueError):
            continue
        if found := _pair(measures, "PixelSpacing"):
            return found
    return None


def _pair(ds: Any, keyword: str) -> tuple[float, float] | None:
    """Returns two positive numbers, or None."""
    try:
        row, column = (float(value) for value in ds.get(keyword))
    except (TypeError, ValueError):
        return None
    return (row, column) if all(math.isfinite(v) and v > 0 for v in (row, column)) else None
