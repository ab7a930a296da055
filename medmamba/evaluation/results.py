"""Scores logits, and writes and reads the results as JSON, Markdown and PNG."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..config import MedMambaConfig
from ..data import ImageDataset, registry
from ..decision import Decisions
from ..decision.checking import check
from ..decision.tables import decided_tables
from ..metrics import Evaluation, evaluate
from ..metrics.calibration import to_probabilities
from ..metrics.group_result import Subgroups
from ..utils.files import write_text
from .by_patient import ByPatient, score_patients
from .corruptions import CORRUPTIONS_NAME, Corruptions

if TYPE_CHECKING:
    import matplotlib.figure

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Scored:
    """Logits of a model for a labelled dataset, and their metrics.

    Attributes:
        evaluation: metrics of the calibrated probabilities.
        uncalibrated: metrics without temperature scaling; None if the model has no calibration.
        labels: (N,) or (N, K) as in the dataset.
        logits: (N, K) float32.
        notes: what was skipped, merged or guessed when the images were listed (`ImageDataset.notes`).
        subgroups: metrics of each subgroup, if requested.
        corruptions: errors on corrupted images, if requested.
        by_patient: metrics of one answer per patient, if requested.
        decided: the risk-coverage curve, and how the operating points and sets of the model fare (`decision.checking`).
        decisions: those of the model.
    """

    evaluation: Evaluation
    uncalibrated: Evaluation | None
    labels: np.ndarray
    logits: np.ndarray
    notes: tuple[str, ...] = ()
    subgroups: Subgroups | None = None
    corruptions: Corruptions | None = None
    by_patient: ByPatient | None = None
    decided: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decisions: Decisions = dataclasses.field(default_factory=Decisions)

    def to_dict(self) -> dict[str, Any]:
        """Returns the evaluation as plain data, with the metrics that calibration changed under "uncalibrated"."""
        data = self.evaluation.to_dict()
        if self.uncalibrated:
            data["uncalibrated"] = {name: self.uncalibrated[name] for name in ("ece", "brier", "nll")}
        if self.subgroups:
            data["subgroups"] = self.subgroups.to_dict()
        if self.by_patient:
            data["by_patient"] = self.by_patient.to_dict()
        return data

    def to_markdown(self) -> str:
        """Returns the tables of the evaluation: of decisions, patients, subgroups and corruptions."""
        text = self.evaluation.to_markdown()
        if self.decided:
            text += decided_tables(self.decisions, self.decided, self.evaluation.classes)
        if self.by_patient:
            text += f"\n## One answer per {self.evaluation.unit}\n\n{self.by_patient.to_markdown(self.decisions)}"
        if self.subgroups:
            text += f"\n## Subgroups\n\n{self.subgroups.to_markdown()}"
        if self.corruptions:
            text += f"\n## Corruptions\n\n{self.corruptions.to_markdown()}"
        return text


def score(
    logits: torch.Tensor,
    dataset: ImageDataset,
    config: MedMambaConfig,
    *,
    unusual: ArrayLike | None = None,
    per_patient: bool = False,
    combine: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    context: dict[str, Any] | None = None,
) -> Scored:
    """Scores logits (N, K) by the temperature and, for several labels, the thresholds in `config.calibration`.

    Args:
        unusual: (N,) whether each image is unlike the training images. Without them abstentions that are stored with
            the model are not checked, since they depend on it.
        per_patient: also scores one answer per patient.
        combine: how the images of a patient are combined; None: as chosen on validation, else the mean of the logits.
    """
    patients = dataset.patients
    unit = registry.group_unit(dataset.name)
    options: dict[str, Any] = dict(task=config.task, patients=patients if any(patients) else None, seed=seed, unit=unit)
    temperature = float(config.calibration.get("temperature", 1.0))
    raw = logits.numpy()
    context = {**(context or {}), "temperature": temperature}
    limits = config.calibration.get("thresholds", 0.5)
    found = evaluate(
        dataset.labels,
        to_probabilities(raw, config.task, temperature),
        config.labels,
        resamples=resamples,
        context=context,
        threshold=limits,
        **options,
    )
    before = None
    if config.calibration:
        before = evaluate(dataset.labels, to_probabilities(raw, config.task), config.labels, resamples=0, **options)
    decisions = Decisions.from_config(config)
    if unusual is None:
        decisions = dataclasses.replace(decisions, abstentions=())
    shares = to_probabilities(raw, config.task, temperature)
    groups = options["patients"]
    decided = check(
        decisions,
        shares,
        dataset.labels,
        config.labels,
        task=config.task,
        groups=groups,
        unusual=unusual,
        threshold=limits,
        resamples=min(resamples, 200),
        seed=seed,
    )
    decided["data"] = {"name": dataset.name, "split": str(context.get("split", "all")), "images": len(raw)}
    scored = Scored(found, before, dataset.labels, raw, dataset.notes, decided=decided, decisions=decisions)
    if not per_patient:
        return scored
    by_patient = score_patients(
        shares,
        dataset.labels,
        patients,
        decisions,
        config.labels,
        combine=combine,
        unusual=None if unusual is None else np.asarray(unusual),
        context=context,
        task=config.task,
        threshold=limits,
        resamples=resamples,
        seed=seed,
        unit=unit,
    )
    return dataclasses.replace(scored, by_patient=by_patient)


def write_results(folder: str | os.PathLike, splits: dict[str, Scored], **record: Any) -> Path:
    """Writes `results.md`, figures of the last split and, once these are in place, `results.json`; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    *_, (last, scored) = splits.items()
    for name, figure in figures(scored, last).items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    sections = [f"## {name}\n\n{result.to_markdown()}" for name, result in splits.items()]
    write_text(folder / "results.md", "\n".join(sections))
    if scored.corruptions:
        scored.corruptions.save(folder / CORRUPTIONS_NAME)
    decided = {name: dict(result.decided) for name, result in splits.items() if result.decided}
    data = {**record, "decisions": decided, "splits": {name: result.to_dict() for name, result in splits.items()}}
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(folder / RESULTS_NAME, text)


def evaluations(results: Mapping[str, Any]) -> dict[str, Evaluation]:
    """Returns the evaluation of each split from the content of a `results.json`.

    Raises:
        AttributeError, KeyError, TypeError: the content was not written by `write_results`.
    """
    fields = {f.name for f in dataclasses.fields(Evaluation)}
    return {
        split: Evaluation.from_dict({key: value for key, value in data.items() if key in fields})
        for split, data in results.get("splits", {}).items()
    }


def figures(scored: Scored, title: str = "") -> dict[str, matplotlib.figure.Figure]:
    """Draws the ROC curves, the reliability diagram and, for one class per image, the confusion matrix, by name."""
    from ..metrics.plots import confusion_matrix_figure, reliability_figure, roc_figure

    task = scored.evaluation.task
    curves = {"as trained": to_probabilities(scored.logits, task)}
    if scored.uncalibrated:
        curves["calibrated"] = to_probabilities(scored.logits, task, scored.evaluation.context["temperature"])
    found = {
        "roc": roc_figure(scored.labels, curves["as trained"], scored.evaluation.classes, title=title),
        "reliability": reliability_figure(scored.labels, curves, title=title),
    }
    if task != "multilabel":
        found["confusion"] = confusion_matrix_figure(scored.evaluation, title=title)
    return found
