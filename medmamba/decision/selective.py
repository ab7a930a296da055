"""Abstaining: answers that are too uncertain, or for images too unlike the training images, are withheld.

The confidence of an answer is its calibrated probability, and below that of every usual image for one that the
out-of-distribution detector flags: an unusual image can get any probability. Risk-coverage curves and their area after
Geifman and El-Yaniv (2017, arXiv:1705.08500); the threshold for a risk is theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.bootstrap import bootstrap_weights, resampling_units
from .conformal import quantile
from .intervals import Proportion, effective_size, proportion
from .thresholds import DecisionError


def confidence_of(
    probabilities: ArrayLike, unusual: ArrayLike | None = None, task: str = "multiclass"
) -> NDArray[np.float64]:
    """Returns the confidence `(N,)`: the largest probability, minus 2 where an image is unusual.

    For a multi-label task, the mean over labels of max(p, 1 - p).

    Args:
        probabilities: `(N, K)`, calibrated.
        unusual: `(N,)` of bool; None where the model has no detector.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    found = np.maximum(p, 1 - p).mean(axis=1) if task == "multilabel" else p.max(axis=1)
    return found if unusual is None else found - 2.0 * np.asarray(unusual, dtype=bool)


def errors_of(
    probabilities: ArrayLike, labels: ArrayLike, task: str = "multiclass", threshold: ArrayLike = 0.5
) -> NDArray[np.float64]:
    """Returns the error of each answer `(N,)`: 0 or 1; for a multi-label task the share of wrong labels.

    Args:
        threshold: above which a label counts as present, one for all or `(K,)`.
    """
    p, truth = np.asarray(probabilities), np.asarray(labels)
    if task == "multilabel":
        return ((p > np.asarray(threshold)) != truth.astype(bool)).mean(axis=1)
    return (p.argmax(axis=1) != truth).astype(np.float64)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Risk, the mean error of the answers that are given, at every coverage, the share of images that get one.

    Attributes:
        coverage, risk: `(P,)`, at every distinct confidence, most confident first.
        aurc: mean risk over all coverages; lower is better.
        excess: aurc minus that of a confidence that ranks every wrong answer last.
        low, high: limits of the bootstrap interval of aurc; NaN without.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    aurc: float
    excess: float
    low: float = math.nan
    high: float = math.nan

    def at(self, coverage: float) -> float:
        """Returns the risk at the smallest coverage of the curve that is at least this."""
        return float(self.risk[min(int(np.searchsorted(self.coverage, coverage - 1e-12)), len(self.risk) - 1)])

    def to_dict(self, most: int = 101) -> dict[str, Any]:
        """Returns plain data for JSON, with about `most` points of the curve."""
        keep = np.unique(np.searchsorted(self.coverage, np.linspace(0, 1, most)).clip(0, len(self.coverage) - 1))
        data = {"aurc": self.aurc, "excess": self.excess}
        if not math.isnan(self.low):
            data |= {"low": self.low, "high": self.high}
        return {**data, "coverage": self.coverage[keep].tolist(), "risk": self.risk[keep].tolist()}


def risk_coverage(
    errors: ArrayLike,
    confidence: ArrayLike,
    *,
    groups: Sequence[str | None] | None = None,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> RiskCoverage:
    """Returns the risk-coverage curve of errors `(N,)` in [0, 1] and confidences `(N,)`.

    Ties count as if answered in random order.

    Args:
        groups: patient of each image, which are resampled together.
        resamples: of the bootstrap interval of the area; 0: none.
        level, seed: of that.

    Raises:
        DecisionError: shapes that do not match, or no images.
    """
    e, c = np.asarray(errors, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if e.ndim != 1 or e.shape != c.shape or len(e) == 0 or not np.isfinite(c).all():
        raise DecisionError(f"errors {e.shape} and confidences {c.shape} do not match, or are not finite")
    n = len(e)
    order = np.argsort(-c, kind="stable")
    last = np.flatnonzero(np.append(np.diff(c[order]) != 0, True))
    total = np.cumsum(e[order])[last]
    low = high = math.nan
    if resamples:
        units, strata = resampling_units(np.zeros(n, dtype=np.int64), groups)
        weights = bootstrap_weights(units, strata, resamples, seed)
        areas = np.concatenate([_areas(e[order], last, w[:, order]) for w in weights])
        low, high = (float(v) for v in np.quantile(areas, ((1 - level) / 2, (1 + level) / 2)))
    area = float(_areas(e[order], last, np.ones((1, n)))[0])
    best = float(_areas(np.sort(e), np.arange(n), np.ones((1, n)))[0])
    return RiskCoverage((last + 1) / n, total / (last + 1), area, area - best, low, high)


def _areas(e: NDArray, last: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """Returns the mean over images of the risk when each is the last answered, for weights `(R, N)`."""
    first = np.concatenate([[0], last[:-1] + 1])
    mass = np.add.reduceat(weights, first, axis=1).astype(np.float64)  # (R, G)
    wrong = np.add.reduceat(weights * e, first, axis=1).astype(np.float64)
    before, errors = np.cumsum(mass, axis=1) - mass, np.cumsum(wrong, axis=1) - wrong
    rate = np.divide(wrong, mass, out=np.zeros_like(wrong), where=mass > 0)
    # After j of the m images of a tie the expected risk is (errors + rate j) / (before + j); summed over j this is
    # rate m + (errors - rate before) (H(before + m) - H(before)), with the harmonic numbers H.
    start, stop = np.rint(before).astype(np.int64), np.rint(before + mass).astype(np.int64)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(stop.max()) + 1))])
    summed = rate * mass + (errors - rate * before) * (harmonic[stop] - harmonic[start])
    return summed.sum(axis=1) / mass.sum(axis=1)


@dataclass(frozen=True)
class Abstention:
    """A threshold of confidence below which no answer is given.

    Attributes:
        name: by which `predict` is asked for it.
        threshold: an answer is withheld if its confidence (see `confidence_of`) is below this.
        target: {"coverage": c} or {"risk": r}, as chosen.
        answered, n: validation images that get an answer, of how many.
        errors: sum of the errors of those.
        confidence: with which the risk holds, for a target risk; None for a coverage.
    """

    name: str
    threshold: float
    target: Mapping[str, float]
    answered: int
    n: int
    errors: float
    confidence: float | None = None

    def abstains(
        self, probabilities: ArrayLike, unusual: ArrayLike | None = None, task: str = "multiclass"
    ) -> NDArray[np.bool_]:
        """Returns `(N,)`, True where no answer is given."""
        return confidence_of(probabilities, unusual, task) < self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `config.json`."""
        return {
            "name": self.name,
            "threshold": self.threshold,
            "target": dict(self.target),
            "answered": self.answered,
            "n": self.n,
            "errors": self.errors,
            "confidence": self.confidence,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Abstention:
        """Loads the result of `to_dict`, which `medmamba.utils.decision_checks` has checked."""
        return cls(**data)


def choose_abstention(
    errors: ArrayLike,
    confidence: ArrayLike,
    *,
    coverage: float | None = None,
    risk: float | None = None,
    certainty: float = 0.95,
    groups: Sequence[Any] | None = None,
    name: str = "",
) -> Abstention:
    """Chooses the threshold on validation images for a share of answers, or a risk of those given.

    For a coverage, a new image gets an answer with a probability of at least that. For a risk, answers are given as far
    as the risk is at most that with the stated certainty: the upper limits of Clopper and Pearson at the thresholds
    that a bisection tries, with a Bonferroni correction for their number (Geifman and El-Yaniv 2017, algorithm 1).

    Args:
        errors: `(N,)`, 0 or 1 (for a risk), see `errors_of`.
        confidence: `(N,)`, see `confidence_of`.
        coverage: share in (0, 1); or
        risk: in (0, 1).
        certainty: of the risk.
        groups: patient of each image, of which each then counts as one.
        name: default: such as "answers-0.9" or "risk-0.05".

    Raises:
        DecisionError: not one of both targets, or a risk that these images cannot vouch for.
    """
    e, c = np.asarray(errors, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if (coverage is None) == (risk is None):
        raise DecisionError("give a coverage or a risk, and not both")
    if e.ndim != 1 or e.shape != c.shape or len(e) == 0 or not np.isfinite(c).all():
        raise DecisionError(f"errors {e.shape} and confidences {c.shape} do not match, or are not finite")
    for what, value in (("coverage", coverage), ("risk", risk)):
        if value is not None and not 0 < value < 1:
            raise DecisionError(f"{what} must be between 0 and 1, got {value}")
    if coverage is not None:
        cut = -quantile(-c, coverage, groups)
        if not math.isfinite(cut):
            raise DecisionError(f"{len(c)} images are too few to vouch for answers to {coverage:.1%} of new ones")
        target, sure = {"coverage": float(coverage)}, None
    else:
        assert risk is not None
        cut, target, sure = _cut_for_risk(e, c, risk, certainty, groups), {"risk": float(risk)}, certainty
    below = c[c < cut]
    threshold = float((cut + below.max()) / 2) if len(below) else float(cut - 1e-9)
    answered = c >= threshold
    kind, value = next(iter(target.items()))
    name = name or f"{'answers' if kind == 'coverage' else 'risk'}-{value:g}"
    return Abstention(name, threshold, target, int(answered.sum()), len(c), float(e[answered].sum()), sure)


def _cut_for_risk(e: NDArray, c: NDArray, risk: float, certainty: float, groups: Sequence[Any] | None) -> float:
    order = np.argsort(-c, kind="stable")
    of = np.empty(len(c), dtype=object)
    of[:] = [None] * len(c) if groups is None else list(groups)
    steps = max(1, math.ceil(math.log2(len(c))))
    level = 1 - 2 * (1 - certainty) / steps  # two-sided limits, of which the upper is used
    cut, low, high = math.inf, 1, len(c)
    best = 1.0
    for _ in range(steps + 1):
        middle = -(-(low + high) // 2)
        middle = int((c >= c[order[middle - 1]]).sum())  # equal confidences are answered together
        rows = order[:middle]
        worth = effective_size(e[rows], of[rows]) if groups is not None else float(middle)
        wrong = math.ceil(float(e[rows].mean()) * worth - 1e-9)
        limit = proportion(wrong, math.floor(max(worth, wrong)), level, "clopper-pearson").high
        best = min(best, limit)
        if limit <= risk:
            cut, low = float(c[rows].min()), middle
        else:
            high = min(high, middle) - 1
        if low > high:
            break
    if math.isinf(cut):
        raise DecisionError(
            f"{len(c)} validation images with {e.sum():.0f} errors cannot vouch for a risk of {risk:g} with a "
            f"certainty of {certainty:g}; the lowest that was found is {best:.3f}. Take a higher risk, or a coverage"
        )
    return cut


@dataclass(frozen=True)
class Selected:
    """What abstaining does on labelled images: the share that gets an answer, and the risk of those answers."""

    coverage: Proportion
    risk: Proportion
    full_risk: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {"coverage": self.coverage.to_dict(), "risk": self.risk.to_dict(), "full_risk": self.full_risk}


def selected(
    abstention: Abstention,
    errors: ArrayLike,
    confidence: ArrayLike,
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Selected:
    """Checks an abstention on labelled images, such as the test split, with Wilson intervals."""
    e, answered = np.asarray(errors, dtype=np.float64), np.asarray(confidence) >= abstention.threshold
    of = np.empty(len(e), dtype=object)
    of[:] = [None] * len(e) if groups is None else list(groups)

    def share(values: NDArray, rows: NDArray) -> Proportion:
        if not len(values):
            return proportion(0, 0, level)
        worth = effective_size(values, of[rows]) if groups is not None else float(len(values))
        return proportion(float(values.mean()) * worth, worth, level)

    everyone = np.ones(len(e), dtype=bool)
    return Selected(share(answered.astype(float), everyone), share(e[answered], answered), float(e.mean()))
