"""Out-of-distribution detection from penultimate-layer features.

Scores computed from logits (`metrics.calibration`: energy, maximum probability) fail where it matters most: a model of
blood cells can return larger logits for an X-ray than for any cell. The distance of the pooled features to the nearest
class mean is more reliable: the Mahalanobis distance of Lee et al. 2018 (arXiv:1807.03888) with a diagonal covariance,
which needs few parameters and few images. It remains a heuristic.

`medmamba train` saves a detector beside the weights, `from_pretrained` loads it and `predict` applies it. For a model
from elsewhere:

>>> model.unusual = learn_unusual(model, dataset)  # with splits train and val
>>> model.predict(image).unusual
>>> model.unusual.save("my_model")  # beside its weights
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import ConfigError
from ..utils import config_checks as checks
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, file_hash
from ..utils.files import write_text
from ..utils.strict_json import read_json
from ..utils.weights import read_weights
from .fingerprint import Fingerprint, changed_parts, fingerprint
from .fitted import body

NAME = "unusual.json"
MAX_FILE = 64 * 2**20  # bytes
_DIGITS = 5  # significant, in the file


class UnusualError(ValueError):
    """Features of inconsistent shapes, or an invalid record."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What validation images look like to the network, to compare other images with; see `evaluation.drift`.

    Attributes:
        n: number of images.
        mean: (C,), mean of their pooled features.
        std: (C,), standard deviation of their pooled features.
        scores: (n,), their out-of-distribution scores, ascending.
    """

    n: int
    mean: NDArray[np.float64] = field(repr=False)
    std: NDArray[np.float64] = field(repr=False)
    scores: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Unusual:
    """An out-of-distribution detector: flags images unlike the training images.

    Attributes:
        means: (K, C), the mean pooled features of each class; (1, C) for multi-label models.
        spread: (C,), the standard deviation within classes.
        threshold: images with a score above it are flagged as unusual.
        coverage: fraction of the validation images that are not flagged.
        measured: measured performance, {"own": {...}, "auroc": {dataset: {...}}}, see `benchmarks/unusual.py`.
        weights: fingerprint of the network that computed the features (`inference.fingerprint`), or None if unrecorded.
        reference: statistics of the validation images; None in files of earlier versions.
    """

    means: NDArray[np.float64] = field(repr=False)
    spread: NDArray[np.float64] = field(repr=False)
    threshold: float
    coverage: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    weights: Fingerprint | None = field(default=None, repr=False)
    reference: Reference | None = field(default=None, repr=False)

    def score(self, features: ArrayLike) -> NDArray[np.float64]:
        """Returns the scores (N,) of pooled features (N, C): root mean squared distance to the nearest class mean."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise UnusualError(f"expected features (N, {self.means.shape[1]}), got {x.shape}; are they of this model?")
        distances = [np.sqrt((((x - mean) / self.spread) ** 2).mean(1)) for mean in self.means]
        return np.min(distances, axis=0)

    def is_unusual(self, features: ArrayLike) -> NDArray[np.bool_]:
        """Returns whether each image is flagged, (N,), from pooled features (N, C)."""
        return self.score(features) > self.threshold

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `unusual.json` into a model folder, bound to the weights there.

        Raises:
            UnusualError: it was fitted with other weights than those in the folder.
        """
        folder = Path(folder)
        there = body(read_weights(folder))
        if self.weights is not None and changed_parts(there, self.weights):
            raise UnusualError(f"this was fitted with other weights than those in {folder}; fit it again with those")
        self.write(folder / NAME, _weights_of(folder), fingerprint(there))
        return folder / NAME

    def write(self, path: Path, sha256: str, weights: Fingerprint) -> None:
        """Writes the file.

        Args:
            sha256: hash of the `model.safetensors` in the same folder.
            weights: fingerprint of its tensors without the classifier.
        """
        record = {
            "weights": sha256,
            "fingerprint": dict(weights),
            "threshold": self.threshold,
            "coverage": self.coverage,
            "measured": dict(self.measured),
            "spread": _rounded(self.spread),
            "means": [_rounded(mean) for mean in self.means],
        }
        if self.reference is not None:
            r = self.reference
            record["reference"] = {"mean": _rounded(r.mean), "std": _rounded(r.std), "scores": _rounded(r.scores)}
        text = json.dumps(record, indent=1, allow_nan=False)
        write_text(path, text + "\n")


def load_unusual(folder: str | os.PathLike) -> Unusual | None:
    """Loads the detector of a model folder; returns None if there is none or it belongs to other weights.

    Raises:
        UnusualError: the file was not written by `Unusual.save`.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path, MAX_FILE)
        means, spread = np.array(record["means"], np.float64), np.array(record["spread"], np.float64)
        threshold = checks.real(record["threshold"], "threshold", -1e30, 1e30)
        coverage = checks.real(record["coverage"], "coverage", 0, 1)
        measured, weights = _measured(record["measured"]), record["weights"]
        known = checks.fingerprint(record["fingerprint"], "fingerprint") if record.get("fingerprint") else None
        reference = _reference(record["reference"], len(spread)) if record.get("reference") else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusualError(f"{path} cannot be read ({error!r}); delete it, or measure again") from error
    fits = means.ndim == 2 and len(means) and spread.shape == means.shape[1:]
    if not fits or not (spread > 0).all() or not (np.isfinite(means).all() and np.isfinite(spread).all()):
        raise UnusualError(f"{path} holds means {means.shape} and spread {spread.shape}; delete it, or measure again")
    found = Unusual(means, spread, threshold, coverage, measured, known, reference)
    return found if weights == _weights_of(Path(folder)) else None


def _reference(found: Any, width: int) -> Reference:
    """Validates the statistics of the validation images, and returns them."""
    mean, std, scores = (np.array(found[name], np.float64) for name in ("mean", "std", "scores"))
    if mean.shape != (width,) or std.shape != (width,) or scores.ndim != 1 or len(scores) < 2:
        raise ConfigError(f"reference holds a mean {mean.shape}, std {std.shape} and scores {scores.shape}")
    if not all(np.isfinite(part).all() for part in (mean, std, scores)) or (std < 0).any():
        raise ConfigError("the reference holds numbers that are not finite, or a negative standard deviation")
    return Reference(len(scores), mean, std, np.sort(scores))


def _measured(found: Any) -> dict[str, Any]:
    """Validates the measured performance that cards and the app show, and returns it."""
    record = checks.plain(found, "measured")
    rows = record.get("auroc", {})
    if not isinstance(rows, dict) or (rows and "own" not in record):
        raise ConfigError("measured.auroc must be an object, beside measured.own")
    for row in [*rows.values(), *([record["own"]] if "own" in record else [])]:
        for name, value in (row if isinstance(row, dict) else {"": None}).items():
            checks.real(value, f"measured.{name}", 0, 1e12)
    for row in rows.values():
        if missing := {"auroc", "n", "called_unusual"} - set(row):
            raise ConfigError(f"measured.auroc lacks {', '.join(sorted(missing))}")
    return record


def fit_unusual(
    features: ArrayLike, labels: ArrayLike, validation: ArrayLike, coverage: float = 0.95, task: str = "multiclass"
) -> Unusual:
    """Fits means and spread to training images, and the threshold to validation images.

    Args:
        features: (N, C) pooled features of training images.
        labels: (N,) their classes; ignored for multi-label tasks, which are treated as one class.
        validation: (M, C) pooled features of validation images.
        coverage: fraction of the validation images that are not to be flagged.

    Raises:
        UnusualError: the shapes are inconsistent, or there are too few images.
    """
    x, held_out = np.asarray(features, np.float64), np.asarray(validation, np.float64)
    groups = np.zeros(len(x), int) if task == "multilabel" else np.asarray(labels)
    if x.ndim != 2 or held_out.ndim != 2 or held_out.shape[1] != x.shape[1] or groups.shape != x.shape[:1]:
        raise UnusualError(f"features {x.shape}, labels {groups.shape} and validation {held_out.shape} do not fit")
    if not 0 < coverage < 1:
        raise UnusualError(f"coverage must be between 0 and 1, got {coverage}")
    present = np.unique(groups)
    if len(x) < len(present) + 2 or len(held_out) == 0:
        raise UnusualError(f"{len(x)} training and {len(held_out)} validation images are too few")
    means = np.stack([x[groups == k].mean(0) for k in present])
    rest = x - means[np.searchsorted(present, groups)]
    spread = np.sqrt((rest**2).sum(0) / (len(x) - len(present)))
    # A constant feature carries no information, but its spread must not be 0.
    spread = np.maximum(spread, max(1e-3 * float(spread.mean()), 1e-12))
    found = Unusual(means, spread, 0.0, coverage)
    threshold = float(np.quantile(found.score(held_out), coverage, method="higher"))
    reference = None
    if len(held_out) > 1:
        scores = np.sort(found.score(held_out))
        reference = Reference(len(held_out), held_out.mean(0), held_out.std(0, ddof=1), scores)
    return Unusual(means, spread, threshold, coverage, reference=reference)


def _weights_of(folder: Path) -> str:
    """Returns the hash of the weights in `config.json`, which was verified on loading, or else computes it."""
    try:
        recorded = read_json(folder / CONFIG_NAME).get(CHECKSUM_KEY)
    except (OSError, ValueError, AttributeError):
        recorded = None
    return recorded or file_hash(folder / WEIGHTS_NAME)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
