"""Computes all metrics from labels and probabilities, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import TASKS
from . import proportions, scores
from .bootstrap import bootstrap_weights, resampling_units
from .result import ClassResult, Estimate, Evaluation
from .scores import Floats, Ints

Thresholds = float | Sequence[float]


class EvaluationError(ValueError):
    """Raised for labels and probabilities that do not match."""


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    task: str = "multiclass",
    patients: Sequence[str | None] | None = None,
    threshold: Thresholds = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    ece_bins: int = 15,
    context: Mapping[str, Any] | None = None,
    unit: str = "patient",
) -> Evaluation:
    """Scores predictions, with bootstrap intervals.

    Macro averages are over the classes that occur in `labels`; a note lists the others, which have no sensitivity.
    Accuracy of a multi-label task is the mean over labels, as in MedMNIST's evaluator; `subset_accuracy` requires all
    labels of an image to be correct. AUROC is one class against the rest. ECE is that of the largest probability, or of
    every label's probability in a multi-label task. Where thresholds differ from 0.5, `accuracy_at_half` is the
    accuracy at 0.5, for comparison with results published so. An ordinal task has two more scores, see
    `scores.ordinal`: quadratic-weighted kappa and the mean absolute error in grades.

    Intervals are percentiles of resamples that draw patients (where given, else images) with replacement within each
    class. They reflect the variation between test sets of the same kind, not between training runs. Where a proportion
    is 0 or 1 and so is every resample, its interval is Wilson's, see `proportions.limits_of`; scores that are no
    proportions, such as AUROC and F1, keep the interval of a single number there, which is no certainty.

    Args:
        labels: integers `(N,)`, or `(N, K)` of 0 and 1 for a multi-label task.
        probabilities: `(N, K)` in [0, 1], rows summing to 1 unless multi-label; for two classes also `(N,)`, the
            probability of the second.
        classes: K names.
        task: "multiclass", "multilabel" or "ordinal".
        patients: patient of each image, None where unknown: that image is resampled on its own.
        threshold: probability above which a label is predicted, in a multi-label task; one for all or one per label.
        resamples: number of bootstrap resamples; 0 for no intervals.
        level: coverage of the intervals.
        seed: of the bootstrap.
        ece_bins: bins of the expected calibration error.
        context: stored with the result, such as model, dataset and split.
        unit: what `patients` identifies, for texts: "patient", "lesion", ...

    Raises:
        EvaluationError: shapes, values or labels that do not match.
    """
    k = len(classes)
    truth, p = check_predictions(labels, probabilities, k, task)
    if patients is not None and len(patients) != len(truth):
        raise EvaluationError(f"{len(patients)} patients for {len(truth)} images")
    scorer = Scorer(truth, p, k, task, threshold, ece_bins)
    point = scorer.under(lambda: iter([np.ones((1, len(truth)))]))
    unit_of, stratum_of = resampling_units(truth, patients)
    resampled = scorer.under(lambda: bootstrap_weights(unit_of, stratum_of, resamples, seed)) if resamples else {}
    interval = {name: _interval(values, level) for name, values in resampled.items()}

    def estimate(name: str, *index: int) -> Estimate:
        value = float(point[name][0][index])
        if not interval or np.isnan(value):
            return Estimate(value)
        low, high = (float(limit[index]) for limit in interval[name])
        if low == high == value and value in (0, 1):
            exact = proportions.limits_of(scorer, name, index[0] if index else None, value, unit_of, level)
            low, high = exact or (low, high)
        return Estimate(value, low, high)

    support = scorer.support
    return Evaluation(
        task=task,
        classes=tuple(classes),
        n_images=len(truth),
        n_patients=None if patients is None else len(stratum_of),
        overall={name: estimate(name) for name, values in point.items() if values.ndim == 1},
        per_class=tuple(
            ClassResult(
                name,
                int(support[i]),
                {key.removeprefix("class_"): estimate(key, i) for key, values in point.items() if values.ndim == 2},
            )
            for i, name in enumerate(classes)
        ),
        confusion=scorer.confusion(),
        resamples=resamples,
        level=level,
        resampled_by="image" if patients is None else "patient",
        seed=seed,
        threshold=_as_given(scorer.limits) if task == "multilabel" else None,
        ece_bins=ece_bins,
        notes=_notes(classes, support, len(truth), task),
        context=dict(context or {}),
        unit=unit,
    )


class Scorer:
    """Computes all scores of fixed labels and probabilities under weights `(R, N)`."""

    def __init__(self, truth: Ints, p: Floats, k: int, task: str, threshold: Thresholds, bins: int) -> None:
        self.k, self.multilabel, self.ordinal = k, task == "multilabel", task == "ordinal"
        multilabel, self.limits = self.multilabel, _limits(threshold, k)
        self.truth, self.p = truth, p
        self.support = truth.sum(axis=0) if multilabel else np.bincount(truth, minlength=k)
        self.said: Any = p > self.limits if multilabel else p.argmax(axis=1)  # (N, K) or (N,)
        self.brier = scores.brier(truth, p) / (k if multilabel else 2 if k == 2 else 1)
        right: Any = truth if multilabel else (self.said == truth).astype(float)
        self.gaps = scores.calibration_gaps(p if multilabel else p.max(axis=1), right, bins)
        self.nll = scores.negative_log_likelihood(truth, p)
        if multilabel:
            self.shown = truth.astype(bool)
            same = self.said == self.shown
            self.right, self.all_right = same.mean(axis=1), same.all(axis=1)
            self.at_half = None if (self.limits == 0.5).all() else ((p > 0.5) == self.shown).mean(axis=1)
        else:
            self.right = self.said == truth

    @property
    def overall_names(self) -> tuple[str, ...]:
        """Names of the overall scores."""
        own = ("accuracy", "subset_accuracy") if self.multilabel else ("accuracy",)
        macro = ("balanced_accuracy", "precision", "sensitivity", "specificity", "f1", "auroc", "auprc")
        return (*own, *macro, "ece", "brier", "nll")

    def under(self, weightings: Callable[[], Iterator[Floats]]) -> dict[str, Floats]:
        """Returns overall scores `(R,)` by name, and per-class scores `(R, K)` by "class_" and name.

        Args:
            weightings: returns the weights in chunks `(R, N)`, the same on every call. Ranks of all classes at once may
                not fit into memory, so there is one pass per block of classes.
        """
        areas: list[Floats] = []
        for block in scores.blocks(self.k, len(self.truth)):
            classes = range(self.k)[block]
            ranks = [scores.rank(self.p[:, i]) for i in classes]
            areas.append(np.concatenate([self._areas(classes, ranks, weights) for weights in weightings()]))
        area = np.concatenate(areas, axis=1)  # (R, K, 2)
        parts, done = [], 0
        for weights in weightings():
            parts.append(self._chunk(weights, area[done : done + len(weights)]))
            done += len(weights)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _areas(self, classes: range, ranks: list[scores.Ranks], weights: Floats) -> Floats:
        """Returns AUROC and AUPRC of some classes, `(R, len(classes), 2)`."""
        found = np.empty((len(weights), len(classes), 2))
        for place, (i, rank) in enumerate(zip(classes, ranks, strict=True)):
            positive = self.shown[:, i] if self.multilabel else self.truth == i
            found[:, place, 0], found[:, place, 1] = scores.auroc_and_auprc(positive, rank, weights)
        return found

    def _chunk(self, weights: Floats, area: Floats) -> dict[str, Floats]:
        """Returns the scores under one chunk of weights, given its AUROC and AUPRC `(R, K, 2)`."""
        total = weights.sum(axis=1)
        total = np.where(total > 0, total, np.nan)  # a random group may have no image at all
        tables = self._tables(weights)  # (R, K, 2, 2)
        by_class = scores.rates(tables)
        by_class["auroc"], by_class["auprc"] = area[..., 0], area[..., 1]
        overall = {"accuracy": weights @ self.right / total}
        if self.multilabel:
            overall["subset_accuracy"] = weights @ self.all_right / total
            if self.at_half is not None:
                overall["accuracy_at_half"] = weights @ self.at_half / total
        if self.ordinal:
            overall |= scores.ordinal(self.truth, self.said, weights)
        present = by_class["sensitivity"] >= 0  # not NaN
        overall["balanced_accuracy"] = self._balanced(by_class)
        for name in ("precision", "sensitivity", "specificity", "f1", "auroc", "auprc"):
            overall[name] = _macro(by_class[name], present)
        overall["ece"] = scores.expected_calibration_error(self.gaps, weights)
        overall["brier"] = weights @ self.brier / total
        overall["nll"] = weights @ self.nll / total
        return overall | {f"class_{name}": values for name, values in by_class.items()}

    def balanced_accuracy(self, weights: Floats) -> Floats:
        """Returns `(R,)` under weights `(R, N)`, without the work for all other scores."""
        return self._balanced(scores.rates(self._tables(weights)))

    def _balanced(self, by_class: dict[str, Floats]) -> Floats:
        sensitivity = by_class["sensitivity"]
        balanced = (sensitivity + by_class["specificity"]) / 2 if self.multilabel else sensitivity
        return _macro(balanced, sensitivity >= 0)

    def confusion(self) -> tuple[Any, ...]:
        """Returns counts as in `Evaluation.confusion`."""
        ones = np.ones((1, len(self.truth)))
        matrix = self._tables(ones) if self.multilabel else scores.confusion(self.truth, self.said, self.k, ones)
        return _as_tuples(matrix[0].astype(int).tolist())

    def _tables(self, weights: Floats) -> Floats:
        if not self.multilabel:
            return scores.class_tables(self.truth, self.said, self.k, weights)
        return scores.label_tables(self.shown, self.said, weights)


def _macro(values: Floats, present: np.ndarray) -> Floats:
    """Averages `(R, K)` over the classes that occur to `(R,)`, skipping undefined scores."""
    use = present & ~np.isnan(values)
    count = use.sum(axis=1)
    total = np.where(use, values, 0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _interval(values: Floats, level: float) -> tuple[Floats, Floats]:
    """Returns percentiles over resamples `(R,)` or `(R, K)`, skipping those in which a score is undefined."""
    rows = values.reshape(len(values), -1)
    limits = np.full((2, rows.shape[1]), np.nan)
    known = ~np.isnan(rows).all(axis=0)
    if known.any():
        tail = (1 - level) / 2
        limits[:, known] = np.nanquantile(rows[:, known], (tail, 1 - tail), axis=0)
    low, high = limits.reshape(2, *values.shape[1:])
    return low, high


def check_predictions(labels: ArrayLike, probabilities: ArrayLike, k: int, task: str) -> tuple[Ints, Floats]:
    """Returns int64 labels and float64 probabilities `(N, K)`.

    Raises:
        EvaluationError: shapes, values or labels that do not match.
    """
    truth, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if task not in TASKS:
        raise EvaluationError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if p.ndim == 1 and k == 2 and task != "multilabel":
        p = np.stack([1 - p, p], axis=1)
    if truth.ndim == 2 and truth.shape[1] == 1 and task != "multilabel":
        truth = truth[:, 0]
    expected = (len(p), k) if task == "multilabel" else (len(p),)
    if p.shape != (len(p), k) or truth.shape != expected or k < 1 or len(p) == 0:
        raise EvaluationError(
            f"{task} with {k} classes needs probabilities (N, {k}) and labels "
            f"{'(N, ' + str(k) + ')' if task == 'multilabel' else '(N,)'}; got {p.shape} and {truth.shape}"
        )
    if truth.dtype.kind not in "iub" and not (truth.dtype.kind == "f" and (truth == np.rint(truth)).all()):
        raise EvaluationError(f"labels must be integers, not {truth.dtype}")
    truth = truth.astype(np.int64)
    highest = 1 if task == "multilabel" else k - 1
    if truth.min() < 0 or truth.max() > highest:
        raise EvaluationError(f"labels must be 0 to {highest}; found {truth.min()} to {truth.max()}")
    if not np.isfinite(p).all():
        bad = int((~np.isfinite(p)).any(axis=1).sum())
        raise EvaluationError(f"{bad} of {len(p)} images have probabilities that are NaN or infinite")
    if p.min() < -1e-6 or p.max() > 1 + 1e-6:
        raise EvaluationError("probabilities must be in [0, 1]; these look like logits")
    if task != "multilabel" and np.abs(p.sum(axis=1) - 1).max() > 1e-2:
        raise EvaluationError(
            "the probabilities of an image must sum to 1; for independent labels use task='multilabel'"
        )
    return truth, np.clip(p, 0, 1) if p.min() < 0 or p.max() > 1 else p


def _limits(threshold: Thresholds, k: int) -> Floats:
    """Returns the thresholds of the labels, `(K,)`."""
    limits = np.asarray(threshold, dtype=np.float64)
    if limits.shape not in ((), (k,)) or not ((limits >= 0) & (limits <= 1)).all():
        raise EvaluationError(f"threshold must be a probability, or one per label ({k}); got {threshold}")
    return np.broadcast_to(limits, (k,))


def _as_given(limits: Floats) -> float | tuple[float, ...]:
    """Returns one threshold where all labels share it."""
    return float(limits[0]) if (limits == limits[0]).all() else tuple(limits.tolist())


def _notes(classes: Sequence[str], support: np.ndarray, n: int, task: str) -> tuple[str, ...]:
    notes = []
    absent = [name for name, count in zip(classes, support, strict=True) if count == 0]
    if absent:
        notes.append(f"No images of {', '.join(absent)}: left out of macro averages.")
    everywhere = [name for name, count in zip(classes, support, strict=True) if count == n]
    if everywhere:
        notes.append(f"Every image shows {', '.join(everywhere)}: no specificity and no AUROC.")
    rare = [name for name, count in zip(classes, support, strict=True) if 0 < count < 10]
    if rare:
        notes.append(f"Fewer than 10 images of {', '.join(rare)}: metrics of these classes are unreliable.")
    return tuple(notes)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
