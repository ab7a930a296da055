"""Messages of the package for people who sit before the app, and for programs that call it: what *they* can do."""

from __future__ import annotations

import re
from pathlib import Path

from medmamba.imaging.image import FrameNeeded, WindowNeeded
from medmamba.utils.advice import spelled

WARNING = "warning: "
_KIND = re.compile(r"^[a-z][a-z0-9-]*: ")
_FOR_PYTHON = re.compile(r"\b(?:frame|window|classes)=|numpy\.|\bpass \w|medmamba \w+ --|--(?:frame|window)\b")
"""What only somebody who writes Python, or a command, can follow."""


def in_app(text: object) -> str:
    """A note, warning or error without its prefix, its kind and clauses that only a programmer can follow."""
    said = str(text).removeprefix(WARNING)
    said = _KIND.sub("", said, count=1) if str(text).startswith(WARNING) else said
    clauses = re.split(r"(; |(?<=[^.])\. (?=[A-Z])| \((?=frame=))", said)
    kept = re.split(r", (?=pass |window=|frame=)", clauses[0])[0]
    for mark, clause in zip(clauses[1::2], clauses[2::2], strict=True):
        if not _FOR_PYTHON.search(clause):
            kept += mark + clause
    return kept.strip().rstrip(";,") or said


def for_programs(text: object) -> str:
    """A note, warning or error in the words of the endpoints, whose fields are called differently."""
    return spelled(str(text), {"window": _window_fields})


def _window_fields(value: str) -> str:
    center, _, width = value.strip("()").partition(", ")
    if not re.match(r"-?[\d.]", center):
        return "window_center and window_width"
    return f"window_center={center} and window_width={width}"


def of_problem(problem: Exception, program: bool = False, alone: bool = True) -> str:
    """What to do about an image that could not be read.

    Args:
        program: for one that calls the endpoints, which have fields instead of controls.
        alone: whether it is the only image, so that controls are shown for it.
    """
    if isinstance(problem, FrameNeeded):
        how = f"give frame, 0 to {problem.n_frames - 1}" if program else "open it alone to choose one under Frame"
        return f"this file holds {problem.n_frames} frames; {how}"
    if isinstance(problem, WindowNeeded):
        low, high = problem.value_range
        how = "set level and width, or take the range of its values"
        how = "give window_center and window_width" if program else how if alone else f"open it alone to {how}"
        return f"its values, {low:g} to {high:g}, declare no range of brightness; {how}"
    return str(problem)


def plain(message: object, *paths: Path) -> str:
    """An error text without the server's own paths."""
    text = str(message)
    for path in paths:
        text = text.replace(str(path), path.name)
    return text
