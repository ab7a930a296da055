"""Parses label cells of a table: one label, several labels, or a missing value in any of its spellings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from ..utils.names import canonical, shown
from .dataset import DatasetError
from .labels import is_missing

LABEL_SEPARATOR = ";"
_JOINTS = (",", "/", "+", "&", "\n", "\t", " and ")
_LIST = re.compile(r"\s*(\[.*\]|\{.*\}|\(\s*['\"].*\))\s*", re.DOTALL)


def parse_labels(
    cells: Sequence[tuple[int, str]], is_class: Callable[[str], bool], where: str
) -> tuple[list[list[str]], bool, list[str]]:
    """Returns the labels of each row, whether any row has several, and notes.

    Args:
        cells: line and text of each row.
        is_class: whether a text is one of the classes as they were given; such a text is taken as it is.
        where: the file, for messages.

    Raises:
        DatasetError: a row without a label where each should have one, a spelling of "nothing" among labels, or
            several labels that are not separated by `;`.
    """
    found = []
    for _, cell in cells:
        whole = canonical(cell)
        parts = [whole] if is_class(whole) else [canonical(part) for part in cell.split(LABEL_SEPARATOR)]
        found.append(list(dict.fromkeys(part for part in parts if part)))
    several = sum(len(parts) > 1 for parts in found)
    _refuse_missing(cells, found, several > 0, is_class, where)
    notes = _refuse_joined([line for line, _ in cells], found, is_class, where)
    if several:
        notes.append(f"a multi-label task, because {several} of {len(found)} rows have several labels")
    return found, several > 0, notes


def _refuse_missing(
    cells: Sequence[tuple[int, str]],
    found: Sequence[Sequence[str]],
    multilabel: bool,
    is_class: Callable[[str], bool],
    where: str,
) -> None:
    rows = []
    for (line, cell), parts in zip(cells, found, strict=True):
        nothing = [part for part in parts if is_missing(part) and not is_class(part)]
        if nothing or (not parts and not multilabel):
            rows.append((line, nothing[0] if nothing else cell.strip()))
    if not rows:
        return
    lines = ", ".join(str(line) for line, _ in rows[:10]) + (", ..." if len(rows) > 10 else "")
    spelt = ", ".join(f"{count} {text!r}" for text, count in Counter(text for _, text in rows).items())
    raise DatasetError(
        f"{where}, line {rows[0][0]}: no label; {len(rows)} of {len(cells)} rows have none ({spelt}; lines {lines}). "
        "Remove these rows. If it is a class, write it out, such as 'no finding', or in Python name all classes: "
        "open_dataset(..., classes=[...])"
    )


def _refuse_joined(
    lines: Sequence[int], found: Sequence[Sequence[str]], is_class: Callable[[str], bool], where: str
) -> list[str]:
    labels = {part for parts in found for part in parts}
    suspects = {label for label in labels if not is_class(label) and _is_joined(label, labels)}
    if suspects:
        line, label = next((n, p) for n, parts in zip(lines, found, strict=True) for p in parts if p in suspects)
        raise DatasetError(
            f"{where}, line {line}: {shown(label)} looks like several labels in one cell, as {len(suspects)} of "
            f"{len(labels)} different labels do. For a multi-label task separate them by {LABEL_SEPARATOR!r}: A;B. If "
            "it is the name of one class, write it in another way, or in Python name all classes: "
            "open_dataset(..., classes=[...])"
        )
    for mark in _JOINTS:
        split = {label: [part.strip() for part in label.split(mark)] for label in labels if not is_class(label)}
        joined = {label: parts for label, parts in split.items() if len(parts) > 1 and all(parts)}
        often = Counter(part for parts in joined.values() for part in set(parts))
        doubtful = [label for label, parts in joined.items() if all(often[part] > 1 for part in parts)]
        if doubtful:
            return [
                f"labels such as {shown(*sorted(doubtful), limit=3)} count as classes of their own; several labels of "
                f"one image are separated by {LABEL_SEPARATOR!r}"
            ]
    return []


def _is_joined(label: str, labels: set[str]) -> bool:
    if "|" in label or _LIST.fullmatch(label):
        return True
    for mark in _JOINTS:
        parts = [part.strip() for part in label.split(mark)]
        if len(parts) > 1 and all(part in labels for part in parts):
            return True
    return False
