"""Windows of greyscale images: the names in the menu, and what the controls stand for."""

from __future__ import annotations

import re

from ..service import FileFacts, View, Window

AS_FILE = "From the file"
CUSTOM = "Manual"
RANGE = "Full value range"
CT_WINDOWS = [("Soft tissue", (40, 400)), ("Lung", (-600, 1500)), ("Bone", (400, 1800)), ("Brain", (40, 80))]
"""Common CT windows: level and width in Hounsfield units."""
WINDOW_WORDS = (
    "abdomen angio body bone brain chest contrast default harder head liver low lung lungs medium mediastinum normal "
    "pelvis sharp smooth soft softer spine standard stroke tissue tissues window"
)

FIRST = View(0)
"""View of a new file: the first frame, with the window declared in the file."""


def view_of(preset: str | None, center: float, width: float, frame: float | None) -> View:
    """Builds a view from the controls, which count frames from 1. No preset means the window of the file."""
    window = None if preset in (AS_FILE, None) else (float(center), float(width))
    return View(max(int(frame or 1) - 1, 0), window)


def presets(found: FileFacts) -> list[tuple[str, Window]]:
    """Returns named windows: those declared in the file, common CT windows, and the full value range."""
    if found.windows is None:
        return []
    windows = [(_words(p.explanation), (p.center, p.width)) for p in found.windows.presets]
    if found.windows.unit == "HU":
        windows += [(name, window) for name, window in CT_WINDOWS if window not in dict(windows).values()]
    if found.image.range_window:
        windows.append((RANGE, found.image.range_window))
    return [(f"{name} ({center:g} / {width:g})", (center, width)) for name, (center, width) in windows]


def slider_step(low: float, high: float, center: float, width: float) -> float:
    """Returns the slider step: whole units for large ranges and integer windows."""
    if high - low > 64:
        return 1 if float(center).is_integer() and float(width).is_integer() else 0.5
    return (high - low) / 256


def _words(explanation: str) -> str:
    """Returns the window name in a file if it consists of known words: free header text may identify a patient."""
    known = set(re.findall(r"[a-z]+", explanation.lower())) <= set(WINDOW_WORDS.split())
    return explanation.strip().capitalize() if explanation.strip() and known else "Window"


def default_window(found: FileFacts) -> Window:
    """Returns the initial window of the controls: the first in the file, else the full value range."""
    assert found.windows is not None
    if found.windows.presets:
        return found.windows.presets[0].center, found.windows.presets[0].width
    return found.image.range_window or (0.0, 1.0)
