"""The image viewer: a dialog with zoom, pan, window, frames and, beside the image, an attribution map.

The dialog itself is built by viewer.js. It sends requests through the component `#mm-view-data`, and gets back, as the
value of that component, a JSON record in an attribute. Images travel as files of the session, or, while a window is
dragged, as a small picture within the record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from medmamba.config import ConfigError
from medmamba.explain import Explanation
from medmamba.imaging.load import ImageError, MedicalImage
from medmamba.imaging.spacing import image_spacing
from medmamba.pretrained import PretrainedError
from medmamba.utils.text import json_text

from ..advice import of_problem
from ..context import Context
from ..html import Markup, data_uri, tag
from ..service import FileFacts, View, inspect, reduced
from ..sessions import Session
from ..theme import Html
from . import answers, maps
from .answers import squeeze
from .classify import ClassifyTab
from .window import AS_FILE, CUSTOM

LARGEST = 4096
"""Longest side, in pixels, of an image in the viewer."""
QUICK = 640
"""Longest side while a window is dragged."""
EVENT = (
    "window.mmViewSend = (name, detail) => trigger(name, {index: JSON.stringify(detail)});"
    "watch('value', () => window.mmViewShow?.(element.querySelector('[data-mm-record]')?.dataset.mmRecord));"
)


def build(context: Context, classify: ClassifyTab) -> None:
    """Builds the channel of the viewer and its events. Call inside `gr.Blocks`."""
    channel = Html("", js_on_load=EVENT, elem_id="mm-view-data")

    def show(event: gr.EventData, request: gr.Request) -> Markup | Any:
        """Returns the record of the requested image."""
        asked = parse(event)
        session = context.sessions.of(request)
        if asked is None or not session.images:
            return gr.skip()
        try:
            return record_html(record(session, asked, session.view or View(0)))
        except (ImageError, PretrainedError, ConfigError, OSError, ValueError) as problem:
            path = session.images[session.current]
            return record_html({"seq": asked.seq, "error": answers.reason(of_problem(problem), path)})

    def apply(event: gr.EventData, title: str, request: gr.Request) -> dict[Any, Any]:
        """Classifies the image again with the window and the frame chosen in the viewer."""
        asked = parse(event)
        session = context.sessions.of(request)
        if asked is None or len(session.images) != 1:
            return {channel: gr.skip()}
        view = session.view or View(0)
        window = asked.window or view.window
        number = (view.frame or 0 if asked.frame is None else asked.frame) + 1
        preset, (level, width) = (CUSTOM, window) if window else (AS_FILE, (0.0, 1.0))
        preset_control, *_, frame_control = classify.view
        chosen = {preset_control: preset} if asked.window else {}
        return {**chosen, frame_control: number, **classify.look(title, preset, level, width, number, request)}

    private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    # Not the controls as inputs: a slider whose range has just changed would refuse the value it had before.
    channel.click(show, None, channel, concurrency_id="view", trigger_mode="always_last", **private)
    channel.submit(apply, classify.model, [channel, *classify.outputs], concurrency_id="classify", **private)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the viewer.

    Attributes:
        seq: number of the request, returned with the answer, so that late answers are ignored.
        map: index of an attribution map of the last explanation, or None for the image.
        image: index of the image in the batch; None: the current one.
        frame: from 0, or None for that of the controls.
        window: level and width, or None for that of the controls.
        quick: whether a small picture suffices.
    """

    seq: int = 0
    map: int | None = None
    image: int | None = None
    frame: int | None = None
    window: tuple[float, float] | None = None
    quick: bool = False


def parse(event: gr.EventData) -> Asked | None:
    """Returns a request, or None if it was not sent by the page."""
    try:
        raw = json.loads(str(event.index))
        whole = {name: raw.get(name) for name in ("seq", "map", "image", "frame")}
        if not all(v is None or (isinstance(v, int) and 0 <= v < 2**31) for v in whole.values()):
            return None
        window = raw.get("window")
        if window is not None:
            window = (float(window[0]), float(window[1]))
            if not all(map(math.isfinite, window)) or window[1] <= 0:
                return None
        return Asked(whole["seq"] or 0, whole["map"], whole["image"], whole["frame"], window, raw.get("quick") is True)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError):
        return None


def record_html(found: dict[str, Any]) -> Markup:
    """Renders a record as the page reads it."""
    return tag('<div data-mm-record="{}"></div>', json_text(found))


def record(session: Session, asked: Asked, view: View) -> dict[str, Any]:
    """Returns what the viewer shows.

    Args:
        view: frame and window of the controls, which apply to a single image only.

    Raises:
        ImageError: the file cannot be read.
    """
    several = len(session.images) > 1
    current = session.current if asked.image is None else min(asked.image, len(session.images) - 1)
    path = session.images[current]
    if several:
        view = View(0)
    frame = view.frame if asked.frame is None else asked.frame
    shown = inspect(path, View(frame, view.window if asked.window is None else asked.window))
    image = shown.image
    explanation = None
    if asked.map is not None and session.comparison is not None and asked.map < len(session.comparison.explanations):
        explanation = session.comparison.explanations[asked.map]
    size = reduced(image, QUICK if asked.quick else LARGEST)
    panes: list[dict[str, Any]] = []
    if asked.quick:
        panes.append({"name": "Image", "src": data_uri(squeeze(size.to_uint8()), exact=False)})
    else:
        folder = fresh_folder(session)
        panes.append({"name": "Image", "file": write(size.to_uint8(), folder / "image.png")})
        if explanation is not None:
            name = maps.title_of(explanation)
            over = write(over_image(explanation, size), folder / "map.png")
            panes.append({"name": name, "file": panes[0]["file"], "over": over, "text": explanation.reading})
    found: dict[str, Any] = {
        "seq": asked.seq,
        "title": path.name,
        "map": asked.map if explanation is not None else None,
        "panes": panes,
        "size": [image.size[1], image.size[0]],
        "shown": [size.size[1], size.size[0]],
        "index": current,
        "count": len(session.images),
        "frame": image.frame,
        "frames": image.n_frames,
        "window": windowed(shown),
        "applies": not several and explanation is None,
        "scale": scale(path, image, size),
    }
    return found


def over_image(explanation: Explanation, image: MedicalImage) -> np.ndarray:
    """Returns the map over another size of its image, (h, w, 3) uint8."""
    return dataclasses.replace(explanation, image=image).overlay_pixels(1.0)


def windowed(shown: FileFacts) -> dict[str, Any] | None:
    """Returns the applied window and the range of values, or None if no window applies."""
    if shown.windows is None or shown.windows.value_range is None:
        return None
    low, high = shown.windows.value_range
    level, width = shown.image.window or ((low + high) / 2, high - low)
    return {"level": level, "width": width, "low": low, "high": high, "unit": shown.windows.unit}


def scale(path: Path, image: MedicalImage, size: MedicalImage) -> dict[str, Any] | None:
    """Returns the size of a displayed pixel in mm and in which plane that is, or None if the file does not say."""
    spacing = image_spacing(path, image.frame) if image.format == "DICOM" else None
    if spacing is None:
        return None
    factor = image.size[1] / size.size[1]
    text = f"{spacing.row:.3g} × {spacing.column:.3g} mm per pixel, {spacing.plane}"
    return {"mm": spacing.column * factor, "ratio": spacing.row / spacing.column, "plane": spacing.plane, "text": text}


def fresh_folder(session: Session) -> Path:
    """Returns a new folder for the pictures of the viewer and deletes all but the previous one, still on display."""
    for old in session.views[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    folder = session.new_download("image.png").parent
    session.views = [*session.views[-1:], folder]
    return folder


def write(pixels: np.ndarray, path: Path) -> str:
    """Writes an exact picture; returns its address relative to the page."""
    Image.fromarray(squeeze(pixels)).save(path, compress_level=1)
    return f"gradio_api/file={path}"
