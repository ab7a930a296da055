"""Probabilities that mean what they say, and a warning for images unlike the training data.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599) divides the logits by one number fitted on validation images:
the ranking of the classes never changes, only how sure the model sounds. The out-of-distribution score (energy, Liu et
al. 2020, arXiv:2010.03759; for several labels the joint energy of Wang et al. 2021, arXiv:2111.14332) is compared with
a threshold that 95 % of the validation images pass. It is a heuristic: an image below the threshold can still be
anything.

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

from . import scores
from .scores import Floats

ECE_BINS = 15
OOD_SCORES = ("energy", "max_prob")

_COLDEST, _HOTTEST = 0.05, 20.0
_BISECTIONS = 60


class CalibrationError(ValueError):
    """Logits and labels that cannot be calibrated, or a stored calibration that makes no sense."""


@dataclass(frozen=True)
class OutOfDistribution:
    """Which score marks unusual images, and from where.

    Attributes:
        score: "energy" or "max_prob", see `ood_score`.
        threshold: an image with a score above it is called unusual.
        coverage: share of the validation images that are not.
    """

    score: str
    threshold: float
    coverage: float

    def is_unusual(self, logits: ArrayLike, task: str = "multiclass") -> NDArray[np.bool_]:
        """`(N,)`, True where an image is unlike the validation images, from logits `(N, K)`."""
        return ood_score(logits, self.score, task) > self.threshold


@dataclass(frozen=True)
class Calibration:
    """What `config.json` keeps under "calibration".

    Attributes:
        method: "temperature", or "none" where validation could not determine one (every image right, or a constant
            model); `temperature` is then 1.
        temperature: divide logits by it; above 1 the network was too sure of itself.
        n: number of validation images.
        ece_before, ece_after: expected calibration error on them, 15 bins.
        ood: the warning for unusual images, if one was fitted.
        task: "multiclass" or "multilabel".
    """

    method: str
    temperature: float
    n: int
    ece_before: float
    ece_after: float
    ood: OutOfDistribution | None = None
    task: str = "multiclass"

    def probabilities(self, logits: ArrayLike) -> Floats:
        """Calibrated probabilities `(N, K)` of logits `(N, K)`."""
        return to_probabilities(logits, self.task, self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """For `MedMambaConfig.calibration`; the task stands in the config itself."""
        data: dict[str, Any] = {
            "method": self.method,
            "temperature": self.temperature,
            "n": self.n,
            "ece_before": self.ece_before,
            "ece_after": self.ece_after,
        }
        if self.ood is not None:
            data["ood"] = {"score": self.ood.score, "threshold": self.ood.threshold, "coverage": self.ood.coverage}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], task: str = "multiclass") -> Calibration:
        """Back from a config.

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
            raise CalibrationError(f"unknown score {ood.score!r} for unusual images; known: {', '.join(OOD_SCORES)}")
        return cls(**values, ood=ood, task=task)


def fit_calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    task: str = "multiclass",
    *,
    ood: str | None = "energy",
    coverage: float = 0.95,
) -> Calibration:
    """Fit the temperature and the threshold for unusual images on validation data (never on test data).

    Args:
        logits: `(N, K)`, as the model gives them.
        labels: integers `(N,)`, or 0 and 1 `(N, K)` for a multi-label task.
        ood: "energy", "max_prob", or None for no warning.
        coverage: share of these images that pass as usual.

    Raises:
        CalibrationError: shapes that do not fit, or logits that are not finite.
    """
    z, onehot = _checked(logits, labels, task)
    temperature = fit_temperature(logits, labels, task)
    threshold = None
    if ood is not None:
        if not 0 < coverage < 1:
            raise CalibrationError(f"coverage must be between 0 and 1, got {coverage}")
        # "higher": at least this share passes, also where scores are few.
        value = float(np.quantile(ood_score(z, ood, task), coverage, method="higher"))
        threshold = OutOfDistribution(ood, value, coverage)
    before = _ece(to_probabilities(z, task), onehot, task)
    if temperature is None:
        return Calibration("none", 1.0, len(z), before, before, threshold, task)
    after = _ece(to_probabilities(z / temperature, task), onehot, task)
    return Calibration("temperature", temperature, len(z), before, after, threshold, task)


def fit_temperature(logits: ArrayLike, labels: ArrayLike, task: str = "multiclass") -> float | None:
    """The temperature that minimises the log loss; None where none between 0.05 and 20 does.

    In the inverse temperature b the loss is convex: its slope is the mean over images of
    sum_k p_k(b) z_k - z_label, which never falls; its zero is found by bisection.
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
    """Returns the softmax over the classes, or a sigmoid for each label, of logits `(..., K)` over a temperature.

    The one place where logits become probabilities, in float64.
    """
    p = np.array(logits, dtype=np.float64)  # one copy, changed in place: there may be many images and classes
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
    """How unusual each image looks, `(N,)`, larger for more unusual, from uncalibrated logits `(N, K)`.

    "energy": -log sum_k exp(z_k); multi-label: -sum_k log(1 + exp(z_k)). Unbounded, uses the size of the logits.
    "max_prob": 1 minus the largest probability; multi-label: the mean over labels of min(p, 1 - p).

    Raises:
        CalibrationError: another score.
    """
    z = np.asarray(logits, dtype=np.float64)
    if score == "energy":
        return -np.logaddexp(0, z).sum(axis=1) if task == "multilabel" else -np.logaddexp.reduce(z, axis=1)
    if score == "max_prob":
        p = to_probabilities(z, task)
        return np.minimum(p, 1 - p).mean(axis=1) if task == "multilabel" else 1 - p.max(axis=1)
    raise CalibrationError(f"unknown score {score!r} for unusual images; known: {', '.join(OOD_SCORES)}")


def ood_auroc(usual: ArrayLike, unusual: ArrayLike, score: str = "energy", task: str = "multiclass") -> float:
    """How well a score tells two sets of images apart: 1 always, 0.5 not at all.

    Args:
        usual: logits `(N, K)` of test images of the dataset the model was trained on.
        unusual: logits `(M, K)` of the same model for images of another dataset.
    """
    values = np.concatenate([ood_score(usual, score, task), ood_score(unusual, score, task)])
    foreign = np.arange(len(values)) >= len(np.asarray(usual))
    return float(scores.auroc_and_auprc(foreign, scores.rank(values), np.ones((1, len(values))))[0][0])


def _checked(logits: ArrayLike, labels: ArrayLike, task: str) -> tuple[Floats, Floats]:
    """float64 logits and 0/1 labels, both `(N, K)`."""
    z, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if task not in ("multiclass", "multilabel"):
        raise CalibrationError(f"task must be multiclass or multilabel, got {task!r}")
    if z.ndim != 2 or len(z) == 0 or truth.shape != (z.shape if task == "multilabel" else z.shape[:1]):
        raise CalibrationError(f"logits {z.shape} and labels {truth.shape} do not fit together for a {task} task")
    if not np.isfinite(z).all():
        raise CalibrationError(
            "some logits are not finite; the model or its precision is at fault, not the calibration"
        )
    if task == "multilabel":
        return z, truth.astype(np.float64)
    if truth.min() < 0 or truth.max() >= z.shape[1]:
        raise CalibrationError(f"labels must be 0 to {z.shape[1] - 1}; found {truth.min()} to {truth.max()}")
    return z, np.eye(z.shape[1])[truth.astype(np.int64)]


def _ece(p: Floats, onehot: Floats, task: str) -> float:
    if task == "multilabel":
        gaps = scores.calibration_gaps(p, onehot, ECE_BINS)
    else:
        right = np.take_along_axis(onehot, p.argmax(axis=1)[:, None], axis=1)
        gaps = scores.calibration_gaps(p.max(axis=1), right, ECE_BINS)
    return float(scores.expected_calibration_error(gaps, np.ones((1, len(p))))[0])
