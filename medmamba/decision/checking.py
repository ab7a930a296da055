"""Checks decisions on labelled images that chose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..metrics import evaluate
from .benefit import decision_curve
from .conformal import coverage_of
from .operating import indices, performance, positives, score
from .patients import group
from .record import Decisions
from .selective import confidence_of, errors_of, risk_coverage, selected

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
    errors, sure = errors_of(p, truth, task), confidence_of(p, unusual, task)
    for abstention in decisions.abstentions:
        found["abstentions"][abstention.name] = selected(abstention, errors, sure, groups, level).to_dict()
    found["selective"] = risk_coverage(errors, sure, **boot).to_dict()
    found["selective"]["plain_confidence"] = risk_coverage(errors, confidence_of(p, None, task)).aurc
    if groups is not None and decisions.patients:
        combined = group(p, groups, truth, decisions.patients["method"], task)
        assert combined.labels is not None
        by_patient = evaluate(
            combined.labels, combined.probabilities, classes, task=task, resamples=resamples, level=level, seed=seed
        )
        alone = evaluate(truth, p, classes, task=task, patients=groups, resamples=resamples, level=level, seed=seed)
        found["patients"] = {
            "method": decisions.patients["method"],
            "groups": len(combined),
            "mixed": combined.mixed,
            "overall": by_patient.to_dict()["overall"],
            "images": alone.to_dict()["overall"],
        }
    return found
