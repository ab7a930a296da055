"""Decision curves: the net benefit of acting on a model's answers (Vickers and Elkin, Med Decis Making 2006)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.bootstrap import bootstrap_weights, resampling_units
from .thresholds import DecisionError

THRESHOLDS = tuple(round(0.01 * i, 2) for i in range(1, 100))


@dataclass(frozen=True, eq=False)
class DecisionCurve:
    """Net benefit, in true positives per image, at each threshold probability `(T,)`.

    At a threshold probability t a false positive is worth t / (1 - t) true positives: whoever would act from a
    probability of 10 % accepts nine false alarms for one find.

    Attributes:
        thresholds: threshold probabilities.
        model: of acting where the probability is at least t.
        low, high: limits of its bootstrap interval; NaN without resamples.
        treat_all: of acting on every image; acting on none has a net benefit of 0.
        prevalence: to which the images were weighted.
    """

    thresholds: NDArray[np.float64]
    model: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    treat_all: NDArray[np.float64]
    prevalence: float

    def useful(self) -> list[tuple[float, float]]:
        """Returns the ranges of thresholds at which the model is better than acting on all images and on none."""
        better = self.model > np.maximum(self.treat_all, 0) + 1e-12
        edges = np.flatnonzero(np.diff(np.concatenate([[False], better, [False]]).astype(int)))
        return [
            (float(self.thresholds[start]), float(self.thresholds[stop - 1]))
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        names = ("thresholds", "model", "low", "high", "treat_all")
        rows = {name: [None if np.isnan(v) else float(v) for v in getattr(self, name)] for name in names}
        return {**rows, "prevalence": self.prevalence}


def decision_curve(
    probabilities: ArrayLike,
    truth: ArrayLike,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    prevalence: float | None = None,
    groups: Sequence[str | None] | None = None,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> DecisionCurve:
    """Returns the net benefit at each threshold t.

    It is sensitivity * prevalence - (1 - specificity) * (1 - prevalence) * t / (1 - t).

    Args:
        probabilities: `(N,)` calibrated, see `operating.score`.
        truth: `(N,)` of 0 and 1.
        thresholds: threshold probabilities in (0, 1).
        prevalence: of the population to decide for; default: that of the images.
        groups: patient of each image, which are resampled together.
        resamples: of the bootstrap, stratified by truth; 0: no intervals.
        level: coverage of the intervals, at each threshold.
        seed: of the bootstrap.

    Raises:
        DecisionError: values out of range, or images of one kind only.
    """
    p, shown = np.asarray(probabilities, dtype=np.float64), np.asarray(truth).astype(bool)
    t = np.asarray(thresholds, dtype=np.float64)
    if p.ndim != 1 or p.shape != shown.shape or not np.isfinite(p).all():
        raise DecisionError(f"probabilities {p.shape} and truth {shown.shape} do not match, or are not finite")
    if not shown.any() or shown.all():
        raise DecisionError("a decision curve needs positive and negative images")
    if t.ndim != 1 or len(t) == 0 or not ((t > 0) & (t < 1)).all():
        raise DecisionError("thresholds must be between 0 and 1")
    share = float(shown.mean()) if prevalence is None else prevalence
    if not 0 < share < 1:
        raise DecisionError(f"prevalence must be between 0 and 1, got {prevalence}")
    odds = t / (1 - t)
    called = (p[:, None] >= t).astype(np.float64)  # (N, T)

    def benefit(weights: NDArray[Any]) -> NDArray[np.float64]:
        found, alarms = weights * shown, weights * ~shown
        se = found @ called / found.sum(axis=1, keepdims=True)
        fpr = alarms @ called / alarms.sum(axis=1, keepdims=True)
        return share * se - (1 - share) * fpr * odds

    low = high = np.full(len(t), np.nan)
    if resamples:
        units, strata = resampling_units(shown.astype(np.int64), groups)
        rows = np.concatenate([benefit(w) for w in bootstrap_weights(units, strata, resamples, seed)])
        low, high = np.nanquantile(rows, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return DecisionCurve(t, benefit(np.ones((1, len(p))))[0], low, high, share - (1 - share) * odds, share)
