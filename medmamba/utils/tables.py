"""Cells of CSV files that people open in a spreadsheet."""

from __future__ import annotations

from typing import Any

from .text import printable

# What begins a formula (OWASP, "CSV Injection"), in full width too, which some programs take for the same.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_cell(value: Any) -> Any:
    """Returns what to write for a value: text that a spreadsheet would run as a formula gets an apostrophe before it,
    and characters that cannot be printed are escaped. Numbers stay as they are."""
    if not isinstance(value, str):
        return value
    starts = value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA)
    return ("'" if starts else "") + printable(value)


def csv_row(values: list[Any]) -> list[Any]:
    """Returns `csv_cell` of each value."""
    return [csv_cell(value) for value in values]
