"""`Subgroups`: metrics of every subgroup and the tests between them, as JSON and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .result import TITLES, Estimate, Evaluation, plain, table

TESTED = ("balanced_accuracy", "auroc", "ece")
"""Metrics that are tested by default: decisions, ranking, calibration."""

MISSING = "(missing)"
SMALL, FEW = 30, 10
"""A group of fewer images, or with fewer images of a class, is called small. Below `FEW` images it is not tested."""


@dataclass(frozen=True)
class GroupTest:
    """Comparison of a group with the other images.

    Attributes:
        metric: name of the metric.
        others: its value for the images outside the group.
        difference: value in the group minus that outside, with a bootstrap interval.
        p: of the permutation test; NaN where a metric is undefined.
        holm: adjusted for all tests, family-wise error.
        bh: adjusted for all tests, false discovery rate.
    """

    metric: str
    others: float
    difference: Estimate
    p: float
    holm: float = math.nan
    bh: float = math.nan


@dataclass(frozen=True)
class Group:
    """A group of images.

    Attributes:
        column: such as "sex".
        name: such as "female".
        evaluation: of its images.
        confidence: mean confidence minus accuracy: above 0, the model is overconfident in this group.
        tests: one per tested metric; empty for a column with a single group.
        warnings: why its numbers are unreliable.
    """

    column: str
    name: str
    evaluation: Evaluation
    confidence: float
    tests: tuple[GroupTest, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Subgroups:
    """Result of `evaluate_subgroups`.

    Attributes:
        groups: of all columns, in the order given.
        gaps: largest difference between two groups, by column and metric; small groups and missing values take no part.
        alpha: level of the tests.
        permutations: of each test; 0: no tests.
        notes: how columns were read: cut points, merged values.
    """

    groups: tuple[Group, ...]
    gaps: Mapping[str, Mapping[str, float]]
    alpha: float
    permutations: int
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(group.column for group in self.groups))

    def of(self, column: str) -> list[Group]:
        """Returns the groups of a column."""
        return [group for group in self.groups if group.column == column]

    @property
    def findings(self) -> list[tuple[Group, GroupTest]]:
        """Groups that differ from the others after Holm's correction."""
        return [(group, test) for group in self.groups for test in group.tests if test.holm <= self.alpha]

    @property
    def n_tests(self) -> int:
        return sum(not math.isnan(test.p) for group in self.groups for test in group.tests)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        return {
            "alpha": self.alpha,
            "permutations": self.permutations,
            "correction": "holm",
            "n_tests": self.n_tests,
            "notes": list(self.notes),
            "gaps": {column: plain(gaps) for column, gaps in self.gaps.items()},
            "groups": [
                {
                    "column": group.column,
                    "name": group.name,
                    "confidence_minus_accuracy": group.confidence,
                    "warnings": list(group.warnings),
                    "tests": [plain(asdict(test)) for test in group.tests],
                    "evaluation": group.evaluation.to_dict(),
                }
                for group in self.groups
            ],
        }

    def summary(self) -> str:
        """Returns the outcome of the tests in words."""
        if not self.n_tests:
            return "No tests were made."
        found = "; ".join(
            f"{TITLES[test.metric]} of {group.column} {group.name} {test.difference} against the others "
            f"(p {test.p:.2g}, corrected {test.holm:.2g})"
            for group, test in self.findings
        )
        how = (
            f"{self.n_tests} tests against random groups of the same size and classes ({self.permutations} "
            f"permutations), corrected together by Holm's method at {self.alpha:g}"
        )
        return f"{how}: {found or 'no group differs from the others. This does not show that there is no difference'}."

    def to_markdown(self) -> str:
        """Returns one table per column, gaps and the outcome of the tests."""
        lines: list[str] = []
        for column in self.columns:
            header, rows = self.rows(column)
            lines += [f"### By {column}", "", *table(header, rows), ""]
            gaps = [f"{TITLES[name]} {gap:.3f}" for name, gap in self.gaps[column].items() if not math.isnan(gap)]
            lines += [f"Largest gap between groups: {', '.join(gaps)}.", ""] if gaps else []
            lines += [f"- {group.name}: {text}" for group in self.of(column) for text in group.warnings]
            lines += [""]
        return "\n".join([*lines, self.summary(), "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def rows(self, column: str) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of the table of a column."""
        groups = self.of(column)
        metrics = [test.metric for test in groups[0].tests]
        shown = ["accuracy", *dict.fromkeys([*metrics, *TESTED])]
        header = [column, "Images", *(TITLES[name] for name in shown), "Confidence - accuracy"]
        header += [f"p, {TITLES[name]}" for name in metrics]
        rows = []
        for group in groups:
            e = group.evaluation
            row = [group.name + (" *" if group.warnings else ""), str(e.n_images)]
            row += [str(e.overall[name]) for name in shown] + [f"{group.confidence:+.3f}"]
            rows.append(row + [_p_text(test) for test in group.tests])
        return header, rows


def _p_text(test: GroupTest) -> str:
    if math.isnan(test.p):
        return "n/a"
    return f"{test.p:.2g} (corrected {test.holm:.2g})"
