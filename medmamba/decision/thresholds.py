"""Thresholds of a score, chosen on validation images by a rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..metrics.thresholds import best_f1, middle_of_best, steps

RULES = ("sensitivity", "specificity", "youden", "cost", "prevalence", "f1")


class DecisionError(ValueError):
    """A decision that cannot be fitted, read or applied; the message says why."""


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen.

    Attributes:
        kind: "sensitivity" or "specificity": at least `value`, and the other as high as possible; "youden": the largest
            sum of both; "cost": the lowest expected cost, where a miss costs `value` times a false alarm; "prevalence":
            as many images are called positive as are (or the share `value`); "f1": the largest F1.
        value: see kind; None where it needs none.
        margin: for sensitivity and specificity: lowers (raises) the threshold so far that a new image of the class is
            found (spared) with a probability of at least `value`, averaged over validation sets, whatever the
            distribution. Without it only the validation images themselves reach the target.
    """

    kind: str
    value: float | None = None
    margin: bool = True

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise DecisionError(f"unknown rule {self.kind!r}; there are {', '.join(RULES)}")
        value = self.value
        if isinstance(value, bool) or (value is not None and not isinstance(value, int | float)):
            raise DecisionError(f"the value of {self.kind} must be a number, got {value!r}")
        if self.kind in ("sensitivity", "specificity") and not (value is not None and 0 < value < 1):
            raise DecisionError(f"{self.kind} needs a target between 0 and 1, such as 0.9; got {value}")
        if self.kind == "cost" and not (value is not None and math.isfinite(value) and value > 0):
            raise DecisionError(f"cost needs what a miss costs over a false alarm, such as 10; got {value}")
        if self.kind == "prevalence" and value is not None and not 0 < value < 1:
            raise DecisionError(f"prevalence must be between 0 and 1, got {value}")
        if self.kind in ("youden", "f1") and value is not None:
            raise DecisionError(f"{self.kind} takes no value, got {value}")

    def __str__(self) -> str:
        texts = {
            "sensitivity": "sensitivity of at least {:g}",
            "specificity": "specificity of at least {:g}",
            "cost": "a miss costs {:g} times a false alarm",
            "prevalence": "{:g} of the images are called positive",
            "youden": "largest sum of sensitivity and specificity",
            "f1": "largest F1",
        }
        if self.kind == "prevalence" and self.value is None:
            return "as many images are called positive as are"
        return texts[self.kind].format(self.value)


def choose_threshold(scores: ArrayLike, truth: ArrayLike, rule: Rule, prevalence: float | None = None) -> float:
    """Returns the threshold that a rule chooses; images with a score of at least that are positive.

    It lies half-way between two neighbouring scores, so that a last digit decides nothing.

    Args:
        scores: `(N,)`, higher for positive.
        truth: `(N,)` of 0 and 1.
        rule: see `Rule`.
        prevalence: for "cost": share of positive images where the rule is to be used; default: that of these.

    Raises:
        DecisionError: scores that are not finite, no positive or no negative images, or too few for the target.
    """
    s, shown = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if s.ndim != 1 or shown.shape != s.shape or len(s) == 0:
        raise DecisionError(f"scores {s.shape} and truth {shown.shape} do not match")
    if not np.isfinite(s).all():
        raise DecisionError("some scores are not finite")
    shown = shown.astype(bool)
    if shown.all() or not shown.any():
        raise DecisionError(f"all of the {len(s)} images are {'positive' if shown.all() else 'negative'}")
    if prevalence is not None and not 0 < prevalence < 1:
        raise DecisionError(f"prevalence must be between 0 and 1, got {prevalence}")
    cuts, tp, fp = steps(s, shown)
    n1, n0 = int(shown.sum()), int((~shown).sum())
    if rule.kind in ("sensitivity", "specificity"):
        assert rule.value is not None
        needed = _needed(n1 if rule.kind == "sensitivity" else n0, rule)
        good = tp >= needed if rule.kind == "sensitivity" else n0 - fp >= needed
        # The highest threshold of a sufficient sensitivity, the lowest of a sufficient specificity.
        return float(cuts[np.flatnonzero(good)[0 if rule.kind == "sensitivity" else -1]])
    if rule.kind == "prevalence":
        share = n1 / len(s) if rule.value is None else rule.value
        return float(cuts[np.abs((tp + fp) / len(s) - share).argmin()])
    if rule.kind == "f1":
        return best_f1(cuts, tp, fp)
    se, sp = tp / n1, 1 - fp / n0
    if rule.kind == "youden":
        gain = se + sp
    else:
        assert rule.value is not None
        share = n1 / len(s) if prevalence is None else prevalence
        gain = -(rule.value * share * (1 - se) + (1 - share) * (1 - sp))
    return middle_of_best(cuts, gain)


def _needed(n: int, rule: Rule) -> int:
    """Returns how many of n validation images must be on the right side."""
    assert rule.value is not None
    if not rule.margin:
        return math.ceil(rule.value * n - 1e-9)
    needed = math.ceil((n + 1) * rule.value - 1e-9)
    if needed > n:
        least = math.ceil(rule.value / (1 - rule.value) - 1e-9)
        kind = "positive" if rule.kind == "sensitivity" else "negative"
        raise DecisionError(
            f"{n} {kind} validation images are too few to vouch for a {rule.kind} of {rule.value:g}, which takes "
            f"{least}; lower the target, use more images, or leave the margin out (margin=False), which only the "
            "validation images themselves then reach"
        )
    return needed
