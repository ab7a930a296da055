"""Corrections for many tests: known values, a peer, and error rates by simulation."""

import numpy as np
import pytest

from medmamba.metrics.multiplicity import benjamini_hochberg, holm, permutation_p
from medmamba.metrics.subgroups import permuted_groups

DRAWS, ALPHA = 10_000, 0.05
SLACK = 3 * np.sqrt(ALPHA * (1 - ALPHA) / DRAWS)  # three standard errors of a rate of 5 %


def test_holm_of_a_worked_example():
    # Times 4, 3, 2, 1 in ascending order, then never decreasing.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_undefined_p_values_are_no_tests():
    found = holm([0.02, np.nan, 0.03])
    assert found == pytest.approx([0.04, np.nan, 0.04], nan_ok=True)
    assert benjamini_hochberg([0.02, np.nan, 0.03]) == pytest.approx([0.03, np.nan, 0.03], nan_ok=True)


def test_the_false_discovery_rate_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    p = np.random.default_rng(0).random((50, 13)) ** 2
    expected = np.stack([stats.false_discovery_control(row) for row in p])
    np.testing.assert_allclose(benjamini_hochberg(p), expected, rtol=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_holm_controls_the_family_wise_error(correlation):
    """Twelve tests, four with an effect: one of the eight others is significant in at most 5 % of the draws."""
    from statistics import NormalDist

    rng = np.random.default_rng(1)
    shared = rng.normal(size=(DRAWS, 1))
    z = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.normal(size=(DRAWS, 12))
    z[:, :4] += 4
    grid = np.linspace(-10, 10, 40001)
    p = 2 * np.interp(-np.abs(z), grid, [NormalDist().cdf(x) for x in grid])
    false = (holm(p)[:, 4:] <= ALPHA).any(axis=1).mean()
    assert false <= ALPHA + SLACK
    assert (p[:, 4:] <= ALPHA).any(axis=1).mean() > 0.15  # without the correction
    assert (holm(p)[:, :4] <= ALPHA).mean() > 0.7  # the real effects are found
    share = (benjamini_hochberg(p)[:, 4:] <= ALPHA).sum(axis=1) / np.maximum(
        (benjamini_hochberg(p) <= ALPHA).sum(axis=1), 1
    )
    assert share.mean() <= ALPHA + SLACK


@pytest.mark.parametrize("effect", [0.0, 0.35])
def test_the_tests_of_groups_hold_their_level(effect):
    """Accuracy in three groups of 90 images over 10,000 draws: no false finding beyond 5 %, and real ones are found."""
    rng = np.random.default_rng(2)
    strata = np.repeat([0, 1], [60, 30])  # two classes, in which the model is right with 0.8 and 0.6
    group = rng.permutation(np.repeat([0, 1, 2], 30))
    members = group == np.arange(3)[:, None]  # (3, 90)
    chance = np.where(strata == 0, 0.8, 0.6) - effect * (group == 2)
    right = (rng.random((DRAWS, 90)) < chance).astype(np.float32)
    drawn = np.stack(list(permuted_groups(members, np.arange(90), strata, 199, seed=3))).astype(
        np.float32
    )  # (P, 3, 90)
    null = (drawn.reshape(-1, 90) @ right.T).reshape(199, 3, DRAWS)
    observed = members.astype(np.float32) @ right.T  # (3, DRAWS)
    p = permutation_p(observed, null).T  # (DRAWS, 3)
    found = holm(p) <= ALPHA
    if effect:
        assert found[:, 2].mean() > 0.6
    else:
        assert found.any(axis=1).mean() <= ALPHA + SLACK
        assert (p <= ALPHA).any(axis=1).mean() > ALPHA + SLACK  # what the correction is for


def test_permuted_groups_keep_their_classes_and_patients():
    strata = np.array([0, 0, 0, 1, 1, 1])  # of six patients
    unit_of = np.array([0, 0, 1, 2, 3, 4, 5, 5])
    members = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    members = np.stack([members, ~members])
    for drawn in permuted_groups(members, unit_of, strata, 20, seed=0):
        assert drawn.sum(axis=0).tolist() == [1] * 8
        assert drawn[0][0] == drawn[0][1] and drawn[0][6] == drawn[0][7]  # images of a patient stay together
        of_unit = drawn[0][[0, 2, 3, 4, 5, 6]]
        assert (of_unit[:3].sum(), of_unit[3:].sum()) == (2, 1)
