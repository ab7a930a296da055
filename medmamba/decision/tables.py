"""Decisions as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .operating import OperatingPoint
from .record import Decisions
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


def decided_tables(decisions: Decisions, checked: Mapping[str, Any], classes: Sequence[str], level: int = 2) -> str:
    """Returns Markdown with how decisions fare: operating points, sets, abstaining with the risk-coverage curve.

    Args:
        checked: of `decision.checking.check`, with "data" as there.
        level: of the headings.
    """
    mark, text = "#" * level, ""
    if decisions.points:
        text += f"\n{mark} Operating points\n\n" + "\n".join(points_table(decisions.points, checked)) + "\n"
    for sets in decisions.sets:
        table = coverage_table(checked["sets"][sets.name])
        text += "\n".join([f"\n{mark} {sets.name}\n\n{sets.statement(classes)}\n", *table, ""])
    text += f"\n{mark} Abstaining\n\n{risk_text(checked['selective'])}\n\n"
    text += "\n".join(risk_table(checked["selective"])) + "\n"
    if decisions.abstentions:
        text += "\n" + "\n".join(abstention_table(decisions.abstentions, checked)) + "\n"
    return text


SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def risk_table(curve: Mapping[str, Any]) -> list[str]:
    """Returns rows of a Markdown table of the risk-coverage curve: errors among the surest images."""
    coverage, risk = curve["coverage"], curve["risk"]
    rows = [[], []]  # type: list[list[str]]
    for share in SHARES:
        at = next(i for i, value in enumerate([*coverage[:-1], 1.0]) if value >= share - 1e-12)
        rows[0].append(f"{coverage[at]:.0%}")
        rows[1].append(f"{risk[at]:.3f}")
    head = f"| answered, the most certain first | {' | '.join(rows[0])} |"
    return [head, "| --- " * (len(SHARES) + 1) + "|", f"| of which wrong | {' | '.join(rows[1])} |"]


def risk_text(curve: Mapping[str, Any]) -> str:
    """Returns the area under a risk-coverage curve in words."""
    interval = f" ({curve['low']:.4f} to {curve['high']:.4f})" if "low" in curve else ""
    return (
        f"Area under the risk-coverage curve: {curve['aurc']:.4f}{interval}, {curve['excess']:.4f} above that of an "
        "ideal order."
    )
