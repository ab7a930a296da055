"""Metrics by subgroup."""

import json

import numpy as np
import pytest

from medmamba.metrics import EvaluationError, evaluate
from medmamba.metrics.group_result import MISSING
from medmamba.metrics.subgroups import evaluate_subgroups

CLASSES = ("a", "b", "c")


def predictions(n=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    z = rng.normal(size=(n, 3))
    z[np.arange(n), labels] += 1.5
    p = np.exp(z)
    return labels, p / p.sum(axis=1, keepdims=True), rng


def test_a_group_has_the_metrics_of_its_images():
    labels, p, rng = predictions()
    sex = rng.choice(["F", "M", ""], 300, p=[0.45, 0.45, 0.1])
    found = evaluate_subgroups(labels, p, CLASSES, {"sex": list(sex)}, permutations=50, resamples=50)
    assert [group.name for group in found.groups] == ["F", "M", MISSING]
    group = found.groups[1]
    expected = evaluate(labels[sex == "M"], p[sex == "M"], CLASSES, resamples=50)
    assert group.evaluation.overall == expected.overall
    others = evaluate(labels[sex != "M"], p[sex != "M"], CLASSES, resamples=0)
    test = next(test for test in group.tests if test.metric == "auroc")
    assert test.others == pytest.approx(others["auroc"])
    assert test.difference.value == pytest.approx(expected["auroc"] - others["auroc"])
    assert test.difference.low <= test.difference.value <= test.difference.high
    values = [found.groups[i].evaluation["auroc"] for i in (0, 1)]
    assert found.gaps["sex"]["auroc"] == pytest.approx(abs(values[0] - values[1]))
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_worse_group_is_found_and_an_equal_one_is_not():
    labels, p, rng = predictions(600)
    site = rng.choice(["north", "south", "west"], 600)
    bad = site == "west"
    p[bad] = 0.8 * rng.dirichlet(np.ones(3), bad.sum()) + 0.2 * p[bad]
    found = evaluate_subgroups(
        labels, p, CLASSES, {"site": list(site), "coin": list(rng.choice(["heads", "tails"], 600))}, resamples=0
    )
    assert ("west", "balanced_accuracy") in [(group.name, test.metric) for group, test in found.findings]
    assert all(group.column == "site" for group, _ in found.findings)
    assert "west" in found.summary() and "Holm" in found.summary()


def test_small_groups_and_rare_classes_are_pointed_out():
    labels, p, _ = predictions()
    group = ["few"] * 12 + ["many"] * 288
    found = evaluate_subgroups(labels, p, CLASSES, {"site": group}, permutations=0, resamples=0)
    assert "only 12 images" in found.groups[0].warnings
    assert any("fewer than 10 images of a" in text for text in found.groups[0].warnings)
    assert np.isnan(found.gaps["site"]["accuracy"])  # a gap to twelve images says nothing
    assert "few *" in found.to_markdown()


def test_enough_permutations_are_drawn_for_the_correction():
    """A group in which the model is wrong stays significant among fifty tests."""
    labels, p, rng = predictions(120)
    columns = {f"column {i}": list(rng.choice(["x", "y"], 120)) for i in range(9)}
    p[:30] = p[:30][:, [1, 2, 0]]
    columns["site"] = ["west"] * 30 + ["east"] * 87 + ["tiny"] * 3
    found = evaluate_subgroups(labels, p, CLASSES, columns, tested=("balanced_accuracy",), resamples=0)
    assert found.n_tests == 20 and found.permutations == 1680
    assert {group.name for group, _ in found.findings} == {"west", "east"}
    assert "only 3 images, not tested" in found.of("site")[1].warnings


def test_a_patient_in_two_groups_is_said():
    labels, p, _ = predictions(40)
    patients = [f"p{i // 2}" for i in range(40)]
    arm = ["left", "right"] * 20
    found = evaluate_subgroups(labels, p, CLASSES, {"arm": arm}, patients=patients, permutations=5, resamples=5)
    assert any("20 patients have images in several groups" in note for note in found.notes)


def test_one_group_alone_is_not_tested():
    labels, p, _ = predictions(40)
    found = evaluate_subgroups(labels, p, CLASSES, {"site": ["x"] * 40}, permutations=5, resamples=0)
    assert not found.n_tests and found.summary() == "No tests were made."
    assert any("nothing to compare" in note for note in found.notes)


def test_several_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (80, 3))
    p = np.clip(0.5 * labels + 0.5 * rng.random((80, 3)), 0, 1)
    sex = list(rng.choice(["F", "M"], 80))
    found = evaluate_subgroups(labels, p, CLASSES, {"sex": sex}, task="multilabel", permutations=20, resamples=20)
    assert found.n_tests == 6


def test_what_does_not_fit_is_refused():
    labels, p, _ = predictions(20)
    with pytest.raises(EvaluationError, match="19 values for 20 images"):
        evaluate_subgroups(labels, p, CLASSES, {"sex": ["F"] * 19})
    with pytest.raises(EvaluationError, match="unknown metrics kappa"):
        evaluate_subgroups(labels, p, CLASSES, {"sex": ["F"] * 20}, tested=("kappa",))


@pytest.mark.slow
def test_groups_and_gaps_agree_with_fairlearn():
    fairlearn = pytest.importorskip("fairlearn.metrics")
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    labels, p, rng = predictions(500)
    age = rng.choice(["below 40", "40 to below 60", "60 and above"], 500)
    frame = fairlearn.MetricFrame(
        metrics={"accuracy": accuracy_score, "balanced_accuracy": balanced_accuracy_score},
        y_true=labels,
        y_pred=p.argmax(axis=1),
        sensitive_features=age,
    )
    found = evaluate_subgroups(labels, p, CLASSES, {"age": list(age)}, permutations=0, resamples=0)
    assert [group.name for group in found.groups] == ["below 40", "40 to below 60", "60 and above"]
    for metric in ("accuracy", "balanced_accuracy"):
        for group in found.groups:
            assert group.evaluation[metric] == pytest.approx(frame.by_group[metric][group.name])
        assert found.gaps["age"][metric] == pytest.approx(frame.difference()[metric])
