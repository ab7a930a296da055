"""Windows of greyscale images: the names in the menu, and what the controls stand for."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.imaging.load import ImageError

from ..service import FileFacts, View, Window, inspect

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


def named_window(path: Path, preset: str | None, center: float, width: float, frame: float | None) -> Window:
    """Returns level and width of a name in the menu; those of the controls for another name or an unreadable file."""
    if preset not in (AS_FILE, CUSTOM, None):
        with contextlib.suppress(ImageError, OSError):  # reported with the prediction
            found = inspect(path, view_of(AS_FILE, center, width, frame))
            return dict(presets(found)).get(preset, (center, width))
    return center, width


def full_range(path: Path, frame: float | None) -> tuple[str, Window] | None:
    """Returns the name in the menu and the window of the full value range of a frame, None where there is none.

    Raises:
        ImageError, OSError: the file cannot be read.
    """
    found = inspect(path, view_of(AS_FILE, 0, 1, frame))
    window = found.image.range_window
    if window is None:
        return None
    return next((name for name, known in presets(found) if known == window), CUSTOM), window


class WindowControls:
    """A menu of windows with sliders for level and width. Create it inside `gr.Blocks`.

    Attributes:
        group: what holds them, hidden until an image has a window.
        parts: preset, level and width, the first arguments of `view_of`.
    """

    def __init__(self, elem_id: str) -> None:
        with gr.Group(visible=False, elem_id=elem_id) as self.group:
            self.preset = gr.Dropdown([AS_FILE, CUSTOM], value=AS_FILE, label="Window", filterable=False)
            with gr.Row(equal_height=True):
                self.center = gr.Slider(0, 1, 0.5, label="Level (centre)", min_width=140, buttons=[])
                self.width = gr.Slider(0, 1, 1, label="Window width", min_width=140, buttons=[])
        self.parts: list[Any] = [self.preset, self.center, self.width]

    def hidden(self) -> dict[Any, Any]:
        """Returns updates that hide the controls and select the window of the file."""
        reset = gr.update(choices=[AS_FILE, CUSTOM], value=AS_FILE)
        return {self.group: gr.update(visible=False), self.preset: reset}

    def shown(self, found: FileFacts) -> dict[Any, Any]:
        """Returns updates for a new image, set to the applied window; hidden where there is none to choose."""
        if found.windows is None or found.windows.value_range is None:  # colour, or a lookup table
            return self.hidden()
        unit = f" ({found.windows.unit})" if found.windows.unit else ""
        names = [AS_FILE, *(name for name, _ in presets(found)), CUSTOM]
        return {
            self.group: gr.update(visible=True),
            self.preset: gr.update(choices=names, value=None if found.lacks_window else AS_FILE),
            **self.sliders(found, unit),
        }

    def sliders(self, found: FileFacts, unit: str | None = None) -> dict[Any, Any]:
        """Returns updates of level and width to the applied window.

        Args:
            unit: for the labels, with a space before; None: keep the labels.
        """
        assert found.windows is not None and found.windows.value_range is not None
        low, high = found.windows.value_range
        window = found.image.window
        c, w = window or default_window(found)
        step = slider_step(low, high, c, w)
        labels: list[dict[str, Any]] = [{}, {}]
        if unit is not None:
            labels = [{"label": f"{name}{unit}"} for name in ("Level (centre)", "Window width")]
        shown: dict[str, Any] = {"visible": window is not None, "step": step}
        # The window of a file may exceed the value range of the image.
        return {
            self.center: gr.update(minimum=min(low, c), maximum=max(high, c), value=c, **shown, **labels[0]),
            self.width: gr.update(minimum=min(step, w), maximum=max(high - low, w), value=w, **shown, **labels[1]),
        }
