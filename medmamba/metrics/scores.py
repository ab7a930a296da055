"""Classification scores of weighted samples, for many weightings at once.

In a bootstrap resample each sample is drawn w times, so every function takes weights `(R, N)` and returns one score per
row: a thousand resamples cost one sort. With weights of one they equal scikit-learn's scores (tested).
R: weightings, N: images, K: classes. Undefined scores (no positives, nothing predicted, ...) are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Ranks = tuple[Ints, Ints]

_SMALLEST_PROBABILITY = 1e-12
_BLOCK_ELEMENTS = 2**22  # of temporary arrays: 32 MB of float64


def confusion(labels: Ints, predictions: Ints, k: int, weights: Floats) -> Floats:
    """Returns `(R, K, K)`: weight of the images of class i (row) predicted as class j (column)."""
    cell = labels * k + predictions
    rows = [np.bincount(cell, row, k * k) for row in weights]
    return np.array(rows, dtype=np.float64).reshape(-1, k, k)


def label_tables(truth: NDArray[np.bool_], said: NDArray[np.bool_], weights: Floats) -> Floats:
    """Returns 2x2 tables `(R, K, 2, 2)`, [[tn, fp], [fn, tp]], of multi-label predictions `(N, K)`."""
    R, K = len(weights), truth.shape[1]
    tp, shown, found = (np.empty((R, K)) for _ in range(3))
    for columns in blocks(K, len(truth)):
        t, s = truth[:, columns], said[:, columns]
        for out, mask in ((tp, t & s), (shown, t), (found, s)):
            out[:, columns] = weights @ mask.astype(weights.dtype)
    return _tables(tp, shown, found, weights)


def class_tables(labels: Ints, predictions: Ints, k: int, weights: Floats) -> Floats:
    """Returns one 2x2 table per class, `(R, K, 2, 2)`: [[tn, fp], [fn, tp]].

    Avoids the confusion matrices of all weightings, which take R x K x K elements.
    """
    right = labels == predictions
    columns = ((labels[right], right), (labels, ...), (predictions, ...))
    tp, shown, found = (np.array([np.bincount(i, row[m], k) for row in weights]) for i, m in columns)
    return _tables(tp, shown, found, weights)


def _tables(tp: Floats, shown: Floats, found: Floats, weights: Floats) -> Floats:
    """Returns 2x2 tables from the weights of true positives, positives and predicted positives, each `(R, K)`."""
    fn, fp = shown - tp, found - tp
    tn = weights.sum(axis=1, keepdims=True) - tp - fn - fp
    return np.stack([np.stack([tn, fp], -1), np.stack([fn, tp], -1)], -2)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Returns slices of `range(count)` whose rows of `size` elements stay below `_BLOCK_ELEMENTS`."""
    step = max(1, _BLOCK_ELEMENTS // max(size, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rates(tables: Floats) -> dict[str, Floats]:
    """Returns sensitivity, specificity, precision (PPV), NPV and F1, each `(R, K)`, of 2x2 tables `(R, K, 2, 2)`.

    Precision and F1 of a class that occurs but is never predicted are 0, as in scikit-learn. Sensitivity, precision and
    F1 of a class that does not occur are NaN.
    """
    tn, fp, fn, tp = (tables[..., i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    absent = tp + fn == 0
    nothing_said = tp + fp == 0
    return {
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "precision": np.where(absent, np.nan, np.where(nothing_said, 0.0, _ratio(tp, tp + fp))),
        "npv": _ratio(tn, tn + fn),
        "f1": np.where(absent, np.nan, _ratio(2 * tp, 2 * tp + fp + fn)),
    }


def ordinal(truth: Ints, said: Ints, weights: Floats) -> dict[str, Floats]:
    """Returns quadratic-weighted kappa and mean absolute error of grades, each `(R,)`.

    Kappa (Cohen 1968, doi:10.1037/h0026256) is 1 minus the mean squared difference of true and predicted grade over
    the one expected if both were drawn independently from their own distributions; NaN where both are one grade. Unlike
    accuracy, both scores punish a distant grade more than the next one.
    """
    t, s = truth.astype(np.float64), np.asarray(said, dtype=np.float64)
    total = weights.sum(axis=1)
    found = weights @ ((t - s) ** 2)
    expected = weights @ t**2 + weights @ s**2 - 2 * (weights @ t) * (weights @ s) / total
    return {"quadratic_kappa": 1 - _ratio(found, expected), "mae": _ratio(weights @ np.abs(t - s), total)}


def rank(scores: Floats) -> Ranks:
    """Returns the ascending order of the scores `(N,)`, and the position in it where each distinct score starts.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, which cannot be ranked")
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def auroc_and_auprc(positive: NDArray[np.bool_], ranks: Ranks, weights: Floats) -> tuple[Floats, Floats]:
    """Returns the areas under the ROC curve and under the precision-recall curve, each `(R,)`.

    AUROC is the probability that a positive scores above a negative, ties counting half. AUPRC is the average
    precision, without interpolation. `ranks` is `rank(scores)`, computed once for all weightings.
    """
    order, starts = ranks
    ascending = weights[:, order]
    hits = _grouped(ascending * positive[order], starts)
    said = _grouped(ascending, starts)
    all_hits = hits.sum(axis=1)
    misses = said - hits
    below = np.cumsum(misses, axis=1) - misses / 2
    area = _ratio((hits * below).sum(axis=1), all_hits * misses.sum(axis=1))
    # Predicted positives at a threshold are those ranked at or above it: cumulate from the end.
    said_above = np.cumsum(said[:, ::-1], axis=1)
    precision = np.divide(
        np.cumsum(hits[:, ::-1], axis=1), said_above, out=np.zeros_like(said_above), where=said_above > 0
    )
    return area, _ratio((hits[:, ::-1] * precision).sum(axis=1), all_hits)


def calibration_gaps(confidence: Floats, correct: Floats, bins: int) -> Floats:
    """Returns `(N, bins)`: correct minus confidence of each image, in the bin of its confidence.

    Both are `(N,)`, or `(N, L)` for L predictions per image, which are averaged.
    """
    confidence, correct = (values.reshape(len(values), -1) for values in (confidence, correct))
    N, L = confidence.shape
    gaps = np.empty((N, bins))
    for rows in blocks(N, L):
        said = confidence[rows]
        cell = np.arange(len(said))[:, None] * bins + bin_index(said, bins)
        sums = np.bincount(cell.ravel(), (correct[rows] - said).ravel(), len(said) * bins)
        gaps[rows] = sums.reshape(len(said), bins)
    return gaps / L


def expected_calibration_error(gaps: Floats, weights: Floats) -> Floats:
    """Returns the ECE, `(R,)`: |accuracy - mean confidence| averaged over bins by their images (Guo et al. 2017).

    Bins are of equal width over (0, 1], closed on the right; `gaps` is from `calibration_gaps`.
    """
    return _ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def bin_index(confidence: Floats, bins: int) -> Ints:
    """Returns the bin of each confidence, for bins of equal width closed on the right (0 is in the first)."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def brier(truth: Ints, probabilities: Floats) -> Floats:
    """Returns the sum over classes of squared errors of each image, `(N,)`; `truth` is `(N,)` or `(N, K)` of 0 and 1.

    The Brier score is this sum, in [0, 2], for more than two exclusive classes; half of it for two, and its mean over
    labels for multi-label tasks, both in [0, 1] (scikit-learn's `scale_by_half="auto"`). The caller divides.
    """
    return _by_rows(lambda t, p: ((p - t) ** 2).sum(axis=1), truth, probabilities)


def negative_log_likelihood(truth: Ints, probabilities: Floats) -> Floats:
    """Returns cross entropy of each image in nats, `(N,)`: for multi-label `truth` `(N, K)` the mean over labels."""
    if truth.ndim == 1:
        return -np.log(np.clip(probabilities[np.arange(len(truth)), truth], _SMALLEST_PROBABILITY, 1))

    def entropy(t: Floats, p: Floats) -> Floats:
        inverse = np.clip(1 - p, _SMALLEST_PROBABILITY, 1)
        p = np.clip(p, _SMALLEST_PROBABILITY, 1)
        return -(t * np.log(p) + (1 - t) * np.log(inverse)).mean(axis=1)

    return _by_rows(entropy, truth, probabilities)


def _by_rows(score: Callable[[Floats, Floats], Floats], truth: Ints, probabilities: Floats) -> Floats:
    """Computes a score of each image from 0/1 labels and probabilities, both (n, K), in blocks of images."""
    N, K = probabilities.shape
    found = np.empty(N)
    for rows in blocks(N, K):
        labels = truth[rows]
        onehot = labels.astype(float) if truth.ndim == 2 else np.eye(K)[labels]
        found[rows] = score(onehot, probabilities[rows])
    return found


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Returns numerator over denominator, NaN for 0/0."""
    out = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def _grouped(values: Floats, starts: Ints) -> Floats:
    """Sums `(R, N)` over runs of equal score, to `(R, G)`."""
    return values if len(starts) == values.shape[1] else np.add.reduceat(values, starts, axis=1)
