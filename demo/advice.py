"""Rewording of the package's messages for visitors of the app and for clients of its API."""

from __future__ import annotations

import re
from pathlib import Path

from medmamba.imaging.image import FrameNeeded, WindowNeeded
from medmamba.serving.record import WARNING, for_programs, problem_for_programs

__all__ = ["WARNING", "for_programs", "in_app", "of_problem", "plain"]

_KIND = re.compile(r"^[a-z][a-z0-9-]*: ")
_FOR_PYTHON = re.compile(
    r"\b(?:frame|window|classes|allow|allow_leakage)=|numpy\.|\bpass \w|medmamba \w+ --|--[a-z]+|\bmake_splits\b"
)
"""Advice that applies only to Python code or the command line."""
_PLAIN = {
    r"Split again with make_splits[^;\n]*": (
        "Remove the duplicates, or upload class folders without splits, which are then made here"
    ),
    r"Choose one label, remove the others, or accept them with [^;\n]*": "Choose one label and remove the others",
    r"\bpatient_pattern\b": "the pattern",
    r"\s*<_?io\.[^>]*>": "",
    r"\bUnidentifiedImageError\b[^;\n]*": "not a readable image",
}
"""Advice to programmers, and the same for a page."""


def in_app(text: object) -> str:
    """Strips the prefix, the kind and programmer-only clauses from a note, warning or error."""
    said = str(text).removeprefix(WARNING)
    for pattern, plain_words in _PLAIN.items():
        said = re.sub(pattern, plain_words, said)
    said = _KIND.sub("", said, count=1) if str(text).startswith(WARNING) else said
    clauses = re.split(r"(; |(?<=[^.])\. (?=[A-Z])| \((?=frame=))", said)
    kept = re.split(r", (?=pass |window=|frame=)", clauses[0])[0]
    for mark, clause in zip(clauses[1::2], clauses[2::2], strict=True):
        if not _FOR_PYTHON.search(clause):
            kept += mark + clause
    return kept.strip().rstrip(";,") or said


def of_problem(problem: Exception, program: bool = False, alone: bool = True) -> str:
    """Returns advice for an image that could not be read.

    Args:
        program: whether the reader is an API client, with fields instead of controls.
        alone: whether it is the only image, so that its controls are visible.
    """
    if program:
        return problem_for_programs(problem)
    if isinstance(problem, FrameNeeded):
        return f"this file has {problem.n_frames} frames; open it on its own and choose one under Frame"
    if isinstance(problem, WindowNeeded):
        low, high = problem.value_range
        how = "set level and width, or use its full value range"
        how = how if alone else f"open it on its own to {how}"
        return f"its values run from {low:g} to {high:g}, and the file declares no display window; {how}"
    return str(problem)


def plain(message: object, *paths: Path) -> str:
    """Returns an error text without paths of the server."""
    text = str(message)
    for path in paths:
        text = text.replace(str(path), path.name)
    return text
