"""Temperature scaling and out-of-distribution (OOD) scores from logits.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599) divides the logits by a number fitted on validation images: it
changes confidence, never the ranking of the classes. The OOD score (energy, Liu et al. 2020, arXiv:2010.03759; for
multi-label tasks the joint energy of Wang et al. 2021, arXiv:2111.14332) is compared with a threshold that 95 % of the
validation images pass. It is a heuristic: images below the threshold can still be out of distribution.

>>> calibration = fit_calibration(val_logits, val_labels)
>>> config.calibration = calibration.to_dict()
>>> probabilities = calibration.probabilities(test_logits)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import TASKS
from . import scores
from .scores import Floats
from .thresholds import best_f1_thresholds

ECE_BINS = 15
OOD_SCORES = ("energy", "max_prob")

_COLDEST, _HOTTEST = 0.05, 20.0
_BISECTIONS = 60


class CalibrationError(ValueError):
    """Raised for logits and labels that cannot be calibrated, or an invalid stored calibration."""


@dataclass(frozen=True)
class OutOfDistribution:
    """An OOD score with its threshold.

    Attributes:
        score: "energy" or "max_prob", see `ood_score`.
        threshold: images with a higher score are marked as unusual.
        coverage: fraction of the validation images that are not.
    """

    score: str
    threshold: float
    coverage: float

    def is_unusual(self, logits: ArrayLike, task: str = "multiclass") -> NDArray[np.bool_]:
        """Returns `(N,)`, True where an image is unlike the validation images, from logits `(N, K)`."""
        return ood_score(logits, self.score, task) > self.threshold


@dataclass(frozen=True)
class Calibration:
    """A fitted calibration, stored in `config.json` under "calibration".

    Attributes:
        method: "temperature", or "none" where validation does not determine one (every image correct, or a constant
            model); `temperature` is then 1.
        temperature: divisor of the logits; above 1 if the network was overconfident.
        n: number of validation images.
        ece_before: expected calibration error on them without the temperature, 15 bins.
        ece_after: the same with the temperature.
        ood: the OOD score and threshold, if fitted.
        task: "multiclass", "multilabel" or "ordinal".
        thresholds: of a multi-label task, the calibrated probability above which each label counts as present.
    """

    method: str
    temperature: float
    n: int
    ece_before: float
    ece_after: float
    ood: OutOfDistribution | None = None
    task: str = "multiclass"
    thresholds: tuple[float, ...] | None = None

    def probabilities(self, logits: ArrayLike) -> Floats:
        """Returns calibrated probabilities `(N, K)` of logits `(N, K)`."""
        return to_probabilities(logits, self.task, self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `MedMambaConfig.calibration`, without the task, which the config has."""
        data: dict[str, Any] = {
            "method": self.method,
            "temperature": self.temperature,
            "n": self.n,
            "ece_before": self.ece_before,
            "ece_after": self.ece_after,
        }
        if self.ood is not None:
            data["ood"] = {"score": self.ood.score, "threshold": self.ood.threshold, "coverage": self.ood.coverage}
        if self.thresholds is not None:
            data["thresholds"] = list(self.thresholds)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], task: str = "multiclass") -> Calibration:
        """Loads a calibration from a config.

        Raises:
            CalibrationError: unknown method or score, or a temperature that is not above 0.
        """
        try:
            ood = OutOfDistribution(**data["ood"]) if data.get("ood") else None
            values = {key: data[key] for key in ("method", "temperature", "n", "ece_before", "ece_after")}
        except (KeyError, TypeError) as exc:
            raise CalibrationError(f"the calibration in the config is incomplete or has unknown fields: {exc}") from exc
        if values["method"] not in ("temperature", "none"):
            raise CalibrationError(f"unknown calibration method {values['method']!r}; known: temperature, none")
        if not (math.isfinite(values["temperature"]) and values["temperature"] > 0):
            raise CalibrationError(f"the temperature must be above 0, got {values['temperature']}")
        if ood is not None and ood.score not in OOD_SCORES:
            raise CalibrationError(f"unknown out-of-distribution score {ood.score!r}; known: {', '.join(OOD_SCORES)}")
        thresholds = None if data.get("thresholds") is None else tuple(data["thresholds"])
        return cls(**values, ood=ood, task=task, thresholds=thresholds)


def fit_calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    task: str = "multiclass",
    *,
    ood: str | None = "energy",
    coverage: float = 0.95,
) -> Calibration:
    """Fits the temperature, the OOD threshold and, for several labels, their thresholds on validation data.

    Never on test data. See `best_f1_thresholds` for how the threshold of a label is chosen.

    Args:
        logits: `(N, K)`, raw outputs of the model.
        labels: integers `(N,)`, or 0 and 1 `(N, K)` for a multi-label task.
        task: "multiclass", "multilabel" or "ordinal".
        ood: OOD score: "energy", "max_prob", or None for no threshold.
        coverage: fraction of these images that pass the threshold.

    Raises:
        CalibrationError: shapes that do not match, or logits that are not finite.
    """
    z, onehot = _checked(logits, labels, task)
    temperature = fit_temperature(logits, labels, task)
    threshold = None
    if ood is not None:
        if not 0 < coverage < 1:
            raise CalibrationError(f"coverage must be between 0 and 1, got {coverage}")
        # "higher": at least this fraction passes, even with few scores.
        value = float(np.quantile(ood_score(z, ood, task), coverage, method="higher"))
        threshold = OutOfDistribution(ood, value, coverage)
    before = _ece(to_probabilities(z, task), onehot, task)
    p = to_probabilities(z / (temperature or 1.0), task)
    of_labels = tuple(best_f1_thresholds(onehot, p).tolist()) if task == "multilabel" else None
    if temperature is None:
        return Calibration("none", 1.0, len(z), before, before, threshold, task, of_labels)
    return Calibration("temperature", temperature, len(z), before, _ece(p, onehot, task), threshold, task, of_labels)


def fit_temperature(logits: ArrayLike, labels: ArrayLike, task: str = "multiclass") -> float | None:
    """Returns the temperature that minimises the log loss; None if it is not between 0.05 and 20.

    The loss is convex in the inverse temperature b: its slope, the mean over images of sum_k p_k(b) z_k - z_label,
    never decreases, and bisection finds its zero.
    """
    z, onehot = _checked(logits, labels, task)

    def slope(b: float) -> float:
        return float((z * (to_probabilities(b * z, task) - onehot)).sum())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def to_probabilities(logits: ArrayLike, task: str = "multiclass", temperature: float = 1.0) -> Floats:
    """Returns float64 probabilities of logits `(..., K)` over a temperature: softmax, or a sigmoid per label."""
    p = np.array(logits, dtype=np.float64)  # one copy, modified in place: arrays may be large
    p /= temperature
    if task == "multilabel":
        p *= 0.5
        np.tanh(p, out=p)
        p += 1
        p *= 0.5
        return p
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def ood_score(logits: ArrayLike, score: str = "energy", task: str = "multiclass") -> Floats:
    """Returns an OOD score per image, `(N,)`, higher for more unusual images, from uncalibrated logits `(N, K)`.

    "energy": -log sum_k exp(z_k); multi-label: -sum_k log(1 + exp(z_k)). Unbounded, depends on the scale of the logits.
    "max_prob": 1 minus the largest probability; multi-label: the mean over labels of min(p, 1 - p).

    Raises:
        CalibrationError: unknown score.
    """
    z = np.asarray(logits, dtype=np.float64)
    if score == "energy":
        return -np.logaddexp(0, z).sum(axis=1) if task == "multilabel" else -np.logaddexp.reduce(z, axis=1)
    if score == "max_prob":
        p = to_probabilities(z, task)
        return np.minimum(p, 1 - p).mean(axis=1) if task == "multilabel" else 1 - p.max(axis=1)
    raise CalibrationError(f"unknown out-of-distribution score {score!r}; known: {', '.join(OOD_SCORES)}")


def ood_auroc(usual: ArrayLike, unusual: ArrayLike, score: str = "energy", task: str = "multiclass") -> float:
    """Returns the AUROC of an OOD score for separating two sets of images: 1 perfect, 0.5 chance.

    Args:
        usual: logits `(N, K)` of test images of the dataset the model was trained on.
        unusual: logits `(M, K)` of the same model for images of another dataset.
        score: see `ood_score`.
        task: "multiclass" or "multilabel".
    """
    values = np.concatenate([ood_score(usual, score, task), ood_score(unusual, score, task)])
    foreign = np.arange(len(values)) >= len(np.asarray(usual))
    return float(scores.auroc_and_auprc(foreign, scores.rank(values), np.ones((1, len(values))))[0][0])


def _checked(logits: ArrayLike, labels: ArrayLike, task: str) -> tuple[Floats, Floats]:
    """Returns float64 logits and 0/1 labels, both `(N, K)`."""
    z, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if task not in TASKS:
        raise CalibrationError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if z.ndim != 2 or len(z) == 0 or truth.shape != (z.shape if task == "multilabel" else z.shape[:1]):
        raise CalibrationError(f"logits {z.shape} and labels {truth.shape} do not match for a {task} task")
    if not np.isfinite(z).all():
        raise CalibrationError(
            "some logits are not finite; the cause is the model or its precision, not the calibration"
        )
    if task == "multilabel":
        return z, truth.astype(np.float64)
    if truth.min() < 0 or truth.max() >= z.shape[1]:
        raise CalibrationError(f"labels must be 0 to {z.shape[1] - 1}; found {truth.min()} to {truth.max()}")
    return z, np.eye(z.shape[1])[truth.astype(np.int64)]


def _ece(p: Floats, onehot: Floats, task: str) -> float:
    """Returns the expected calibration error of probabilities `(N, K)`."""
    if task == "multilabel":
        gaps = scores.calibration_gaps(p, onehot, ECE_BINS)
    else:
        right = np.take_along_axis(onehot, p.argmax(axis=1)[:, None], axis=1)
        gaps = scores.calibration_gaps(p.max(axis=1), right, ECE_BINS)
    return float(scores.expected_calibration_error(gaps, np.ones((1, len(p))))[0])
