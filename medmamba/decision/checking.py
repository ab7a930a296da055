"""Checks decisions on labelled images that chose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..metrics import Evaluation, evaluate
from .benefit import decision_curve
from .conformal import coverage_of
from .operating import indices, performance, positives, score
from .patients import METHODS, Grouped, group
from .record import Decisions
from .selective import confidence_of, errors_of, risk_coverage, selected
from .thresholds import DecisionError

CURVE_THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 50))


def check(
    decisions: Decisions,
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    task: str = "multiclass",
    groups: Sequence[str | None] | None = None,
    unusual: ArrayLike | None = None,
    prevalence: float | None = None,
    threshold: ArrayLike = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns how decisions fare on labelled images, as plain data.

    Args:
        decisions: of the model; none for the risk-coverage curve alone.
        probabilities: `(N, K)`, calibrated.
        labels: `(N,)` or `(N, K)`.
        classes: K names.
        task: "multiclass" or "multilabel".
        groups: patient of each image.
        unusual: `(N,)` flags of the out-of-distribution detector; None where they are not known.
        prevalence: for predictive values and decision curves; default: that of the images.
        threshold: of a multi-label task, above which a label counts as present.
        resamples, level, seed: of the bootstrap.

    Returns:
        "operating_points", "sets" and "abstentions" by name, "selective", and "patients" where images are combined.
    """
    p, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    boot: dict[str, Any] = dict(groups=groups, resamples=resamples, level=level, seed=seed)
    found: dict[str, Any] = {"operating_points": {}, "sets": {}, "abstentions": {}}
    for point in decisions.points:
        at = performance(p, truth, classes, point, task=task, groups=groups, prevalence=prevalence, level=level)
        wanted = indices(point.classes, classes)
        shown = positives(truth, wanted)
        row: dict[str, Any] = {"classes": list(point.classes), **at.to_dict()}
        if shown.any() and not shown.all():
            curve = decision_curve(score(p, wanted, task), shown, CURVE_THRESHOLDS, prevalence=prevalence, **boot)
            row["net_benefit"] = {**curve.to_dict(), "useful": curve.useful()}
        found["operating_points"][point.name] = row
    for sets in decisions.sets:
        covered = coverage_of(sets, p, truth, classes, task=task, groups=groups, level=level)
        found["sets"][sets.name] = {**covered.to_dict(), "statement": sets.statement(classes)}
    errors, sure = errors_of(p, truth, task, threshold), confidence_of(p, unusual, task)
    for abstention in decisions.abstentions:
        found["abstentions"][abstention.name] = selected(abstention, errors, sure, groups, level).to_dict()
    found["selective"] = risk_coverage(errors, sure, **boot).to_dict()
    found["selective"]["plain_confidence"] = risk_coverage(errors, confidence_of(p, None, task)).aurc
    if groups is not None and decisions.patients:
        method = decisions.patients["method"]
        settings: dict[str, Any] = dict(task=task, threshold=threshold, resamples=resamples, level=level, seed=seed)
        combined, by_patient = evaluate_patients(p, truth, classes, groups, method, **settings)
        alone = evaluate(truth, p, classes, patients=groups, **settings)
        found["patients"] = {
            "method": method,
            "groups": len(combined),
            "mixed": combined.mixed,
            "overall": by_patient.to_dict()["overall"],
            "images": alone.to_dict()["overall"],
        }
    return found


def evaluate_patients(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    groups: Sequence[str | None],
    method: str = METHODS[0],
    **options: Any,
) -> tuple[Grouped, Evaluation]:
    """Returns one answer per patient, and the metrics of these answers with intervals over patients.

    Args:
        probabilities: `(N, K)` of images, calibrated.
        labels: `(N,)` or `(N, K)`.
        classes: K names.
        groups: patient of each image; an image without one counts as a patient of its own.
        method: how the images are combined, see `combine`.
        options: further arguments of `medmamba.metrics.evaluate`.

    Raises:
        DecisionError: no image has a patient, lengths that do not match, or an unknown method.
    """
    if not any(one is not None for one in groups):
        raise DecisionError("no patient is known of any image: name the dataset, or give a pattern for file names")
    combined = group(probabilities, groups, labels, method, options.get("task", "multiclass"))
    assert combined.labels is not None
    return combined, evaluate(combined.labels, combined.probabilities, classes, **options)
