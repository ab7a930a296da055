"""Intervals of proportions of 0 and 1, where every resample of a bootstrap gives the same.

Six of six images found are no proof that all would be: resampling the six gives 1 each time, so that the bootstrap says
nothing. Wilson's interval (1927, doi:10.1080/01621459.1927.10502953) does: 0.61 to 1.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from .scores import Ints

if TYPE_CHECKING:
    from .evaluate import Scorer

Limits = tuple[float, float]

_OF_ALL = ("accuracy", "subset_accuracy", "accuracy_at_half")
_MEANS = {"balanced_accuracy": "sensitivity", "sensitivity": "sensitivity", "precision": "precision"}


def wilson(share: float, n: float, level: float) -> Limits:
    """Returns the limits of Wilson's interval of a proportion in [0, 1] of n > 0 trials."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the limit is exactly that; rounding must not move it past the estimate.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def limits_of(scorer: Scorer, name: str, index: int | None, value: float, unit_of: Ints, level: float) -> Limits | None:
    """Returns the interval of a score of 0 or 1, or None where the score is no proportion.

    Units (patients, else images) are the trials: all images of a unit count as one. Means over classes of proportions
    of different images (sensitivity and with it balanced accuracy, precision) get their interval from those of the
    classes by the method of variance estimates recovery (Donner and Zou, Stat Methods Med Res 2012, 21:347), that of
    specificity, whose images overlap, the mean of the limits, which is too wide rather than too narrow.

    Args:
        name: of a score of `Scorer.under`.
        index: of the class; None for an overall score.
        value: 0 or 1.
        unit_of: `(N,)` unit of each image.
        level: coverage.
    """
    if index is not None or name in _OF_ALL:
        n = _trials(scorer, name.removeprefix("class_"), index, unit_of)
        return wilson(value, n, level) if n else None
    if scorer.multilabel or name not in (*_MEANS, "specificity"):
        return None
    of_class = _MEANS.get(name, name)
    trials = [_trials(scorer, of_class, i, unit_of) for i in np.flatnonzero(scorer.support).tolist()]
    if not all(trials):
        return None
    gaps = np.array([abs(value - wilson(value, n, level)[0 if value else 1]) for n in trials])
    gap = float(gaps.mean() if name == "specificity" else np.sqrt((gaps**2).sum()) / len(gaps))
    return (1 - gap, 1.0) if value else (0.0, gap)


def _trials(scorer: Scorer, name: str, index: int | None, unit_of: Ints) -> int:
    """Returns how many units a proportion is of; 0 where the score is no proportion."""
    if index is None:
        return len(np.unique(unit_of))
    shown = scorer.shown[:, index] if scorer.multilabel else scorer.truth == index
    said = scorer.said[:, index] if scorer.multilabel else scorer.said == index
    images = {"sensitivity": shown, "specificity": ~shown, "precision": said, "npv": ~said}.get(name)
    return 0 if images is None else len(np.unique(unit_of[images]))
