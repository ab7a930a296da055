"""Metrics of every subgroup with intervals, gaps between groups, and tests corrected for their number.

Each group is scored by `evaluate`, as the whole set is. The test asks whether a group differs from a random one:
groups are drawn from the same images, with as many units (patients where known) of each class, and the metric of the
real group is compared with theirs. So neither its size nor its mix of classes makes a group look different, which
matters for metrics that depend on them, such as the ECE. Holm's correction covers all tests of a call: reports are read
for any significant group, and the tests share images, so that they depend on each other.

>>> found = evaluate_subgroups(labels, probabilities, classes, {"sex": sex, "age": age_group})
>>> print(found.to_markdown())
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import bootstrap_weights, resampling_units
from .evaluate import EvaluationError, Scorer, check_predictions, evaluate
from .group_result import FEW, MISSING, SMALL, TESTED, Group, GroupTest, Subgroups
from .multiplicity import benjamini_hochberg, holm, permutation_p
from .result import Estimate
from .scores import Floats, Ints

_CHUNK = 2**22  # elements of permuted groups in memory at once


def evaluate_subgroups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    columns: Mapping[str, Sequence[str | None]],
    *,
    task: str = "multiclass",
    patients: Sequence[str | None] | None = None,
    tested: Sequence[str] = TESTED,
    permutations: int | None = None,
    alpha: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
    notes: Sequence[str] = (),
    threshold: float | Sequence[float] = 0.5,
) -> Subgroups:
    """Scores every group of every column, and tests each against the other images.

    Args:
        labels, probabilities, classes, task, patients, resamples, seed, threshold: as for `evaluate`.
        columns: value of each image `(N,)` by name of the column; None or "": missing, which is a group of its own.
        tested: overall metrics that are tested.
        permutations: of each test; 0 for no tests. The smallest p-value is 2 / (permutations + 1), so None takes enough
            for Holm's correction to find something: four times the number of tests over alpha, at least 1000.
        alpha: level of the corrected tests.
        notes: stored with the result.

    Raises:
        EvaluationError: labels and probabilities that do not match, columns of another length, or unknown metrics.
    """
    truth, p = check_predictions(labels, probabilities, len(classes), task)
    for name, values in columns.items():
        if len(values) != len(truth):
            raise EvaluationError(f"column {name!r} has {len(values)} values for {len(truth)} images")
    if not 0 < alpha < 1 or (permutations or 0) < 0:
        raise EvaluationError(f"alpha must be in (0, 1) and permutations at least 0, got {alpha} and {permutations}")
    whole = Scorer(truth, p, len(classes), task, threshold, 15)
    if unknown := set(tested) - set(whole.overall_names):
        raise EvaluationError(f"unknown metrics {', '.join(sorted(unknown))}; known: {', '.join(whole.overall_names)}")
    options: dict[str, Any] = dict(task=task, resamples=resamples, seed=seed, threshold=threshold)
    found: list[Group] = []
    said = list(notes)
    named = {
        column: np.array([MISSING if value in (None, "") else str(value) for value in values], dtype=object)
        for column, values in columns.items()
    }
    if permutations is None:
        permutations = max(1000, math.ceil(4 * len(tested) * sum(len(set(names)) for names in named.values()) / alpha))
    for column, names in named.items():
        groups = _order(names)
        if len(groups) == 1:
            said.append(f"{column}: every image is {groups[0]}, so there is nothing to compare")
        unit_of, stratum_of, mixed = _units(truth, patients, names)
        if mixed:
            said.append(
                f"{column}: {mixed} patients have images in several groups; their images of each group are one unit, "
                "which makes p-values somewhat too small"
            )
        members = np.stack([names == group for group in groups])  # (G, N)
        tests = _tests(whole, members, unit_of, stratum_of, tested, permutations, resamples, seed)
        for i, (group, inside) in enumerate(zip(groups, members, strict=True)):
            theirs = None if patients is None else [patients[int(j)] for j in np.flatnonzero(inside)]
            evaluation = evaluate(truth[inside], p[inside], classes, patients=theirs, **options)
            warnings = _warnings(truth[inside], truth, classes)
            gap = _overconfidence(truth[inside], p[inside], threshold)
            found.append(Group(column, group, evaluation, gap, tests[i], warnings))
    found = _corrected(found)
    gaps = {column: _gaps([group for group in found if group.column == column]) for column in columns}
    return Subgroups(tuple(found), gaps, alpha, permutations, tuple(said))


def permuted_groups(
    members: np.ndarray, unit_of: Ints, stratum_of: Ints, count: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields `count` random divisions `(G, N)` of the images into groups, as bool.

    Units are exchanged within their stratum (class), so that each group keeps its number of units of every class.

    Args:
        members: `(G, N)`, True where an image is in a group; all images of a unit are in the same one.
        unit_of: `(N,)` unit of each image.
        stratum_of: `(U,)` stratum of each unit.
    """
    rng = np.random.default_rng(seed)
    first = np.unique(unit_of, return_index=True)[1]
    of_unit = members[:, first].argmax(axis=0)  # (U,)
    strata = [np.flatnonzero(stratum_of == stratum) for stratum in np.unique(stratum_of)]
    for _ in range(count):
        drawn = of_unit.copy()
        for units in strata:
            drawn[units] = rng.permutation(drawn[units])
        yield drawn[unit_of] == np.arange(len(members))[:, None]


def _tests(
    whole: Scorer,
    members: np.ndarray,
    unit_of: Ints,
    stratum_of: Ints,
    tested: Sequence[str],
    permutations: int,
    resamples: int,
    seed: int,
) -> list[tuple[GroupTest, ...]]:
    if len(members) < 2 or not tested:
        return [()] * len(members)
    # A group and its complement have no unit in common, so one resample of all units resamples both.
    ones = np.ones((1, members.shape[1]), np.float32)
    resampled = list(bootstrap_weights(unit_of, stratum_of, resamples, seed)) if resamples else []
    weights = np.concatenate([ones, *resampled])
    p = _permutation_tests(whole, members, unit_of, stratum_of, tested, permutations, seed)
    found = []
    for i, inside in enumerate(members):
        others = _scores(whole, weights * ~inside, tested)  # (1 + R, M)
        difference = _scores(whole, weights * inside, tested) - others
        found.append(
            tuple(
                GroupTest(name, float(others[0, m]), _estimate(difference[:, m]), float(p[i, m]))
                for m, name in enumerate(tested)
            )
        )
    return found


def _permutation_tests(
    whole: Scorer,
    members: np.ndarray,
    unit_of: Ints,
    stratum_of: Ints,
    tested: Sequence[str],
    permutations: int,
    seed: int,
) -> Floats:
    """Returns p-values `(G, M)`, NaN for groups of fewer than `FEW` images, which could not show anything."""
    p = np.full((len(members), len(tested)), np.nan)
    tried = np.flatnonzero(members.sum(axis=1) >= FEW)
    if not permutations or not len(tried):
        return p
    null: list[list[Floats]] = [[] for _ in tried]
    drawn = permuted_groups(members, unit_of, stratum_of, permutations, seed)
    while chunk := list(itertools.islice(drawn, max(1, _CHUNK // members.size))):
        weights = np.stack(chunk, axis=1).astype(np.float32)  # (G, P, N)
        for found, i in zip(null, tried, strict=True):
            found.append(_scores(whole, weights[i], tested))
    for found, i in zip(null, tried, strict=True):
        observed = _scores(whole, members[i][None].astype(np.float32), tested)[0]
        p[i] = permutation_p(observed, np.concatenate(found))
    return p


def _scores(whole: Scorer, weights: Floats, names: Sequence[str]) -> Floats:
    """Returns `(R, M)` scores under weights `(R, N)`."""
    step = max(1, _CHUNK // weights.shape[1])
    parts = [weights[start : start + step] for start in range(0, len(weights), step)]
    values = whole.under(lambda: iter(parts))
    return np.stack([values[name] for name in names], axis=1)


def _units(truth: Ints, patients: Sequence[str | None] | None, names: np.ndarray) -> tuple[Ints, Ints, int]:
    """Returns the units, their strata, and the number of patients who are in several groups."""
    if patients is None:
        return *resampling_units(truth, None), 0
    groups: dict[str, set[str]] = {}
    for patient, name in zip(patients, names, strict=True):
        if patient is not None:
            groups.setdefault(patient, set()).add(name)
    mixed = sum(len(found) > 1 for found in groups.values())
    keys = [None if patient is None else f"{patient}\0{name}" for patient, name in zip(patients, names, strict=True)]
    return *resampling_units(truth, keys), mixed


def _order(names: np.ndarray) -> list[str]:
    """Returns the groups in order, missing values last."""
    found = sorted(set(names), key=lambda name: (name == MISSING, _leading_number(name), name))
    return [str(name) for name in found]


def _leading_number(name: str) -> float:
    head = name.removeprefix("below ").split(" ")[0]
    try:
        return float(head) - (0.5 if name.startswith("below ") else 0)
    except ValueError:
        return math.inf


def _warnings(labels: Ints, everything: Ints, classes: Sequence[str]) -> tuple[str, ...]:
    counts, total = (
        part.sum(axis=0) if part.ndim == 2 else np.bincount(part, minlength=len(classes))
        for part in (labels, everything)
    )
    said = []
    if len(labels) < SMALL:
        said.append(f"only {len(labels)} images" + (", not tested" if len(labels) < FEW else ""))
    few = [f"{classes[i]} ({counts[i]})" for i in range(len(classes)) if counts[i] < FEW and total[i] > 0]
    if few:
        said.append(f"fewer than {FEW} images of {', '.join(few)}")
    return tuple(said)


def _overconfidence(labels: Ints, p: Floats, threshold: float | Sequence[float]) -> float:
    if labels.ndim == 2:
        return float((np.maximum(p, 1 - p) - ((p > np.asarray(threshold)) == labels)).mean())
    return float((p.max(axis=1) - (p.argmax(axis=1) == labels)).mean())


def _corrected(groups: list[Group]) -> list[Group]:
    p = np.array([test.p for group in groups for test in group.tests])
    if not len(p):
        return groups
    adjusted = iter(zip(holm(p), benjamini_hochberg(p), strict=True))
    found = []
    for group in groups:
        tests = []
        for test in group.tests:
            family, discovery = next(adjusted)
            tests.append(replace(test, holm=float(family), bh=float(discovery)))
        found.append(replace(group, tests=tuple(tests)))
    return found


def _gaps(groups: list[Group]) -> dict[str, float]:
    used = [g for g in groups if g.name != MISSING and g.evaluation.n_images >= SMALL]
    names = dict.fromkeys(["accuracy", *TESTED, *(test.metric for g in groups for test in g.tests)])
    gaps = {}
    for name in names:
        values = [g.evaluation[name] for g in used if not math.isnan(g.evaluation[name])]
        gaps[name] = max(values) - min(values) if len(values) > 1 else math.nan
    return gaps


def _estimate(values: Floats) -> Estimate:
    known = values[1:][~np.isnan(values[1:])]
    if math.isnan(values[0]) or not len(known):
        return Estimate(float(values[0]))
    low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))
