"""`Evaluation`: metrics of a model on a dataset with intervals, as JSON and Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.text import printable

PAPER_COLUMNS = ("precision", "sensitivity", "specificity", "f1", "accuracy", "auroc")
"""The columns of the published table, in its order."""

MACRO = ("precision", "sensitivity", "specificity", "f1", "auroc", "auprc")
"""Overall metrics that are macro averages, that is, means over the classes."""

MAX_TABLE = 50
"""The largest number of classes for which Markdown tables include the confusion matrix."""

TITLES = {
    "accuracy": "Accuracy",
    "subset_accuracy": "Subset accuracy",
    "accuracy_at_half": "Accuracy at a threshold of 0.5",
    "quadratic_kappa": "Quadratic-weighted kappa",
    "mae": "Mean absolute error in grades",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "npv": "NPV",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "ECE",
    "brier": "Brier score",
    "nll": "Log loss",
}

_ACCURACIES = ("accuracy", "subset_accuracy", "accuracy_at_half", "balanced_accuracy")
_PROPORTIONS = (*_ACCURACIES, "precision", "sensitivity", "specificity", "npv")


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval, of the bootstrap or, of a proportion of 0 or 1, Wilson's; NaN where undefined."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "n/a"
        interval = "" if math.isnan(self.low) else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class ClassResult:
    """Metrics of one class against the rest. `support` is the number of images of that class."""

    name: str
    support: int
    scores: Mapping[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        task: "multiclass", "multilabel" or "ordinal".
        classes: names in the order of the label indices.
        n_images: number of images.
        n_patients: number of patients, or of other groups (see `unit`); None where unknown.
        overall: metrics by name. Precision, sensitivity, specificity, F1, AUROC and AUPRC are macro averages over the
            classes that occur.
        per_class: one row per class.
        confusion: `K x K` counts, row: true class, column: predicted; multi-label: `K x 2 x 2`, [[tn, fp], [fn, tp]].
        resamples: bootstrap resamples of the intervals; 0: no intervals.
        level: coverage of the intervals.
        resampled_by: "image" or "patient".
        seed: of the bootstrap.
        threshold: probability above which a label is predicted, in multi-label tasks; a tuple: one per label.
        ece_bins: bins of the ECE.
        notes: caveats, such as classes without images.
        context: further information on the evaluation: model, dataset, split, date.
        unit: what `n_patients` counts: "patient", "lesion", "group".
    """

    task: str
    classes: tuple[str, ...]
    n_images: int
    n_patients: int | None
    overall: Mapping[str, Estimate]
    per_class: tuple[ClassResult, ...]
    confusion: tuple[Any, ...]
    resamples: int
    level: float
    resampled_by: str
    seed: int
    threshold: float | tuple[float, ...] | None
    ece_bins: int
    notes: tuple[str, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "patient"

    def __getitem__(self, name: str) -> float:
        """Returns the value of an overall metric: `evaluation["auroc"]`."""
        return self.overall[name].value

    @property
    def has_wilson(self) -> bool:
        """Whether some intervals are not of the bootstrap but Wilson's: those of proportions of 0 and 1."""
        scores = [self.overall, *(row.scores for row in self.per_class)]
        found = [each[name] for each in scores for name in _PROPORTIONS if name in each]
        # Resamples without a prediction of a class have a precision of 0, so the bootstrap may give 0 to 1 for 1.
        return any(score.value in (0, 1) and (0 < score.low < 1 or 0 < score.high < 1) for score in found)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Loads the result of `to_dict`.

        Raises:
            KeyError, TypeError: missing or unknown fields.
        """
        values = dict(data)
        values["overall"] = {name: _estimate(row) for name, row in values["overall"].items()}
        values["per_class"] = tuple(
            ClassResult(row["name"], row["support"], {name: _estimate(score) for name, score in row["scores"].items()})
            for row in values["per_class"]
        )
        values["classes"], values["notes"] = tuple(values["classes"]), tuple(values["notes"])
        values["confusion"], values["threshold"] = _tuples(values["confusion"]), _tuples(values["threshold"])
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns JSON text, and writes it to `path` if given."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Evaluation:
        """Loads from a file, or from JSON text (which starts with a brace)."""
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        return cls.from_dict(json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8")))

    def to_markdown(self) -> str:
        """Returns tables of overall metrics, classes and the confusion matrix, for a model card or a terminal."""
        things = f"{self.unit}s" if "one_answer_per" in self.context else "images"
        who = f"{self.n_images} {things}" + (
            f" of {self.n_patients} {self.unit}s" if self.n_patients is not None else ""
        )
        lines = [f"{who}, {len(self.classes)} classes. {self._interval_text()}", ""]
        lines += table(["Score", "Value"], [[overall_title(name), str(score)] for name, score in self.overall.items()])
        columns = list(self.per_class[0].scores) if self.per_class else []
        rows = [[row.name, str(row.support), *(str(row.scores[name]) for name in columns)] for row in self.per_class]
        header = ["Class", things.capitalize(), *(TITLES[name] for name in columns)]
        if isinstance(self.threshold, tuple):
            header.insert(2, "Threshold")
            for row, limit in zip(rows, self.threshold, strict=True):
                row.insert(2, f"{limit:.3g}")
        lines += ["", *table(header, rows)]
        if self.task != "multilabel" and len(self.classes) > MAX_TABLE:
            lines += ["", f"The confusion matrix of {len(self.classes)} classes is in `confusion`, not printed here."]
        elif self.task != "multilabel":
            matrix = [[name, *map(str, row)] for name, row in zip(self.classes, self.confusion, strict=True)]
            lines += ["", "Rows: true class. Columns: predicted class.", ""]
            lines += table(["", *self.classes], matrix)
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def _interval_text(self) -> str:
        if not self.resamples:
            return "No intervals."
        unit = "image" if self.resampled_by == "image" and "one_answer_per" not in self.context else self.unit
        by = f"by {unit}" + (", stratified by class" if self.task != "multilabel" else "")
        text = f"In brackets: {self.level:.0%} bootstrap interval ({self.resamples} resamples {by}, seed {self.seed})"
        return f"{text}; of proportions of 0 and 1 Wilson's." if self.has_wilson else f"{text}."


def overall_title(name: str) -> str:
    """Returns the title of an overall metric, which says so if it is a macro average: "Sensitivity, macro average"."""
    return f"{TITLES[name]}, macro average" if name in MACRO else TITLES[name]


def _estimate(row: Mapping[str, float | None]) -> Estimate:
    return Estimate(**{key: math.nan if value is None else value for key, value in row.items()})


def plain(value: Any) -> Any:
    """Returns nested data with lists for tuples, and None for numbers that are not finite, as JSON needs."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)]
