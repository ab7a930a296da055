"""Two models on the same images: agreement, and whether one is right more often than the other.

The images are the same, so the test is a paired one: McNemar's, on the images that only one of the two gets right. It
is exact (binomial), as Fagerland, Lydersen and Laake 2013 (doi:10.1186/1471-2288-13-91) compare its forms; their mid-p
value, nearly unbiased where the exact test is conservative, is given beside it. The interval of the difference comes
from the bootstrap, by patient where patients are known; the test treats images as independent.

>>> found = compare_predictions(labels, first, second)
>>> print(found.text())
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import bootstrap_weights, resampling_units
from .evaluate import EvaluationError
from .result import Estimate, plain


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same labelled images.

    Attributes:
        n: number of images.
        both, first_only, second_only, neither: images that are right by both, by one alone, by none.
        accuracy: share that is right by the first and by the second.
        difference: accuracy of the second minus that of the first, with a bootstrap interval.
        p: exact two-sided p-value of McNemar's test; 1 if they are right on the same images.
        mid_p: its mid-p value.
        resampled_by: "image" or "patient".
        level: coverage of the interval.
    """

    n: int
    both: int
    first_only: int
    second_only: int
    neither: int
    accuracy: tuple[float, float]
    difference: Estimate
    p: float
    mid_p: float
    resampled_by: str = "image"
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        return plain(asdict(self))

    def text(self, first: str = "the first model", second: str = "the second") -> str:
        """Returns the outcome in words."""
        said = f"Right: {first} {self.accuracy[0]:.1%}, {second} {self.accuracy[1]:.1%} of {self.n} images. "
        gap = self.difference
        between = "" if math.isnan(gap.low) else f" ({self.level:.0%} interval {gap.low:+.1%} to {gap.high:+.1%})"
        said += (
            f"Difference {gap.value:+.1%}{between}. Only {first} is right on {self.first_only} images, only {second} "
        )
        p = "below 0.0001" if self.p < 1e-4 else f"{self.p:.2g}"
        said += f"on {self.second_only}; McNemar's exact test: p {'' if self.p < 1e-4 else '= '}{p}."
        if self.p > 0.05:
            said += " This does not show that they are equally good."
        return said


def mcnemar(first_only: int, second_only: int) -> tuple[float, float]:
    """Returns the exact two-sided p-value of McNemar's test, and its mid-p value.

    Args:
        first_only, second_only: pairs in which only one of the two is right.

    Raises:
        ValueError: a negative number.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"numbers of pairs cannot be negative, got {first_only} and {second_only}")
    n, fewer = first_only + second_only, min(first_only, second_only)
    if n == 0:
        return 1.0, 1.0
    # Sums of binomial probabilities with p = 1/2, by their logarithms: n may be thousands.
    whole = math.lgamma(n + 1) - n * math.log(2)
    mass = [math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(fewer + 1)]
    tail = math.fsum(mass)
    if first_only == second_only:
        return 1.0, 1.0 - mass[-1]
    return min(1.0, 2 * tail), min(1.0, 2 * tail - mass[-1])


def compare_predictions(
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    patients: Sequence[str | None] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
    """Compares the accuracy of two classifiers on the same images.

    Args:
        labels: true class numbers `(N,)`; or `(N, K)` of 0 and 1, where an image is right if all its labels are.
        first, second: predicted classes, in the form of `labels`.
        patients: patient of each image, None where unknown: the interval is then by patient.
        resamples: of the bootstrap; 0 for no interval.
        level: coverage of the interval.
        seed: of the bootstrap.

    Raises:
        EvaluationError: shapes that do not match, or no images.
    """
    truth, a, b = (np.asarray(values) for values in (labels, first, second))
    if truth.shape != a.shape or truth.shape != b.shape or truth.ndim not in (1, 2) or not len(truth):
        raise EvaluationError(f"labels and predictions do not match: {truth.shape}, {a.shape} and {b.shape}")
    if patients is not None and len(patients) != len(truth):
        raise EvaluationError(f"{len(patients)} patients for {len(truth)} images")
    right = [(said == truth) if truth.ndim == 1 else (said == truth).all(axis=1) for said in (a, b)]
    gain = right[1].astype(np.float64) - right[0]
    low = high = math.nan
    if resamples:
        unit_of, stratum_of = resampling_units(truth.astype(np.int64), patients)
        one = np.zeros_like(stratum_of)  # not by class: with one image of a class there would be nothing to draw
        parts = [w @ gain / w.sum(axis=1) for w in bootstrap_weights(unit_of, one, resamples, seed)]
        tail = (1 - level) / 2
        low, high = map(float, np.quantile(np.concatenate(parts), (tail, 1 - tail)))
    only = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    p, mid_p = mcnemar(*only)
    return PairedComparison(
        n=len(truth),
        both=int((right[0] & right[1]).sum()),
        first_only=only[0],
        second_only=only[1],
        neither=int((~right[0] & ~right[1]).sum()),
        accuracy=(float(right[0].mean()), float(right[1].mean())),
        difference=Estimate(float(gain.mean()), low, high),
        p=p,
        mid_p=mid_p,
        resampled_by="image" if patients is None else "patient",
        level=level,
    )


def agreement(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """Returns the share of images `(N,)` with the same predicted class, and Cohen's kappa; NaN if both say one class.

    Raises:
        EvaluationError: other shapes, or no images.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise EvaluationError(f"two lists of classes of the same images are needed, got {a.shape} and {b.shape}")
    classes = np.union1d(a, b)
    same = float((a == b).mean())
    chance = float(sum((a == c).mean() * (b == c).mean() for c in classes))
    return same, math.nan if chance == 1 else (same - chance) / (1 - chance)
