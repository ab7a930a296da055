"""Decisions as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .operating import OperatingPoint
from .selective import Abstention


def points_table(points: Sequence[OperatingPoint], checked: Mapping[str, Any] | None = None) -> list[str]:
    """Returns rows of a Markdown table of operating points: on validation, and where checked on test."""
    rows = [
        "| name | positive | rule | threshold | images | sensitivity | specificity | PPV | NPV |",
        "| --- " * 9 + "|",
    ]
    for point in points:
        c = point.counts
        head = f"| {point.name} | {' or '.join(point.classes)} | {point.rule} | {point.threshold:.4f} |"
        rows.append(f"{head} validation | {c.sensitivity()} | {c.specificity()} | | |")
        if checked and (row := checked["operating_points"].get(point.name)):
            cells = [shown(row[name]) for name in ("sensitivity", "specificity", "ppv", "npv")]
            rows.append(f"| | | | | {checked['data']['split']} | {' | '.join(cells)} |")
    return rows


def coverage_table(row: Mapping[str, Any]) -> list[str]:
    """Returns rows of a Markdown table of the coverage of sets, overall and by class."""
    rows = ["| class | images | sets that hold it |", "| --- " * 3 + "|"]
    rows += [f"| {one['name']} | {one['images']} | {shown(one)} |" for one in row["by_class"]]
    total = sum(one["images"] for one in row["by_class"])
    sizes = ", ".join(f"{n} of size {size}" for size, n in enumerate(row["sizes"]) if n)
    rows.append(f"| all | {total} | {shown(row['overall'])} |")
    return [*rows, "", f"Mean size of a set: {row['mean_size']:.2f} classes ({sizes})."]


def abstention_table(abstentions: Sequence[Abstention], checked: Mapping[str, Any] | None = None) -> list[str]:
    """Returns rows of a Markdown table of abstentions."""
    rows = ["| name | images | get an answer | of which wrong | wrong without abstaining |", "| --- " * 5 + "|"]
    for entry in abstentions:
        share = entry.errors / entry.answered if entry.answered else float("nan")
        rows.append(f"| {entry.name} | validation | {entry.answered / entry.n:.3f} | {share:.3f} | |")
        if checked and (row := checked["abstentions"].get(entry.name)):
            cells = [shown(row["coverage"]), shown(row["risk"]), f"{row['full_risk']:.3f}"]
            rows.append(f"| | {checked['data']['split']} | {' | '.join(cells)} |")
    return rows


def shown(row: Mapping[str, Any]) -> str:
    """Returns an estimate in plain data with its interval as text."""
    if row["value"] is None:
        return "n/a"
    interval = "" if row.get("low") is None else f" ({row['low']:.3f} to {row['high']:.3f})"
    return f"{row['value']:.3f}{interval}"


def risk_text(curve: Mapping[str, Any]) -> str:
    """Returns the area under a risk-coverage curve in words."""
    interval = f" ({curve['low']:.4f} to {curve['high']:.4f})" if "low" in curve else ""
    return (
        f"Area under the risk-coverage curve: {curve['aurc']:.4f}{interval}, {curve['excess']:.4f} above that of an "
        "ideal order."
    )
