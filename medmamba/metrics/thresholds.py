"""Thresholds above which the labels of a multi-label task count as present."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .scores import Floats


def best_f1_thresholds(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Returns for each label the threshold with the largest F1, `(K,)` in [0, 1]. For validation data only.

    A probability above it counts as present. It lies midway between two of the given probabilities; of several with the
    same F1 the highest is taken. A label that no image shows, or every image, keeps 0.5. With few positive images the
    choice is a guess: what it is worth shows on other data.

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


def _best(shown: np.ndarray, p: Floats) -> float:
    positive = int(shown.sum())
    if positive in (0, len(p)):
        return 0.5
    order = np.argsort(-p, kind="stable")
    ordered, hits = p[order], np.cumsum(shown[order])
    said = np.arange(1, len(p) + 1)
    f1 = 2 * hits / (said + positive)
    below = np.append(ordered[1:], 0.0)  # the next lower probability
    f1[ordered == below] = -1  # equal ones cannot be told apart
    place = int(f1.argmax())
    return float((ordered[place] + below[place]) / 2)
