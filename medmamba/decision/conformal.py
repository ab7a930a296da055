"""Sets of classes that hold the true one with a stated probability: split conformal prediction.

A score says how badly a class fits an image; the threshold is a quantile of the scores of the true classes of
validation images, and the set of a new image holds the classes that score no worse. If the new image and the
validation images are exchangeable (drawn alike, in any order), the set holds the true class with a probability of at
least the coverage, whatever the model and the distribution (Vovk, Gammerman and Shafer 2005). Scores: "lac" (Sadinle et
al. 2019, arXiv:1609.00451), "aps" (Romano et al. 2020, arXiv:2006.02544), "raps" (Angelopoulos et al. 2021,
arXiv:2009.14193).

>>> sets = fit_sets(val_probabilities, val_labels, classes, coverage=0.9)
>>> sets.members(probabilities)  # (N, K), True where a class is in the set
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import Proportion, effective_size, proportion
from .thresholds import DecisionError

SCORES = ("lac", "aps", "raps")
INFINITE = 1e9  # a threshold above every score, as JSON has no infinity


@dataclass(frozen=True)
class ConformalSets:
    """A fitted rule for sets of classes.

    Attributes:
        name: by which `predict` is asked for it.
        coverage: the probability promised, such as 0.95.
        score: "lac", "aps" or "raps".
        thresholds: K; a class is in the set if its score is at most its own. `INFINITE`: always.
        counts: K validation images of each class.
        conditional: K, True where the promise holds for images of that class alone.
        pooled: True where the promise holds on average over the classes that are not `conditional`.
        randomised: whether the scores are randomised, which makes the coverage exact and sets smaller.
        seed: of the randomisation, which depends on an image's probabilities alone.
        penalty, rank: of "raps": added to the score for each class ranked beyond `rank`.
    """

    name: str
    coverage: float
    score: str
    thresholds: tuple[float, ...]
    counts: tuple[int, ...]
    conditional: tuple[bool, ...]
    pooled: bool = False
    randomised: bool = True
    seed: int = 0
    penalty: float = 0.0
    rank: int = 1

    def members(self, probabilities: ArrayLike, task: str = "multiclass") -> NDArray[np.bool_]:
        """Returns `(N, K)`, True where a class is in the set of an image, from probabilities `(N, K)`.

        The most probable class of a multi-class task is in every set: an empty one would tell nobody anything, and
        this can only raise the coverage.

        Raises:
            DecisionError: another number of classes.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] != len(self.thresholds):
            raise DecisionError(f"expected probabilities (N, {len(self.thresholds)}), got {p.shape}")
        scores = nonconformity(p, self.score, self.randomised, self.seed, self.penalty, self.rank)
        # One unit in the last place of float32 logits must not put a validation image out of its own set.
        inside = scores <= np.array(self.thresholds) + 1e-9
        if task != "multilabel" and len(p):
            inside[np.arange(len(p)), p.argmax(axis=1)] = True
        return inside

    def statement(self, classes: Sequence[str]) -> str:
        """Returns in plain words what is promised, for whom, and on what condition."""
        share = f"{100 * self.coverage:g} %"
        own = [name for name, alone in zip(classes, self.conditional, strict=True) if alone]
        always = [name for name, limit in zip(classes, self.thresholds, strict=True) if limit >= INFINITE]
        rest = [name for name in classes if name not in own and name not in always]
        if not own:
            text = f"The set holds the true class of a new image with a probability of at least {share}"
            text += " on average over all classes, but possibly less for single classes."
        elif len(own) == len(classes):
            text = f"For each class alone, the set holds it with a probability of at least {share} if it is the truth."
        else:
            text = f"For each of {_listed(own)} alone, the set holds it with a probability of at least {share} if it is"
            text += " the truth."
            if rest and self.pooled:
                text += f" For {_listed(rest)}, of which there were too few validation images, the same holds on "
                text += "average over these together."
        if always and own:
            text += f" {_listed(always)} {'is' if len(always) == 1 else 'are'} in every set, for lack of images."
        return (
            f"{text} This holds for any model and any kind of images, on average over validation sets like the one of "
            f"{sum(self.counts)} images that was used{self._spread(classes)}, as long as new images come from the same "
            "source: not for another hospital, device or mix of patients."
        )

    def _spread(self, classes: Sequence[str]) -> str:
        """Returns how far below the promise a validation set of this size may end, for the rarest class.

        The share held by a threshold that is the k-th smallest of n scores is distributed as Beta(k, n + 1 - k), whose
        quantile is a limit of Clopper and Pearson.
        """
        sizes = [(n, name) for n, name, alone in zip(self.counts, classes, self.conditional, strict=True) if alone]
        n, name = min(sizes) if sizes else (sum(self.counts), "")
        k = math.ceil((n + 1) * self.coverage - 1e-9)
        if not 0 < k <= n:
            return ""
        low = proportion(k, n, 0.8, "clopper-pearson").low
        of = f" images of {name}" if name else ""
        return f" (with {n}{of}, nine in ten such sets keep at least {100 * low:.0f} %)"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `config.json`."""
        return {
            "name": self.name,
            "coverage": self.coverage,
            "score": self.score,
            "thresholds": list(self.thresholds),
            "counts": list(self.counts),
            "conditional": list(self.conditional),
            "pooled": self.pooled,
            "randomised": self.randomised,
            "seed": self.seed,
            "penalty": self.penalty,
            "rank": self.rank,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConformalSets:
        """Loads the result of `to_dict`, which `medmamba.utils.decision_checks` has checked."""
        lists = {name: tuple(data[name]) for name in ("thresholds", "counts", "conditional")}
        return cls(**{**data, **lists})


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def nonconformity(
    probabilities: ArrayLike,
    score: str = "lac",
    randomised: bool = True,
    seed: int = 0,
    penalty: float = 0.0,
    rank: int = 1,
) -> NDArray[np.float64]:
    """Returns the score of every class for every image, `(N, K)`, higher for classes that fit worse.

    "lac": 1 minus the probability. "aps": the probability of all classes that are more probable, plus that of the class
    itself, times a random number in (0, 1) of the image if `randomised`. "raps": that plus `penalty` for each place of
    the class beyond the first `rank`.

    Raises:
        DecisionError: unknown score.
    """
    if score not in SCORES:
        raise DecisionError(f"unknown score {score!r}; there are {', '.join(SCORES)}")
    p = np.asarray(probabilities, dtype=np.float64)
    if score == "lac":
        return 1 - p
    order = np.argsort(-p, axis=1, kind="stable")
    sorted_p = np.take_along_axis(p, order, axis=1)
    u = draws(p, seed)[:, None] if randomised else 1.0
    found = np.cumsum(sorted_p, axis=1) - sorted_p * (1 - u)
    if score == "raps":
        found = found + penalty * np.maximum(np.arange(1, p.shape[1] + 1) - rank, 0)
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, found, axis=1)
    return scores


def draws(probabilities: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Returns a number in (0, 1) per image, `(N,)`, that looks random and is always the same for the same answer.

    A hash of the probabilities, so that an image gets the same set alone, in a batch and in any order. The guarantee
    does not suffer: it needs images that are exchangeable, and the number is a part of the image's score.
    """
    rounded = np.ascontiguousarray(np.round(np.asarray(probabilities, dtype=np.float64), 4) + 0.0)
    key = int(seed).to_bytes(8, "little", signed=True)
    found = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rounded]
    return np.array([(int.from_bytes(digest, "little") + 0.5) / 2**64 for digest in found])


def quantile(scores: ArrayLike, coverage: float, groups: Sequence[Any] | NDArray[Any] | None = None) -> float:
    """Returns the threshold that a new score does not exceed with a probability of at least `coverage`.

    Of n scores the ceil((n + 1) * coverage)-th smallest; infinity if there is none. With patients, every patient counts
    as one, however many images: the promise is then for a random image of a new patient (Lee, Barber and Willett 2023,
    arXiv:2306.06342).
    """
    s = np.asarray(scores, dtype=np.float64)
    if len(s) == 0:
        return math.inf
    keys = [(i,) if groups is None or groups[i] is None else groups[i] for i in range(len(s))]
    sizes: dict[Any, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    weights = np.array([1 / sizes[key] for key in keys])
    order = np.argsort(s, kind="stable")
    reached = np.cumsum(weights[order])
    enough = np.flatnonzero(reached >= coverage * (len(sizes) + 1) - 1e-9)
    return float(s[order][enough[0]]) if len(enough) else math.inf


def fit_sets(
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    coverage: float = 0.95,
    score: str = "lac",
    by_class: bool | str = "auto",
    least: int | None = None,
    groups: Sequence[Any] | None = None,
    task: str = "multiclass",
    randomised: bool = True,
    seed: int = 0,
    penalty: float = 0.1,
    rank: int = 1,
    name: str = "",
) -> ConformalSets:
    """Fits the thresholds on validation images, which must not have trained the model.

    Args:
        probabilities: `(N, K)`, calibrated.
        labels: `(N,)`; of a multi-label task `(N, K)` of 0 and 1, for which each label that applies is in the set with
            the promised probability.
        classes: K names.
        coverage: the probability to promise.
        score: see `nonconformity`; "lac" for a multi-label task. The smallest sets on average are those of "lac".
        by_class: True: a threshold of its own for every class, infinite where there are too few images; False: one for
            all; "auto": its own where there are at least `least` images (patients) of a class, one for the others
            together.
        least: default: as many as a finite threshold takes, and at least 20.
        groups: patient of each image, see `quantile`.
        task: "multiclass" or "multilabel".
        randomised, seed, penalty, rank: see `ConformalSets`.
        name: default: such as "sets-0.95".

    Raises:
        DecisionError: shapes or values that do not fit.
    """
    p, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    k = len(classes)
    if p.ndim != 2 or p.shape[1] != k or len(p) == 0 or truth.shape != (p.shape if task == "multilabel" else (len(p),)):
        raise DecisionError(f"probabilities {p.shape} and labels {truth.shape} do not fit {k} classes ({task})")
    if not np.isfinite(p).all():
        raise DecisionError("some probabilities are not finite")
    if not 0 < coverage < 1:
        raise DecisionError(f"coverage must be between 0 and 1, got {coverage}")
    if task == "multilabel" and score != "lac":
        raise DecisionError("sets of a multi-label task use the score 'lac'")
    if by_class not in (True, False, "auto"):
        raise DecisionError(f"by_class must be True, False or 'auto', got {by_class!r}")
    penalty, rank = (penalty, rank) if score == "raps" else (0.0, 1)
    randomised = randomised and score != "lac"
    scores = nonconformity(p, score, randomised, seed, penalty, rank)
    of = np.empty(len(p), dtype=object)
    of[:] = (
        [(i,) for i in range(len(p))]
        if groups is None
        else [(i,) if group is None else group for i, group in enumerate(groups)]
    )
    shown = truth.astype(bool) if task == "multilabel" else truth[:, None] == np.arange(k)
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    least = max(needed, 20) if least is None else least
    alone = np.array([by_class is True or len(set(of[shown[:, i]])) >= least for i in range(k)])
    alone &= by_class is not False
    thresholds = np.full(k, math.inf)
    for i in np.flatnonzero(alone):
        thresholds[i] = quantile(scores[shown[:, i], i], coverage, of[shown[:, i]])
    if not alone.all():
        rest = ~alone
        rows, columns = np.nonzero(shown[:, rest])
        thresholds[rest] = quantile(scores[:, rest][rows, columns], coverage, of[rows])
    finite = np.isfinite(thresholds)
    return ConformalSets(
        name or f"sets-{coverage:g}",
        float(coverage),
        score,
        tuple(float(t) if good else INFINITE for t, good in zip(thresholds, finite, strict=True)),
        tuple(int(n) for n in shown.sum(axis=0)),
        tuple(bool(a and good) for a, good in zip(alone, finite, strict=True)),
        bool((~alone & finite).any()),
        randomised,
        seed,
        float(penalty),
        rank,
    )


@dataclass(frozen=True)
class Coverage:
    """How often sets hold the true class on labelled images, and how large they are.

    Attributes:
        overall: share of the images (multi-label: of the labels that apply) whose set holds it.
        by_class: name, images, and share, for each class.
        mean_size: mean number of classes in a set.
        sizes: images by size of the set, from 0 to K.
        promised: the coverage that was fitted.
    """

    overall: Proportion
    by_class: tuple[tuple[str, int, Proportion], ...]
    mean_size: float
    sizes: tuple[int, ...]
    promised: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {
            "promised": self.promised,
            "overall": self.overall.to_dict(),
            "by_class": [{"name": n, "images": c, **share.to_dict()} for n, c, share in self.by_class],
            "mean_size": self.mean_size,
            "sizes": list(self.sizes),
        }


def coverage_of(
    sets: ConformalSets,
    probabilities: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    *,
    task: str = "multiclass",
    groups: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Coverage:
    """Checks sets on labelled images, such as the test split, with Wilson intervals (see `effective_size`)."""
    inside, truth = sets.members(probabilities, task), np.asarray(labels)
    k = len(classes)
    shown = truth.astype(bool) if truth.ndim == 2 else truth[:, None] == np.arange(k)
    of = np.empty(len(inside), dtype=object)
    of[:] = [None] * len(inside) if groups is None else list(groups)

    def share(rows: NDArray, columns: NDArray) -> Proportion:
        hits = inside[rows, columns]
        if not len(hits):
            return proportion(0, 0, level)
        worth = effective_size(hits, of[rows]) if groups is not None else float(len(hits))
        return proportion(float(hits.mean()) * worth, worth, level)

    rows, columns = np.nonzero(shown)
    found = [(classes[i], int(shown[:, i].sum()), share(rows[columns == i], columns[columns == i])) for i in range(k)]
    sizes = np.bincount(inside.sum(axis=1), minlength=k + 1)
    return Coverage(
        share(rows, columns), tuple(found), float(inside.sum(axis=1).mean()), tuple(map(int, sizes)), sets.coverage
    )
