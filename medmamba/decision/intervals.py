"""Confidence intervals of proportions, and of predictive values for a prevalence of one's own.

Wilson's interval (1927) keeps its level on average and never leaves [0, 1]; that of Clopper and Pearson (1934) keeps it
for every proportion and is wider. Images of one patient resemble each other: `effective_size` says how many independent
ones they are worth, after Rao and Scott (Biometrics 1992, 48:577).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.proportions import wilson

METHODS = ("wilson", "clopper-pearson")


@dataclass(frozen=True)
class Proportion:
    """A proportion with its interval; NaN where nothing was counted."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "n/a" if math.isnan(self.value) else f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def to_dict(self) -> dict[str, float | None]:
        """Returns plain data for JSON, with None for NaN."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(value) else value for name, value in values.items()}


UNDEFINED = Proportion(math.nan, math.nan, math.nan)


def proportion(count: float, n: float, level: float = 0.95, method: str = "wilson") -> Proportion:
    """Returns count / n with its two-sided interval.

    Args:
        count: successes, from 0 to n; need not be whole for "wilson", as after `effective_size`.
        n: trials; 0 gives NaN.
        level: coverage of the interval, in (0, 1).
        method: "wilson" or "clopper-pearson".

    Raises:
        ValueError: an unknown method, a level outside (0, 1), or counts that cannot be.
    """
    if method not in METHODS:
        raise ValueError(f"unknown interval {method!r}; there are {', '.join(METHODS)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if not (0 <= count <= n * (1 + 1e-12)):
        raise ValueError(f"{count} of {n} is no proportion")
    if n == 0:
        return UNDEFINED
    if method == "clopper-pearson":
        low, high = _clopper_pearson(round(count), round(n), (1 - level) / 2)
        return Proportion(count / n, low, high)
    p = min(count / n, 1.0)
    return Proportion(p, *wilson(p, n, level))


@functools.lru_cache(4096)
def _clopper_pearson(count: int, n: int, tail: float) -> tuple[float, float]:
    """Returns the limits at which the binomial tail beyond the count has the probability `tail`."""

    def at_most(k: int, p: float) -> float:  # P(X <= k), from the shorter side
        terms = np.arange(k + 1)
        log = _log_choose(n, terms) + terms * math.log(p) + (n - terms) * math.log1p(-p)
        return float(np.exp(log).sum())

    def solve(k: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):  # falls in p
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > wanted else (low, middle)
        return (low + high) / 2

    return (
        0.0 if count == 0 else solve(count - 1, 1 - tail),
        1.0 if count == n else solve(count, tail),
    )


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    steps = np.log((n - np.arange(k[-1])) / (np.arange(k[-1]) + 1.0)) if k[-1] else np.zeros(0)
    return np.concatenate([[0.0], np.cumsum(steps)])


def effective_size(hits: ArrayLike, groups: Sequence[Any] | NDArray[Any] | None) -> float:
    """Returns how many independent images the images `(N,)` are worth for the share of those that hit.

    It is N over the design effect: the variance of the share between groups (of a ratio, each group as a whole) over
    that of N independent images. Never above N; N without groups, for a share of 0 or 1 the number of groups, because
    nothing then shows how alike the images are.

    Args:
        hits: `(N,)` of 0 and 1.
        groups: patient of each image, None where unknown: that image is a group of its own.
    """
    x = np.asarray(hits, dtype=np.float64)
    n = len(x)
    if groups is None or n == 0:
        return float(n)
    numbers: dict[Any, int] = {}
    of = np.array([numbers.setdefault((i,) if g is None else g, len(numbers)) for i, g in enumerate(groups)])
    m = len(numbers)
    share = float(x.mean())
    if m == n:
        return float(n)
    if m < 2 or share in (0.0, 1.0):
        return float(m)
    residual = np.bincount(of, x - share, m)
    clustered = m / (m - 1) * float((residual**2).sum()) / n**2
    effect = clustered / (share * (1 - share) / n)
    return float(n / max(effect, 1.0))


def ratio(first: Proportion, second: Proportion) -> tuple[float, float]:
    """Returns the limits of first / second for independent proportions.

    The method of variance estimates recovery (Donner and Zou, Stat Methods Med Res 2012, 21:347) from the two
    intervals; defined also where one is 0 or 1, unlike the delta method.
    """
    a, la, ua = first.value, first.low, first.high
    b, lb, ub = second.value, second.low, second.high
    low = a * b - math.sqrt(max((a * b) ** 2 - la * ub * (2 * a - la) * (2 * b - ub), 0.0))
    high = a * b + math.sqrt(max((a * b) ** 2 - ua * lb * (2 * a - ua) * (2 * b - lb), 0.0))
    below, above = ub * (2 * b - ub), lb * (2 * b - lb)
    return (max(low / below, 0.0) if below > 0 else 0.0), (high / above if above > 0 else math.inf)


def predictive_values(
    sensitivity: Proportion, specificity: Proportion, prevalence: float
) -> tuple[Proportion, Proportion]:
    """Returns the positive and the negative predictive value for a prevalence in [0, 1], by Bayes' theorem.

    The intervals reflect the uncertainty of sensitivity and specificity, which are of different images and thus
    independent; the prevalence is taken as known.

    Raises:
        ValueError: a prevalence outside [0, 1].
    """
    if not 0 <= prevalence <= 1:
        raise ValueError(f"prevalence must be from 0 to 1, got {prevalence}")
    if math.isnan(sensitivity.value) or math.isnan(specificity.value):
        return UNDEFINED, UNDEFINED
    return (
        _predictive(sensitivity, specificity, prevalence),
        _predictive(specificity, sensitivity, 1 - prevalence),
    )


def _predictive(found: Proportion, spared: Proportion, share: float) -> Proportion:
    """Returns share * found / (share * found + (1 - share) * (1 - spared)), which falls in (1 - spared) / found."""
    missed = Proportion(1 - spared.value, 1 - spared.high, 1 - spared.low)
    if share == 0:
        return Proportion(0.0, 0.0, 0.0) if missed.value > 0 else UNDEFINED
    odds = (1 - share) / share

    def value(r: float) -> float:
        return 1 / (1 + odds * r) if math.isfinite(r) else (1.0 if odds == 0 else 0.0)

    if found.value == 0:
        if missed.value == 0:
            return UNDEFINED  # nothing is called so
        low, high = ratio(missed, found) if found.high > 0 else (math.inf, math.inf)
        return Proportion(0.0, 0.0, value(missed.low / found.high) if found.high > 0 else 0.0)
    low, high = ratio(missed, found)
    point = value(missed.value / found.value)
    return Proportion(point, min(value(high), point), max(value(low), point))
