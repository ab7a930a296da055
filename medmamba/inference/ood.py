"""Out-of-distribution detection: whether an image is like those that a model was trained on.

Scores computed from logits (`metrics.calibration`: energy, maximum probability) fail where it matters most: a model of
blood cells can return larger logits for an X-ray than for any cell. The features before the classifier alone fail too:
they keep what tells the classes apart. So the pixels and every stage of the network are compared (`signature`,
`ood_parts`). It remains a heuristic: an image of the same kind from another device is often flagged, and one with an
unknown disease often is not.

Two thresholds, both from validation images alone: 5 % of them are flagged as unusual; "far" are images so unlike them
that 1 % of images like these are expected there.

`medmamba train` saves a detector beside the weights, `from_pretrained` loads it and `predict` applies it. For a model
from elsewhere:

>>> model.unusual = learn_unusual(model, dataset)  # with splits train and val
>>> model.predict(image).unusual
>>> model.unusual.save("my_model")  # beside its weights
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import ConfigError, MedMambaConfig
from ..utils import config_checks as checks
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, file_hash
from ..utils.files import write_text
from ..utils.strict_json import read_json
from ..utils.weights import read_weights
from .fingerprint import Fingerprint, changed_parts, fingerprint
from .fitted import body
from .ood_file import VERSION, packed, read_combined, rounded, unpacked, write_combined
from .ood_parts import Combined, fit_parts, tail
from .signature import PIXELS, groups

NAME = "unusual.json"
MAX_FILE = 64 * 2**20  # bytes
FAR = 0.01  # share of images like the validation images that are expected to be called far
Level = Literal["near", "far"]


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
        measured: measured performance, {"own": {...}, "auroc": {dataset: {...}}, "same_kind": {...}}, the last of
            other collections of such images; see `benchmarks/unusual.py`.
        weights: fingerprint of the network that computed the features (`inference.fingerprint`), or None if unrecorded.
        reference: statistics of the validation images; None in files of earlier versions.
        combined: what compares whole signatures; None in files of version 1, whose score is the root mean squared
            distance of the pooled features to the nearest class mean.
    """

    means: NDArray[np.float64] = field(repr=False)
    spread: NDArray[np.float64] = field(repr=False)
    threshold: float
    coverage: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    weights: Fingerprint | None = field(default=None, repr=False)
    reference: Reference | None = field(default=None, repr=False)
    combined: Combined | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """Number of columns of what is scored: signatures, or for version 1 pooled features."""
        return self.combined.width if self.combined else self.means.shape[1]

    @property
    def far(self) -> float:
        """The score above which an image is far from all that the model knows; infinite for version 1."""
        return self.combined.far if self.combined else float("inf")

    def score(self, seen: ArrayLike) -> NDArray[np.float64]:
        """Returns the scores (N,), higher for more unusual images.

        Args:
            seen: (N, S) signatures (`inference.signatures`); for version 1 their last C columns, the pooled features,
                suffice.
        """
        x = np.asarray(seen, dtype=np.float64)
        fits = x.ndim == 2 and (x.shape[1] == self.width or (not self.combined and x.shape[1] > PIXELS + self.width))
        if not fits:
            what = "signatures" if self.combined else "features"
            raise UnusualError(f"expected {what} (N, {self.width}), got {x.shape}; are they of this model?")
        near = self._to_nearest_class(x[:, -self.means.shape[1] :])
        return self.combined.excesses(x, near).mean(1) if self.combined else near

    def _to_nearest_class(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        distances = [np.sqrt((((features - mean) / self.spread) ** 2).mean(1)) for mean in self.means]
        return np.min(distances, axis=0)

    def is_unusual(self, seen: ArrayLike) -> NDArray[np.bool_]:
        """Returns whether each image is flagged, (N,); see `score`."""
        return self.score(seen) > self.threshold

    def levels(self, seen: ArrayLike) -> list[Level | None]:
        """Returns for each image None where it is not flagged, "far" where it is unlike all that the model knows, or
        else "near"; see `score`."""
        scores = self.score(seen)
        return [None if s <= self.threshold else "far" if s > self.far else "near" for s in scores]

    def pixel_score(self, pixels: ArrayLike) -> NDArray[np.float64]:
        """Returns how unlike the training images pixels alone are, (N,), relative to the limit: above 1 is far.

        Args:
            pixels: (N, `signature.PIXELS`), see `signature.pixel_statistics`.

        Raises:
            UnusualError: a detector of version 1.
        """
        if self.combined is None:
            raise UnusualError("this detector is of version 1 and knows nothing of pixels: fit it again")
        return self.combined.pixel_score(np.asarray(pixels, np.float64)) / max(self.combined.pixel_limit, 1e-12)

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
        record: dict[str, Any] = {
            "weights": sha256,
            "fingerprint": dict(weights),
            "threshold": self.threshold,
            "coverage": self.coverage,
            "measured": dict(self.measured),
        }
        if self.combined:
            record |= {"version": VERSION, "spread": packed(self.spread), "means": packed(self.means)}
            record["combined"] = write_combined(self.combined)
        else:
            record |= {"spread": rounded(self.spread), "means": [rounded(mean) for mean in self.means]}
        if self.reference is not None:
            parts = {"mean": self.reference.mean, "std": self.reference.std, "scores": self.reference.scores}
            record["reference"] = {k: packed(v) if self.combined else rounded(v) for k, v in parts.items()}
        text = json.dumps(record, indent=1, allow_nan=False)
        write_text(path, text + "\n")


def load_unusual(folder: str | os.PathLike) -> Unusual | None:
    """Loads the detector of a model folder; returns None if there is none or it belongs to other weights.

    Raises:
        UnusualError: the file was not written by `Unusual.save`, or by a later version.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path, MAX_FILE)
        checks.integer(record.get("version", 1), "version", 1, VERSION)
        means = unpacked(record["means"], "means", (None, None))
        spread = unpacked(record["spread"], "spread", (means.shape[1],))
        if not (spread > 0).all():
            raise ConfigError("spread must be positive")
        threshold = checks.real(record["threshold"], "threshold", -1e30, 1e30)
        coverage = checks.real(record["coverage"], "coverage", 0, 1)
        measured, weights = _measured(record["measured"]), record["weights"]
        known = checks.fingerprint(record["fingerprint"], "fingerprint") if record.get("fingerprint") else None
        reference = _reference(record["reference"], len(spread)) if record.get("reference") else None
        combined = read_combined(record["combined"]) if record.get("version", 1) > 1 else None
        if combined and combined.width <= PIXELS + len(spread):
            raise ConfigError(f"signatures of {combined.width} columns cannot hold {len(spread)} features")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusualError(f"{path} cannot be read ({error!r}); delete it, or measure again") from error
    found = Unusual(means, spread, threshold, coverage, measured, known, reference, combined)
    return found if weights == _weights_of(Path(folder)) else None


def _reference(found: Any, width: int) -> Reference:
    """Validates the statistics of the validation images, and returns them."""
    mean, std = (unpacked(found[name], f"reference.{name}", (width,)) for name in ("mean", "std"))
    scores = unpacked(found["scores"], "reference.scores", (None,))
    if len(scores) < 2 or (std < 0).any():
        raise ConfigError("the reference holds a single score, or a negative standard deviation")
    return Reference(len(scores), mean, std, np.sort(scores))


def _measured(found: Any) -> dict[str, Any]:
    """Validates the measured performance that cards and the app show, and returns it."""
    record = checks.plain(found, "measured")
    rows, same = record.get("auroc", {}), record.get("same_kind", {})
    if not isinstance(rows, dict) or not isinstance(same, dict) or ((rows or same) and "own" not in record):
        raise ConfigError("measured.auroc and measured.same_kind must be objects, beside measured.own")
    rows = [*rows.values(), *same.values()]
    for row in [*rows, *([record["own"]] if "own" in record else [])]:
        for name, value in (row if isinstance(row, dict) else {"": None}).items():
            checks.real(value, f"measured.{name}", 0, 1e12)
    for row in rows:
        if missing := {"auroc", "n", "called_unusual"} - set(row):
            raise ConfigError(f"measured.auroc lacks {', '.join(sorted(missing))}")
    return record


def fit_unusual(
    features: ArrayLike, labels: ArrayLike, validation: ArrayLike, coverage: float = 0.95, task: str = "multiclass"
) -> Unusual:
    """Fits a detector of pooled features alone, where there is nothing else; `fit_signatures` finds much more.

    Args:
        features: (N, C) pooled features of training images.
        labels: (N,) their classes; ignored for multi-label tasks, which are treated as one class.
        validation: (M, C) pooled features of validation images.
        coverage: fraction of the validation images that are not to be flagged.

    Raises:
        UnusualError: the shapes are inconsistent, or there are too few images.
    """
    x, held_out = np.asarray(features, np.float64), np.asarray(validation, np.float64)
    groups_ = np.zeros(len(x), int) if task == "multilabel" else np.asarray(labels)
    if x.ndim != 2 or held_out.ndim != 2 or held_out.shape[1] != x.shape[1] or groups_.shape != x.shape[:1]:
        raise UnusualError(f"features {x.shape}, labels {groups_.shape} and validation {held_out.shape} do not fit")
    if not 0 < coverage < 1:
        raise UnusualError(f"coverage must be between 0 and 1, got {coverage}")
    present = np.unique(groups_)
    if len(x) < len(present) + 2 or len(held_out) == 0:
        raise UnusualError(f"{len(x)} training and {len(held_out)} validation images are too few")
    means = np.stack([x[groups_ == k].mean(0) for k in present])
    rest = x - means[np.searchsorted(present, groups_)]
    spread = np.sqrt((rest**2).sum(0) / (len(x) - len(present)))
    # A constant feature carries no information, but its spread must not be 0.
    spread = np.maximum(spread, max(1e-3 * float(spread.mean()), 1e-12))
    return _with_threshold(Unusual(means, spread, 0.0, coverage), held_out, held_out)


def fit_signatures(
    signatures: ArrayLike,
    labels: ArrayLike,
    validation: ArrayLike,
    config: MedMambaConfig,
    coverage: float = 0.95,
    altered: ArrayLike | None = None,
) -> Unusual:
    """Fits a detector to signatures (`inference.signatures`): of training images, its thresholds to validation images.

    Args:
        signatures: (N, S) of training images.
        labels: (N,) their classes; ignored for multi-label tasks, which are treated as one class.
        validation: (M, S) of validation images.
        config: of the model.
        coverage: fraction of the validation images that are not to be flagged.
        altered: (L, S) of slightly altered validation images (`inference.altered`), of which only one in a hundred may
            be called far.

    Raises:
        UnusualError: as `fit_unusual`.
    """
    x, held_out = np.asarray(signatures, np.float64), np.asarray(validation, np.float64)
    columns = groups(config)
    most = max(part.stop for part in columns.values())
    if x.ndim != 2 or x.shape[1] != most or held_out.shape[1:] != (most,):
        raise UnusualError(f"expected signatures (N, {most}) and (M, {most}), got {x.shape} and {held_out.shape}")
    bare = fit_unusual(x[:, -config.dims[-1] :], labels, held_out[:, -config.dims[-1] :], coverage, config.task)
    parts, centre, reach = fit_parts(x, columns, held_out, bare.score(held_out[:, -config.dims[-1] :]))
    found = dataclasses.replace(bare, combined=Combined(parts, centre, reach))
    assert found.combined is not None
    scores, pixels = found.score(held_out), found.combined.pixel_score(held_out[:, :PIXELS])
    limits = dataclasses.replace(found.combined, far=tail(scores, FAR), pixel_limit=tail(pixels, FAR))
    found = _with_threshold(dataclasses.replace(found, combined=limits), held_out, held_out[:, -config.dims[-1] :])
    return found if altered is None else tolerant(found, altered)


def tolerant(found: Unusual, altered: ArrayLike) -> Unusual:
    """Returns a detector of signatures that calls only one in a hundred of these images far.

    Args:
        altered: (L, S), see `fit_signatures`.

    Raises:
        UnusualError: the detector is of version 1, or the shape is wrong.
    """
    x = np.asarray(altered, np.float64)
    scores = found.score(x)
    if found.combined is None or not len(x):
        raise UnusualError("this needs a detector of version 2, and images")
    far = max(found.combined.far, float(np.quantile(scores, 1 - FAR)))
    limit = max(found.combined.pixel_limit, float(np.quantile(found.combined.pixel_score(x[:, :PIXELS]), 1 - FAR)))
    return dataclasses.replace(found, combined=dataclasses.replace(found.combined, far=far, pixel_limit=limit))


def _with_threshold(found: Unusual, held_out: NDArray[np.float64], features: NDArray[np.float64]) -> Unusual:
    """Returns the detector with threshold and reference of validation images."""
    scores = np.sort(found.score(held_out))
    threshold = float(np.quantile(scores, found.coverage, method="higher"))
    reference = None
    if len(held_out) > 1:
        reference = Reference(len(held_out), features.mean(0), features.std(0, ddof=1), scores)
    combined = found.combined
    if combined:  # of few images the tail may begin below the threshold
        combined = dataclasses.replace(combined, far=max(combined.far, threshold))
    return dataclasses.replace(found, threshold=threshold, reference=reference, combined=combined)


def _weights_of(folder: Path) -> str:
    """Returns the hash of the weights in `config.json`, which was verified on loading, or else computes it."""
    try:
        recorded = read_json(folder / CONFIG_NAME).get(CHECKSUM_KEY)
    except (OSError, ValueError, AttributeError):
        recorded = None
    return recorded or file_hash(folder / WEIGHTS_NAME)
