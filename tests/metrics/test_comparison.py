"""Two models on the same images, against scipy, statsmodels and scikit-learn."""

import numpy as np
import pytest

from medmamba.metrics.comparison import agreement, compare_predictions, mcnemar
from medmamba.metrics.evaluate import EvaluationError


@pytest.mark.parametrize("pair", [(0, 0), (0, 1), (3, 0), (5, 5), (2, 9), (40, 71), (900, 1000)])
def test_mcnemar_against_the_binomial_distribution(pair):
    stats = pytest.importorskip("scipy.stats")
    p, mid = mcnemar(*pair)
    n, fewer = sum(pair), min(pair)
    expected = stats.binomtest(fewer, n, 0.5).pvalue if n else 1.0
    assert p == pytest.approx(expected, rel=1e-9) and mcnemar(*pair[::-1]) == (p, mid)
    mass = stats.binom.pmf(fewer, n, 0.5) if n else 0.0
    tail = 2 * stats.binom.cdf(fewer, n, 0.5) - mass if pair[0] != pair[1] else 1 - mass
    assert mid == pytest.approx(min(tail, 1.0), rel=1e-9)


@pytest.mark.slow
def test_mcnemar_against_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for first, second in ((3, 0), (5, 5), (2, 9), (40, 71)):
        found = tables.mcnemar([[10, first], [second, 7]], exact=True)
        assert mcnemar(first, second)[0] == pytest.approx(found.pvalue, rel=1e-9)


def test_the_difference_and_its_interval():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    first = np.where(rng.random(400) < 0.7, labels, (labels + 1) % 3)
    second = np.where(rng.random(400) < 0.85, labels, (labels + 2) % 3)
    found = compare_predictions(labels, first, second)
    a, b = (first == labels), (second == labels)
    assert (found.both, found.first_only, found.second_only, found.neither) == (
        (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum(),
    )  # fmt: skip
    assert found.difference.value == pytest.approx(b.mean() - a.mean())
    # The interval of a difference of paired proportions in large samples.
    gain = b.astype(float) - a
    half = 1.96 * gain.std() / np.sqrt(400)
    assert found.difference.low == pytest.approx(gain.mean() - half, abs=0.012)
    assert found.difference.high == pytest.approx(gain.mean() + half, abs=0.012)
    assert found.p < 1e-4 and "p below 0.0001" in found.text()
    patients = [f"p{i // 4}" for i in range(400)]
    by_patient = compare_predictions(np.repeat(labels[::4], 4), np.repeat(first[::4], 4), np.repeat(second[::4], 4),
                                     patients=patients)  # fmt: skip
    width = by_patient.difference.high - by_patient.difference.low
    assert width > 1.6 * 2 * half, "four copies of an image are worth one"


def test_one_image_of_each_class_does_not_make_an_interval_of_no_width():
    labels = np.arange(8)
    found = compare_predictions(labels, labels, np.zeros(8, int))
    assert found.difference.low < found.difference.value == -7 / 8 < found.difference.high


def test_the_same_answers_and_several_labels():
    labels = np.array([0, 1, 1])
    same = compare_predictions(labels, labels, labels)
    assert same.p == 1 and same.difference.value == 0 and "equally good" in same.text()
    several = compare_predictions([[1, 0], [1, 1]], [[1, 0], [1, 0]], [[1, 0], [1, 1]], resamples=0)
    assert several.second_only == 1 and np.isnan(several.difference.low)
    with pytest.raises(EvaluationError, match="do not match"):
        compare_predictions([0, 1], [0], [1])


def test_agreement():
    a, b = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0])
    same, kappa = agreement(a, b)
    assert same == pytest.approx(4 / 6)
    assert kappa == pytest.approx((4 / 6 - 1 / 3) / (1 - 1 / 3))  # classes by chance: 2*2 + 2*3 + 2*1 of 36
    assert agreement(a, a) == (1.0, 1.0) and np.isnan(agreement([1, 1], [1, 1])[1])
    with pytest.raises(EvaluationError):
        agreement([], [])


@pytest.mark.slow
def test_kappa_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert agreement(a, b)[1] == pytest.approx(metrics.cohen_kappa_score(a, b))
