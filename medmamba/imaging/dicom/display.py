"""Display elements of DICOM that are noted but not applied: pixel aspect ratio, shutters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..image import warning_note

if TYPE_CHECKING:
    from pydicom import Dataset

_NOT_APPLIED = {
    "ShutterShape": "display shutter",
    "EnhancedPaletteColorLookupTableSequence": "enhanced palette",
    "AlphaPaletteColorLookupTableDescriptor": "alpha palette",
}
_SPACINGS = ("PixelSpacing", "PixelAspectRatio", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
# The tags of these three, and of the four spacings.
_TAGS = frozenset((0x00181600, 0x0028140B, 0x00281104, 0x00280030, 0x00280034, 0x00181164, 0x00182010))


def display_notes(ds: Dataset, numbers: Callable[[str], list[float | None]], has_groups: bool) -> list[str]:
    """Returns notes on such elements.

    Args:
        numbers: values of a numeric element for the frame, from its functional groups or `ds`.
        has_groups: whether there are functional groups, which may hold the spacing.
    """
    if not has_groups and _TAGS.isdisjoint(ds.keys()):
        return []
    notes = []
    for keyword in _SPACINGS:
        spacing = [value for value in numbers(keyword) if value]
        if len(spacing) == 2 and min(spacing) > 0:
            if abs(spacing[0] / spacing[1] - 1) > 0.01:
                notes.append(f"pixels are not square (height to width {spacing[0] / spacing[1]:.3g}); not resampled")
            break
    for keyword, what in _NOT_APPLIED.items():
        if keyword in ds:
            notes.append(warning_note("not-applied", f"the file's {what} is not applied"))
    return notes
