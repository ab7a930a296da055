"""P-values of permutation tests, and corrections for many tests.

Holm (1979) controls the family-wise error, the probability of even one false finding, under any dependence between the
tests. Benjamini and Hochberg (1995) control the false discovery rate, the expected share of false findings among all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .scores import Floats

_SAME = 1e-9  # differences below this are rounding


def permutation_p(observed: ArrayLike, null: ArrayLike) -> Floats:
    """Returns two-sided p-values `(...)` of observed statistics `(...)` among permuted ones `(P, ...)`.

    Twice the smaller of the two one-sided p-values, each (1 + number at least as extreme) / (1 + P), which is valid for
    every P (Phipson and Smyth 2010). NaN where the observed statistic, or all permuted ones, are undefined.
    """
    value, drawn = np.asarray(observed, float), np.asarray(null, float)
    known = ~np.isnan(drawn)
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        above = ((drawn >= value - _SAME) & known).sum(axis=0)
        below = ((drawn <= value + _SAME) & known).sum(axis=0)
    p = np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (1 + count))
    return np.where(np.isnan(value) | (count == 0), np.nan, p)


def holm(p: ArrayLike) -> Floats:
    """Returns p-values adjusted by Holm's method along the last axis; NaN are no tests and stay NaN."""
    values = np.asarray(p, float)
    order, ordered, rank, count = _ordered(values)
    adjusted = np.maximum.accumulate(np.minimum(1.0, ordered * np.maximum(count - rank, 1)), axis=-1)
    return _back(adjusted, order, values)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Returns p-values adjusted by the method of Benjamini and Hochberg along the last axis; NaN stay NaN."""
    values = np.asarray(p, float)
    order, ordered, rank, count = _ordered(values)
    scaled = np.minimum(1.0, ordered * np.maximum(count, 1) / (rank + 1))
    adjusted = np.minimum.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    return _back(adjusted, order, values)


def _ordered(values: Floats) -> tuple[np.ndarray, Floats, np.ndarray, np.ndarray]:
    """Returns the ascending order, the ordered values with inf for NaN, their ranks from 0, and the number of tests."""
    filled = np.where(np.isnan(values), np.inf, values)
    order = np.argsort(filled, axis=-1, kind="stable")
    count = (~np.isnan(values)).sum(axis=-1, keepdims=True)
    return order, np.take_along_axis(filled, order, axis=-1), np.arange(values.shape[-1]), count


def _back(adjusted: Floats, order: np.ndarray, values: Floats) -> Floats:
    found = np.empty_like(adjusted)
    np.put_along_axis(found, order, adjusted, axis=-1)
    return np.where(np.isnan(values), np.nan, found)
