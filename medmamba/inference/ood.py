"""Out-of-distribution detection from penultimate-layer features.

Scores of the logits (`metrics.calibration`: energy, largest probability) fail where it matters most: an X-ray shown
to a model of blood cells can get larger logits than any cell. The distance of the pooled features from those of every
class is more reliable, each measured in units of its spread within the classes: the Mahalanobis distance of Lee et
al. 2018 (arXiv:1807.03888) with a diagonal covariance, which needs few numbers and few images. It remains a
heuristic.

`medmamba train` leaves such a warning beside the weights, `from_pretrained` finds it and `predict` asks it. For a
model from elsewhere:

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
    """Features that do not fit together, or a record that makes no sense."""


@dataclass(frozen=True, eq=False)
class Unusual:
    """A warning for images unlike the training images.

    Attributes:
        means: (K, C) pooled features of each class; (1, C) for several labels.
        spread: (C,) standard deviation within the classes.
        threshold: an image with a score above it is called unusual.
        coverage: share of the validation images that are not.
        measured: how well it works: {"own": {...}, "auroc": {dataset: {...}}}, see `benchmarks/unusual.py`.
        weights: fingerprint of the network that made the features (`inference.fingerprint`), or None if not recorded.
    """

    means: NDArray[np.float64] = field(repr=False)
    spread: NDArray[np.float64] = field(repr=False)
    threshold: float
    coverage: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    weights: Fingerprint | None = field(default=None, repr=False)

    def score(self, features: ArrayLike) -> NDArray[np.float64]:
        """(N,) how unusual, from pooled features (N, C): root mean squared distance to the nearest class."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise UnusualError(f"expected features (N, {self.means.shape[1]}), got {x.shape}; are they of this model?")
        distances = [np.sqrt((((x - mean) / self.spread) ** 2).mean(1)) for mean in self.means]
        return np.min(distances, axis=0)

    def is_unusual(self, features: ArrayLike) -> NDArray[np.bool_]:
        """(N,) True where an image is unlike the training images."""
        return self.score(features) > self.threshold

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `unusual.json` into a model folder, bound to the weights there.

        Raises:
            UnusualError: it was learnt with other weights than those in the folder.
        """
        folder = Path(folder)
        there = body(read_weights(folder))
        if self.weights is not None and changed_parts(there, self.weights):
            raise UnusualError(f"this was learnt with other weights than those in {folder}; learn it again with those")
        self.write(folder / NAME, _weights_of(folder), fingerprint(there))
        return folder / NAME

    def write(self, path: Path, sha256: str, weights: Fingerprint) -> None:
        """Writes the file.

        Args:
            sha256: of the `model.safetensors` beside which it is put.
            weights: fingerprint of the tensors in that, without the classifier.
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
        text = json.dumps(record, indent=1, allow_nan=False)
        write_text(path, text + "\n")


def load_unusual(folder: str | os.PathLike) -> Unusual | None:
    """The warning that lies in a model folder; None where there is none, or where it belongs to other weights.

    Raises:
        UnusualError: a file that was not written by `Unusual.save`.
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusualError(f"{path} cannot be read ({error!r}); delete it, or measure again") from error
    fits = means.ndim == 2 and len(means) and spread.shape == means.shape[1:]
    if not fits or not (spread > 0).all() or not (np.isfinite(means).all() and np.isfinite(spread).all()):
        raise UnusualError(f"{path} holds means {means.shape} and spread {spread.shape}; delete it, or measure again")
    found = Unusual(means, spread, threshold, coverage, measured, known)
    return found if weights == _weights_of(Path(folder)) else None


def _measured(found: Any) -> dict[str, Any]:
    """What cards and the app show of how well it works, in the types that they expect."""
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
    """Means and spread from training images, the threshold from validation images.

    Args:
        features: (N, C) pooled features of training images.
        labels: (N,) their classes; ignored where several labels can apply, which is one class to this.
        validation: (M, C) pooled features of validation images.
        coverage: share of the validation images that pass as usual.

    Raises:
        UnusualError: shapes that do not fit, or too few images.
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
    # A feature that never moves says nothing; its unit must not be 0.
    spread = np.maximum(spread, max(1e-3 * float(spread.mean()), 1e-12))
    found = Unusual(means, spread, 0.0, coverage)
    threshold = float(np.quantile(found.score(held_out), coverage, method="higher"))
    return Unusual(means, spread, threshold, coverage)


def _weights_of(folder: Path) -> str:
    """The hash that `config.json` has of the weights, which was checked when they were fetched; else their own."""
    try:
        recorded = read_json(folder / CONFIG_NAME).get(CHECKSUM_KEY)
    except (OSError, ValueError, AttributeError):
        recorded = None
    return recorded or file_hash(folder / WEIGHTS_NAME)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
