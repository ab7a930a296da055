"""One answer for a patient, lesion or study from the answers for its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .thresholds import DecisionError

METHODS = ("mean_logit", "max", "noisy_or")


@dataclass(frozen=True, eq=False)
class Grouped:
    """Probabilities and labels of patients.

    Attributes:
        keys: the G groups, in order of their first image; None for an image without one, which is its own.
        probabilities: `(G, K)`.
        labels: `(G,)` or `(G, K)`; None if no labels were given.
        sizes: `(G,)` images of each.
        mixed: groups whose images have several labels; for exclusive classes they count as the most frequent one, at a
            tie as the first in the order of the classes.
    """

    keys: tuple[Any, ...]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64] | None
    sizes: NDArray[np.int64]
    mixed: int = 0

    def __len__(self) -> int:
        return len(self.keys)


def combine(probabilities: ArrayLike, method: str = "mean_logit", task: str = "multiclass") -> NDArray[np.float64]:
    """Returns the probabilities `(K,)` of one patient from those of its images `(M, K)`.

    "mean_logit": the mean of the logits, as of images that each say a little of the same thing. "max": the largest
    probability of each class. "noisy_or": a class is absent only if it is in none of the images, as of lesions that
    each show in one image. For exclusive classes the result is scaled to a sum of 1. A single image is given back
    unchanged.

    Raises:
        DecisionError: unknown method, or no images.
    """
    if method not in METHODS:
        raise DecisionError(f"unknown way to combine images {method!r}; there are {', '.join(METHODS)}")
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) == 0:
        raise DecisionError(f"expected probabilities (M, K) of at least one image, got {p.shape}")
    if len(p) == 1:
        return p[0].copy()
    tiny = 1e-12
    if method == "mean_logit":
        if task == "multilabel":
            q = p.clip(tiny, 1 - tiny)
            return 1 / (1 + np.exp(-(np.log(q) - np.log1p(-q)).mean(axis=0)))
        mean = np.log(p.clip(tiny, 1)).mean(axis=0)
        found = np.exp(mean - mean.max())
    elif method == "max":
        found = p.max(axis=0)
    else:
        found = 1 - np.prod(1 - p, axis=0)
    return found if task == "multilabel" else found / found.sum()


def group(
    probabilities: ArrayLike,
    groups: Sequence[Any],
    labels: ArrayLike | None = None,
    method: str = "mean_logit",
    task: str = "multiclass",
) -> Grouped:
    """Returns one answer, and one label, per patient.

    Args:
        probabilities: `(N, K)` of images, calibrated.
        groups: patient of each image, None where unknown.
        labels: `(N,)`; of a multi-label task `(N, K)`, of which a patient has those that any of the images has.
        method: see `combine`.
        task: "multiclass" or "multilabel".

    Raises:
        DecisionError: lengths that do not match, or an unknown method.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    truth = None if labels is None else np.asarray(labels)
    if p.ndim != 2 or len(groups) != len(p) or (truth is not None and len(truth) != len(p)):
        raise DecisionError(f"{len(groups)} groups do not match probabilities {p.shape}")
    rows = members(groups)
    found = np.array([combine(p[r], method, task) for r in rows]).reshape(len(rows), p.shape[1])
    keys = tuple(groups[r[0]] for r in rows)
    sizes = np.array([len(r) for r in rows], dtype=np.int64)
    if truth is None:
        return Grouped(keys, found, None, sizes)
    if truth.ndim == 2:
        return Grouped(keys, found, np.array([truth[r].max(axis=0) for r in rows]), sizes)
    mixed = sum(len(set(truth[r].tolist())) > 1 for r in rows)
    return Grouped(keys, found, np.array([np.bincount(truth[r]).argmax() for r in rows]), sizes, mixed)


def members(groups: Sequence[Any]) -> list[list[int]]:
    """Returns the images of each group, in order of their first; an image without a group (None) is one of its own."""
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(groups):
        found.setdefault((None, i) if key is None else ("", key), []).append(i)
    return list(found.values())


def mostly(flags: ArrayLike | None, groups: Sequence[Any]) -> NDArray[np.bool_] | None:
    """Returns whether most images of each group are flagged as unusual, `(G,)`; None where that is not known."""
    if flags is None:
        return None
    known = np.asarray(flags, dtype=bool)
    return np.array([known[rows].mean() > 0.5 for rows in members(groups)])


def choose_method(
    probabilities: ArrayLike, groups: Sequence[Any], labels: ArrayLike, task: str = "multiclass"
) -> tuple[str, dict[str, float]]:
    """Returns the way to combine images with the lowest log loss of validation patients, and the loss of each.

    Ties go to the first of `METHODS`, as where no patient has several images.
    """
    losses = {}
    for method in METHODS:
        found = group(probabilities, groups, labels, method, task)
        q, truth = found.probabilities.clip(1e-12, 1 - 1e-12), found.labels
        assert truth is not None
        if truth.ndim == 2:
            losses[method] = float(-(truth * np.log(q) + (1 - truth) * np.log(1 - q)).mean())
        else:
            losses[method] = float(-np.log(q[np.arange(len(q)), truth]).mean())
    return min(METHODS, key=lambda method: round(losses[method], 9)), losses
