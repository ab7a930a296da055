"""The record of a classified image as JSON, which the web app's API and `medmamba serve` share."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from ..config import MedMambaConfig
from ..imaging.image import FrameNeeded, MedicalImage, Window, WindowNeeded
from ..inference.predict import FAR, UNUSUAL, Prediction
from ..utils.advice import spelled

NOTICE = (
    "For research and teaching only. Not a medical device: do not use it for diagnosis or treatment, and do not "
    "upload images that identify a person."
)
WARNING = "warning: "
UNSURE = 0.7
"""A top-class probability below this, wrong in three of ten cases, is reported as unsure."""
CONTRAST = frozenset(("unused-range", "saturated", "two-valued", "almost-constant", "constant"))
"""Kinds of `MedicalImage.warnings` that another window may resolve."""


@dataclass(frozen=True)
class Applied:
    """How an image was read.

    Attributes:
        window: applied window, or None.
        window_from: origin of the window, see `MedicalImage`.
        better_window: full-range window, if the applied one hides most of the image.
        values: minimum and maximum of a greyscale image.
        frame: frame index.
        n_frames: number of frames.
    """

    window: Window | None = None
    window_from: str = ""
    better_window: Window | None = None
    values: tuple[float, float] | None = None
    frame: int = 0
    n_frames: int = 1


@dataclass(frozen=True)
class Server:
    """What a record says of the model and where it runs.

    Attributes:
        title: displayed name of the model.
        config: of the model.
        calibrated: whether a temperature was fitted, so that scores are probabilities.
        backend: of the scan.
        device: where it runs.
    """

    title: str
    config: MedMambaConfig
    calibrated: bool
    backend: str
    device: str


def applied(image: MedicalImage) -> Applied:
    """Returns how an image was read."""
    doubtful = image.low_contrast or not CONTRAST.isdisjoint(image.warning_kinds)
    better = image.range_window if doubtful and image.range_window != image.window else None
    chosen = image.bit_depth > 8 or image.window_from != "range"  # else the usual 0 to 255
    return Applied(
        image.window if chosen else None,
        image.window_from if chosen else "",
        better,
        image.value_range,
        image.frame,
        image.n_frames,
    )


def is_of_contrast(note: str) -> bool:
    """Returns whether another window may resolve a warning."""
    return note.removeprefix(WARNING).partition(": ")[0] in CONTRAST


def without_unusual(prediction: Prediction) -> Prediction:
    """Returns a prediction without the out-of-distribution note, which records and pages show separately."""
    notes = [note for note in prediction.image_notes if note not in (UNUSUAL, FAR)]
    return dataclasses.replace(prediction, image_notes=notes)


def is_unsure(prediction: Prediction, config: MedMambaConfig) -> bool:
    """Returns whether the top probability is below `UNSURE` (multilabel: no label is above its threshold)."""
    return not prediction.labels if config.task == "multilabel" else prediction.probability < UNSURE


def classification(
    prediction: Prediction,
    how: Applied,
    milliseconds: float,
    server: Server,
    refused: bool = False,
    suggestion: str | None = None,
) -> dict[str, Any]:
    """Returns the record of a classified image: plain data without NaN.

    Args:
        prediction: of one image.
        how: it was read.
        milliseconds: from the file to the prediction.
        server: the model and where it runs.
        refused: leave out the answer, because the image is unlike all that the model knows.
        suggestion: name of the model to try instead.
    """
    prediction = without_unusual(prediction)
    return finite(
        {
            "label": None if refused else prediction.label,
            "probability": None if refused else prediction.probability,
            "probabilities": {} if refused else dict(prediction.top),
            "calibrated": server.calibrated,
            "unsure": None if refused else is_unsure(prediction, server.config),
            "unusual": prediction.unusual,
            "unusual_level": prediction.unusual_level,
            "refused": refused,
            "suggestion": suggestion,
            "frame": how.frame,
            "frames": how.n_frames,
            "window": list(how.window) if how.window else None,
            "better_window": list(how.better_window) if how.better_window else None,
            "warnings": _warnings(prediction, how),
            "notes": [for_programs(note) for note in prediction.image_notes],
            "model": server.title,
            "architecture": server.config.architecture,
            "backend": server.backend,
            "device": server.device,
            "milliseconds": round(milliseconds, 1),
            "notice": NOTICE,
        }
    )


def warnings_of(prediction: Prediction, how: Applied) -> list[str]:
    """Returns the notes that affect how reliable an answer is, apart from the out-of-distribution warning."""
    found = [note for note in prediction.image_notes if note.startswith(WARNING)]
    if how.better_window is not None and not any(is_of_contrast(note) for note in found):
        found.append(f"{WARNING}unused-range: another window would show far more of this image")
    return found


def _warnings(prediction: Prediction, how: Applied) -> list[str]:
    warnings = [for_programs(text.removeprefix(WARNING)) for text in warnings_of(prediction, how)]
    if how.better_window is not None:
        center, width = how.better_window
        warnings.append(f"window_center={center:g} and window_width={width:g} cover the full value range")
    if prediction.unusual:
        warnings.append("this image does not look like the training images (out of distribution)")
    if how.n_frames > 1:
        warnings.append(f"this answer is for frame {how.frame} of {how.n_frames} only")
    return warnings


def for_programs(text: object) -> str:
    """Rewrites a note, warning or error with the field names of the API."""
    return spelled(str(text), {"window": _window_fields})


def _window_fields(value: str) -> str:
    center, _, width = value.strip("()").partition(", ")
    if not re.match(r"-?[\d.]", center):
        return "window_center and window_width"
    return f"window_center={center} and window_width={width}"


def problem_for_programs(problem: Exception) -> str:
    """Returns advice for a client whose image could not be read."""
    if isinstance(problem, FrameNeeded):
        return f"this file has {problem.n_frames} frames; set frame, 0 to {problem.n_frames - 1}"
    if isinstance(problem, WindowNeeded):
        low, high = problem.value_range
        return (
            f"its values run from {low:g} to {high:g}, and the file declares no display window; set window_center and "
            "window_width"
        )
    return for_programs(problem)


def check_view(frame: float | None, center: float | None, width: float | None) -> tuple[int | None, Window | None]:
    """Returns frame and window of a request.

    Raises:
        ValueError: half a window, or a number out of range.
    """
    if (center is None) != (width is None):
        raise ValueError("set both window_center and window_width, or neither")
    if width is not None and not width > 0:
        raise ValueError(f"window_width must be above 0, not {width:g}")
    if frame is not None and (frame != int(frame) or frame < 0):
        raise ValueError(f"frame must be a whole number from 0, not {frame:g}")
    window = None if center is None or width is None else (float(center), float(width))
    return None if frame is None else int(frame), window


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON cannot represent, with None in plain data."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
