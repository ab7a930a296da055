"""Thresholds of a score, and those above which the labels of a multi-label task count as present."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .scores import Floats


def best_f1_thresholds(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Returns for each label the threshold with the largest F1, `(K,)` in [0, 1]. For validation data only.

    A probability above it counts as present. It is the threshold that the rule "f1" of
    `medmamba.decision.choose_threshold` chooses for the label. A label that no image shows, or every image, keeps 0.5.
    With few positive images the choice is a guess: what it is worth shows on other data.

    Args:
        labels: 0 and 1, `(N, K)`.
        probabilities: `(N, K)` in [0, 1].

    Raises:
        ValueError: shapes that do not match.
    """
    truth, p = np.asarray(labels, dtype=bool), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 2 or truth.shape != p.shape:
        raise ValueError(f"labels and probabilities must be (N, K), got {truth.shape} and {p.shape}")
    return np.array([_best(truth[:, i], p[:, i]) for i in range(truth.shape[1])])


def _best(shown: NDArray[np.bool_], p: Floats) -> float:
    return 0.5 if shown.all() or not shown.any() else best_f1(*steps(p, shown))


def best_f1(cuts: Floats, tp: NDArray, fp: NDArray) -> float:
    """Returns the threshold with the largest F1 among those of `steps`; the middle one of several."""
    return middle_of_best(cuts, 2 * tp / (tp + fp + tp[-1]))


def middle_of_best(cuts: Floats, gain: NDArray) -> float:
    """Returns the threshold of the largest gain; the middle one of several with the same."""
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    return float(cuts[best[len(best) // 2]])


def steps(s: Floats, shown: NDArray[np.bool_]) -> tuple[Floats, NDArray, NDArray]:
    """Returns thresholds between all distinct scores, highest first, with true and false positives at each.

    The first is above all scores, and the last such that everything is positive.

    Args:
        s: `(N,)` scores, finite.
        shown: `(N,)` the truth.
    """
    order = np.argsort(-s, kind="stable")
    values = s[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))  # of each run of equal scores
    tp, fp = np.cumsum(shown[order])[last], np.cumsum(~shown[order])[last]
    edges = values[last]
    below = np.append(edges[1:], edges[-1] - 1.0)
    middles = (edges + below) / 2
    middles = np.where(middles > below, middles, edges)  # neighbours in floating point
    middles[-1] = 0.0 if 0 <= edges[-1] <= 1 else edges[-1]  # everything is positive
    return np.append(np.nextafter(edges[0], np.inf), middles), np.append(0, tp), np.append(0, fp)
