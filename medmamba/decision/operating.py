"""Operating points: the threshold above which a class, or any of several, is called positive.

Chosen on validation images by a rule, then applied to others. For a rule of sensitivity or specificity the threshold
leaves a margin for the finite number of validation images, without which the target is missed on average on new ones.

>>> point = choose_point(probabilities, labels, classes, ["malignant"], Rule("sensitivity", 0.9))
>>> point.is_positive(new_probabilities, classes)
>>> performance(new_probabilities, new_labels, classes, point, prevalence=0.05)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.scores import Floats
from ..metrics.thresholds import steps
from ..utils.names import find_name
from .intervals import Proportion, effective_size, predictive_values, proportion
from .thresholds import DecisionError, Rule, choose_threshold

CURVE_POINTS = 101


@dataclass(frozen=True)
class Counts:
    """Outcomes at a threshold, and the numbers of independent images that they are worth (see `effective_size`)."""

    tp: int
    fn: int
    fp: int
    tn: int
    positives: float = math.nan
    negatives: float = math.nan

    def sensitivity(self, level: float = 0.95, method: str = "wilson") -> Proportion:
        """Returns the share of the positive images that are called so."""
        return _scaled(self.tp, self.tp + self.fn, self.positives, level, method)

    def specificity(self, level: float = 0.95, method: str = "wilson") -> Proportion:
        """Returns the share of the negative images that are called so."""
        return _scaled(self.tn, self.tn + self.fp, self.negatives, level, method)

    @property
    def prevalence(self) -> float:
        """Share of positive images; NaN without images."""
        total = self.tp + self.fn + self.fp + self.tn
        return (self.tp + self.fn) / total if total else math.nan


def _scaled(count: int, n: int, effective: float, level: float, method: str) -> Proportion:
    if math.isnan(effective) or n == 0 or method != "wilson":
        return proportion(count, n, level, method)
    return proportion(count / n * effective, effective, level, method)


@dataclass(frozen=True)
class Performance:
    """What a threshold achieves, with intervals, and what the answers are worth at a prevalence."""

    counts: Counts
    sensitivity: Proportion
    specificity: Proportion
    ppv: Proportion
    npv: Proportion
    prevalence: float
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        c = self.counts
        return {
            "tp": c.tp,
            "fn": c.fn,
            "fp": c.fp,
            "tn": c.tn,
            "prevalence": None if math.isnan(self.prevalence) else self.prevalence,
            "level": self.level,
            **{n: getattr(self, n).to_dict() for n in ("sensitivity", "specificity", "ppv", "npv")},
        }


def perform(counts: Counts, prevalence: float | None = None, level: float = 0.95) -> Performance:
    """Returns rates with Wilson intervals; predictive values for a prevalence, by default that of the images."""
    share = counts.prevalence if prevalence is None else prevalence
    se, sp = counts.sensitivity(level), counts.specificity(level)
    ppv, npv = predictive_values(se, sp, share) if not math.isnan(share) else (se, se)
    return Performance(counts, se, sp, ppv, npv, share, level)


@dataclass(frozen=True)
class Curve:
    """Outcomes at many thresholds, highest first: what a slider moves along.

    Attributes:
        thresholds: `(T,)`, falling.
        tp, fp: `(T,)` positive and negative images with a score of at least the threshold.
        positives, negatives: numbers of images.
        worth: `(T, 2)` independent images that the positive and negative ones are worth; None without patients.
    """

    thresholds: tuple[float, ...]
    tp: tuple[int, ...]
    fp: tuple[int, ...]
    positives: int
    negatives: int
    worth: tuple[tuple[float, float], ...] | None = None

    def __len__(self) -> int:
        return len(self.thresholds)

    def counts(self, index: int) -> Counts:
        """Returns the outcomes at one threshold."""
        tp, fp = self.tp[index], self.fp[index]
        worth = self.worth[index] if self.worth else (math.nan, math.nan)
        return Counts(tp, self.positives - tp, fp, self.negatives - fp, *worth)

    def nearest(self, threshold: float) -> int:
        """Returns the index of the stored threshold that is closest to this one."""
        return int(np.abs(np.array(self.thresholds) - threshold).argmin())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `config.json`."""
        data = {
            "thresholds": list(self.thresholds),
            "tp": list(self.tp),
            "fp": list(self.fp),
            "positives": self.positives,
            "negatives": self.negatives,
        }
        return data | ({"worth": [list(pair) for pair in self.worth]} if self.worth else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """Loads the result of `to_dict`, which `medmamba.utils.decision_checks` has checked."""
        worth = tuple((float(a), float(b)) for a, b in data["worth"]) if "worth" in data else None
        lists = (tuple(data["thresholds"]), tuple(data["tp"]), tuple(data["fp"]))
        return cls(*lists, data["positives"], data["negatives"], worth)


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold for a class, or for any of several, with what it achieved where it was chosen.

    Attributes:
        name: by which `predict` is asked for it.
        classes: an image is positive if it shows any of these.
        threshold: an image is called positive if its score (see `score`) is at least this.
        rule: by which it was chosen.
        counts: outcomes on the validation images that chose it, so rather better than on others.
        curve: outcomes there at other thresholds; None if not kept.
    """

    name: str
    classes: tuple[str, ...]
    threshold: float
    rule: Rule
    counts: Counts
    curve: Curve | None = None

    def is_positive(self, probabilities: ArrayLike, classes: Sequence[str], task: str = "multiclass") -> NDArray:
        """Returns `(N,)`, True where an image is called positive, from probabilities `(N, K)`."""
        return score(probabilities, indices(self.classes, classes), task) >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `config.json`."""
        c = self.counts
        data: dict[str, Any] = {
            "name": self.name,
            "classes": list(self.classes),
            "threshold": self.threshold,
            "rule": {"kind": self.rule.kind, "value": self.rule.value, "margin": self.rule.margin},
            "validation": {"tp": c.tp, "fn": c.fn, "fp": c.fp, "tn": c.tn},
        }
        if not math.isnan(c.positives):
            data["validation"] |= {"positives": c.positives, "negatives": c.negatives}
        return data | ({"curve": self.curve.to_dict()} if self.curve else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperatingPoint:
        """Loads the result of `to_dict`, which `medmamba.utils.decision_checks` has checked."""
        return cls(
            data["name"],
            tuple(data["classes"]),
            float(data["threshold"]),
            Rule(**data["rule"]),
            Counts(**data["validation"]),
            Curve.from_dict(data["curve"]) if "curve" in data else None,
        )


def indices(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Returns the numbers of the classes named, forgiving case and spelling as elsewhere.

    Raises:
        DecisionError: none, one twice, all of them, or one that is not there.
    """
    found = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        number = find_name(name, list(classes))
        if number is None:
            raise DecisionError(f"there is no class {name!r}; there are: {', '.join(classes)}")
        if number in found:
            raise DecisionError(f"class {name!r} is named twice")
        found.append(number)
    if not found or len(found) == len(classes) > 1:
        raise DecisionError(f"name some of the classes, not {'all' if found else 'none'}: {', '.join(classes)}")
    return found


def score(probabilities: ArrayLike, chosen: Sequence[int], task: str = "multiclass") -> Floats:
    """Returns the probability `(N,)` that an image shows any of the chosen classes, from probabilities `(N, K)`.

    The sum for exclusive classes; 1 minus the product of the complements, as for independent labels, in multi-label
    tasks.
    """
    p = np.asarray(probabilities, dtype=np.float64)[:, list(chosen)]
    return 1 - np.prod(1 - p, axis=1) if task == "multilabel" else p.sum(axis=1)


def positives(labels: ArrayLike, chosen: Sequence[int]) -> NDArray[np.bool_]:
    """Returns `(N,)`, True where an image shows any of the chosen classes, from labels `(N,)` or `(N, K)`."""
    truth = np.asarray(labels)
    columns = list(chosen)
    return np.asarray(truth[:, columns].any(axis=1) if truth.ndim == 2 else np.isin(truth, columns), dtype=bool)


def count(scores: ArrayLike, truth: ArrayLike, threshold: float, groups: Sequence[Any] | None = None) -> Counts:
    """Returns the outcomes of calling scores `(N,)` of at least the threshold positive, for truth `(N,)`."""
    called, shown = np.asarray(scores) >= threshold, np.asarray(truth, dtype=bool)
    tp, fp = int((called & shown).sum()), int((called & ~shown).sum())
    found = (tp, int(shown.sum()) - tp, fp, int((~shown).sum()) - fp)
    if groups is None or not any(group is not None for group in groups):
        return Counts(*found)
    of = np.empty(len(shown), dtype=object)
    of[:] = list(groups)
    return Counts(*found, effective_size(called[shown], of[shown]), effective_size(called[~shown], of[~shown]))


def trace(
    scores: ArrayLike,
    truth: ArrayLike,
    groups: Sequence[Any] | None = None,
    most: int = CURVE_POINTS,
    also: float | None = None,
) -> Curve:
    """Returns the outcomes at about `most` thresholds, evenly spread over sensitivity and specificity.

    Args:
        also: a threshold that is always among them.
    """
    s, shown = np.asarray(scores, dtype=np.float64), np.asarray(truth).astype(bool)
    cuts, tp, fp = steps(s, shown)
    # Where many steps can be told apart, those are kept that move furthest along both axes.
    length = tp / max(int(shown.sum()), 1) + fp / max(int((~shown).sum()), 1)
    wanted = np.linspace(length[0], length[-1], most)
    keep = np.unique(np.searchsorted(length, wanted, side="left").clip(0, len(cuts) - 1)) if len(cuts) > most else ...
    cuts, tp, fp = cuts[keep], tp[keep], fp[keep]
    if also is not None and also not in cuts:
        at, place = count(s, shown, also), int((cuts > also).sum())
        cuts, tp, fp = (np.insert(a, place, v) for a, v in zip((cuts, tp, fp), (also, at.tp, at.fp), strict=True))
    worth = None
    if groups is not None and any(group is not None for group in groups):
        each = [count(s, shown, float(t), groups) for t in cuts]
        worth = tuple((round(c.positives, 2), round(c.negatives, 2)) for c in each)
    lists = (tuple(map(float, cuts)), tuple(map(int, tp)), tuple(map(int, fp)))
    return Curve(*lists, int(shown.sum()), int((~shown).sum()), worth)


def choose_point(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    wanted: Sequence[str],
    rule: Rule,
    *,
    task: str = "multiclass",
    groups: Sequence[Any] | None = None,
    name: str = "",
    prevalence: float | None = None,
) -> OperatingPoint:
    """Chooses an operating point on validation images, which must not have trained the model.

    Args:
        probabilities: `(N, K)`, calibrated as they will be where it is used.
        labels: `(N,)`, or `(N, K)` of 0 and 1.
        classes: K names.
        wanted: names of the classes of which any makes an image positive.
        rule: how to choose.
        task: "multiclass" or "multilabel".
        groups: patient of each image, for the intervals.
        name: default: made of the classes and the rule, such as "malignant-sensitivity-0.9".
        prevalence: see `choose_threshold`.

    Raises:
        DecisionError: see `choose_threshold` and `indices`.
    """
    chosen = indices(wanted, classes)
    s, truth = score(probabilities, chosen, task), positives(labels, chosen)
    names = tuple(classes[i] for i in chosen)
    try:
        threshold = choose_threshold(s, truth, rule, prevalence)
    except DecisionError as error:
        raise DecisionError(f"{' or '.join(names)}: {error}") from error
    value = "" if rule.value is None else f"-{rule.value:g}"
    name = name or f"{'+'.join(names)}-{rule.kind}{value}"
    counts = count(s, truth, threshold, groups)
    return OperatingPoint(name, names, threshold, rule, counts, trace(s, truth, groups, also=threshold))


def performance(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    point: OperatingPoint,
    *,
    task: str = "multiclass",
    groups: Sequence[Any] | None = None,
    prevalence: float | None = None,
    level: float = 0.95,
) -> Performance:
    """Returns what an operating point achieves on labelled images, such as the test split.

    Args:
        prevalence: for the predictive values; default: that of these images.
        level: of the intervals, which count images of one patient as what they are worth, see `effective_size`.
    """
    chosen = indices(point.classes, classes)
    s, truth = score(probabilities, chosen, task), positives(labels, chosen)
    return perform(count(s, truth, point.threshold, groups), prevalence, level)
