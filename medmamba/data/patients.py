"""Patients from file names: a pattern that finds none is refused, and what it finds is counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..utils.names import shown
from .dataset import DatasetError
from .registry import DatasetEntry


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compiles a pattern for patients; None stays None.

    Raises:
        DatasetError: not a regular expression, or an empty one.
    """
    if pattern is None:
        return None
    if not pattern:
        raise DatasetError("patient_pattern is empty and would match everything; leave it out where there are none")
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise DatasetError(f"patient_pattern {pattern!r} is not a regular expression: {exc}") from exc


def patient_of(path: str, pattern: re.Pattern[str] | None) -> str | None:
    """Returns group 1 (or all) of the first match in the file name; None without a pattern, a match or a text in it."""
    match = pattern.search(PurePosixPath(path).name) if pattern else None
    return (match.group(1 if pattern and pattern.groups else 0) or None) if match else None


def patients_by_name(
    paths: Sequence[str], pattern: str | None, entry: DatasetEntry | None, where: str
) -> tuple[list[str | None], list[str]]:
    """Returns the patient of each file, and notes.

    Args:
        paths: with forward slashes.
        pattern: as the user gave it; without one that of the registry is tried.
        entry: of the registry.
        where: the collection, for messages.

    Raises:
        DatasetError: the pattern of the user matches no file name, so that patients would be ignored.
    """
    own = pattern is not None
    compiled = compile_pattern(pattern if own else entry.group_pattern if entry else None)
    found = [patient_of(path, compiled) for path in paths]
    if compiled is None or not paths:
        return found, []
    without = [PurePosixPath(path).name for path, patient in zip(paths, found, strict=True) if patient is None]
    if len(without) == len(paths) and own:
        raise DatasetError(
            f"{where}: patient_pattern {compiled.pattern!r} matches none of the {len(paths)} file names, such as "
            f"{shown(without[0])}{_hint(compiled, without)}. Group 1 must match a part of the name without its folders"
        )
    source = "patient_pattern" if own else f"the pattern of {entry.name if entry else ''}, {compiled.pattern!r},"
    if len(without) == len(paths):
        return found, [
            f"{source} matches no file name, such as {shown(without[0])}: patients are unknown, and each image counts "
            "as one of its own"
        ]
    patients = len({patient for patient in found if patient is not None})
    note = f"{source} matches {len(paths) - len(without)} of {len(paths)} file names: {patients} patients"
    if without:
        note += f"; {len(without)} images without one count as a patient each, such as {shown(without[0])}"
    return found, [note]


def _hint(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    if pattern.flags & re.IGNORECASE:
        return ""
    loose = re.compile(pattern.pattern, pattern.flags | re.IGNORECASE)
    hits = sum(loose.search(name) is not None for name in names)
    return f", but {hits} regardless of case: begin it with (?i)" if hits else ""
