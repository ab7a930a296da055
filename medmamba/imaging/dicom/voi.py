"""Windows and VOI LUT functions of DICOM images (PS3.3 C.11.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..image import warning_note

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class WindowPreset:
    """A window declared in a file. `explanation` is the file's own text for it ("LUNG"), often empty."""

    center: float
    width: float
    explanation: str = ""


@dataclass(frozen=True)
class DicomWindows:
    """What a window/level control needs. Everything is in the raw units that `load_image(window=)` takes.

    Attributes:
        presets: windows declared in the file, its default first.
        value_range: smallest and largest value in the frame, without padding; None for colour, which takes no window.
        unit: "HU" for Hounsfield units, else "".
    """

    presets: tuple[WindowPreset, ...]
    value_range: tuple[float, float] | None
    unit: str = ""


def usable_windows(
    centers: list[float | None], widths: list[float | None], explanation: Any, notes: list[str]
) -> tuple[WindowPreset, ...]:
    """Returns the windows of the header that can be applied; a note says which cannot.

    Args:
        centers: values of WindowCenter; None where one is not a number.
        widths: values of WindowWidth.
        explanation: value of WindowCenterWidthExplanation, one text or several.
    """
    texts = (
        [] if explanation is None else [explanation] if isinstance(explanation, str) else list(map(str, explanation))
    )
    presets, unreadable, degenerate = [], 0, 0
    for i, (center, width) in enumerate(zip(centers, widths, strict=False)):
        if center is None or width is None:
            unreadable += 1
        elif width <= 0:
            degenerate += 1
        else:
            presets.append(WindowPreset(center, width, texts[i] if i < len(texts) else ""))
    if unreadable or degenerate:
        what = "cannot be read as numbers" if unreadable else "has no positive width"
        notes.append(
            warning_note(
                "window-unreadable",
                f"a window of the file (0028,1050 and 0028,1051) {what}; that window is not applied",
            )
        )
    return tuple(presets)


def voi_function(declared: str | None, *, is_float: bool, notes: list[str]) -> str:
    """Returns the VOI LUT function to use; one that the standard does not know is replaced, with a note."""
    if declared in FUNCTIONS:
        return str(declared)
    # LINEAR counts integer levels, which floating-point pixels do not have.
    default = "LINEAR_EXACT" if is_float else "LINEAR"
    if declared:
        notes.append(
            warning_note("voi-function", f"the file's VOI LUT function (0028,1056) is unknown; {default} used")
        )
    return default


def apply_window(raw: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Returns `raw` in [0, 1] by PS3.3 C.11.2.1.2 and C.11.2.1.3, with the output range [0, 1].

    LINEAR is not defined below a width of 1, where LINEAR_EXACT is used: rescale slopes far below 1 make such windows.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (raw - center) / width, -700, 700)))
    if function == "LINEAR" and width >= 1:
        # The standard's `width - 1` counts levels; a width of 1 is a threshold.
        center, width = center - 0.5, width - 1
        if width == 0:
            return (raw > center).astype(np.float64)
    return np.clip((raw - center) / width + 0.5, 0, 1)


def apply_range(raw: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns `raw` with `low` as 0 and `high` as 1, clipped."""
    if np.isinf(high - low):  # doubles near their limits
        return np.clip((raw / 2 - low / 2) / (high / 2 - low / 2), 0, 1)
    return np.clip((raw - low) / max(high - low, 1e-300), 0, 1)
