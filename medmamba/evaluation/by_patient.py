"""Scores one answer per patient, with intervals over patients, and what is decided about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import DatasetError, ImageDataset
from ..decision import METHODS, Decisions
from ..decision.checking import check, evaluate_patients
from ..decision.patients import mostly
from ..decision.tables import decided_tables
from ..metrics import Evaluation


@dataclass(frozen=True)
class ByPatient:
    """Metrics of one answer per patient.

    Attributes:
        evaluation: metrics and intervals; what it calls images are patients.
        method: how the images of a patient are combined, see `medmamba.decision.combine`.
        chosen: whether the method was chosen on validation images.
        mixed: patients whose images have different labels; they count as the most frequent one.
        decided: how the decisions of the model fare with one answer per patient (`decision.checking`).
    """

    evaluation: Evaluation
    method: str
    chosen: bool
    mixed: int
    decided: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        known = {"method": self.method, "chosen": self.chosen, "mixed": self.mixed, "decided": dict(self.decided)}
        return {**self.evaluation.to_dict(), **known}

    def to_markdown(self, decisions: Decisions) -> str:
        """Returns the tables of the metrics, and of the decisions."""
        how = "chosen on validation" if self.chosen else "not chosen on validation: see `medmamba decide`"
        text = f"Images of a {self.evaluation.unit} are combined by {self.method} ({how}).\n\n"
        if self.mixed:
            text += f"{self.mixed} have images of different classes, and count as the most frequent of these.\n\n"
        return (
            text + self.evaluation.to_markdown() + decided_tables(decisions, self.decided, self.evaluation.classes, 3)
        )


def score_patients(
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str | None],
    decisions: Decisions,
    classes: Sequence[str],
    *,
    combine: str | None = None,
    unusual: np.ndarray | None = None,
    context: Mapping[str, Any] | None = None,
    **options: Any,
) -> ByPatient:
    """Combines the images of each patient, as `predict_groups` does, and scores the answers.

    Args:
        probabilities: `(N, K)`, calibrated.
        labels: `(N,)` or `(N, K)`.
        groups: patient of each image.
        decisions: of the model; also name the method that was chosen on validation.
        classes: K names.
        combine: another method.
        unusual: `(N,)` flags; a patient is unusual if most of the images are.
        context: stored with the evaluation.
        options: further arguments of `medmamba.metrics.evaluate`: task, threshold, resamples, seed, unit.

    Raises:
        DecisionError: no patient is known, or an unknown method.
    """
    chosen = (decisions.patients or {}).get("method")
    method = combine or chosen or METHODS[0]
    found, evaluation = evaluate_patients(
        probabilities,
        labels,
        classes,
        groups,
        method,
        context={**(context or {}), "one_answer_per": "patient"},
        **options,
    )
    assert found.labels is not None
    decided = check(
        dataclasses.replace(decisions, patients=None),
        found.probabilities,
        found.labels,
        classes,
        unusual=mostly(unusual, groups),
        **{name: value for name, value in options.items() if name in ("task", "threshold", "resamples", "seed")},
    )
    decided["data"] = {"split": str((context or {}).get("split", "all"))}
    return ByPatient(evaluation, method, method == chosen, found.mixed, decided)


def with_patients(dataset: ImageDataset) -> ImageDataset:
    """Returns the dataset with patients: those it knows, else those in its DICOM files, as numbers.

    No identifier is kept: patients are numbered in order of their first image.

    Raises:
        DatasetError: no patient is known, and none can be read from DICOM files.
    """
    if any(dataset.patients):
        return dataset
    file_of = getattr(dataset.reader, "file_of", None)
    files = [] if file_of is None else [file_of(record) for record in dataset.records]
    numbers: Sequence[int | None] = ()
    if files and all(file.suffix.lower() in _DICOM for file in files):
        from ..imaging.dicom.studies import group_files

        numbers = group_files(files, "patient")
    if not any(number is not None for number in numbers):
        raise DatasetError(
            f"{dataset.name}: no patient is known, so that there can be no answer per patient; name the dataset "
            "(--dataset), give a pattern of file names (--patient-pattern), or a CSV file with a column of patients"
        )
    named = [None if number is None else f"patient {number + 1}" for number in numbers]
    pairs = zip(dataset.records, named, strict=True)
    return dataset.with_records([dataclasses.replace(record, patient=name) for record, name in pairs])


_DICOM = ("", ".dcm", ".dicom", ".ima")
