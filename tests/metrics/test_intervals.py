"""Bootstrap intervals, result files, and the memory that evaluations take."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
from metrics_cases import NAMES, example, several

from medmamba.metrics import PAPER_COLUMNS, Estimate, Evaluation, EvaluationError, evaluate, scores

sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


# ---- bootstrap ------------------------------------------------------------------------------------------------------


def test_interval_of_accuracy_is_that_of_the_stratified_binomial() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [300, 700])
    right = rng.random(1000) < np.where(labels == 0, 0.6, 0.9)
    p = np.eye(2)[np.where(right, labels, 1 - labels)]
    result = evaluate(labels, p, ["a", "b"], resamples=4000)
    rates = [right[labels == i].mean() for i in (0, 1)]
    spread = math.sqrt(sum(n * r * (1 - r) for n, r in zip((300, 700), rates, strict=True))) / 1000
    score = result.overall["accuracy"]
    assert score.value == pytest.approx(right.mean())
    assert score.low == pytest.approx(right.mean() - 1.96 * spread, abs=0.003)
    assert score.high == pytest.approx(right.mean() + 1.96 * spread, abs=0.003)
    per_class = result.per_class[0].scores["sensitivity"]
    assert per_class.high - per_class.low == pytest.approx(
        2 * 1.96 * math.sqrt(rates[0] * (1 - rates[0]) / 300), rel=0.1
    )


def test_a_proportion_of_one_has_an_interval_where_all_resamples_are_equal() -> None:
    labels = np.repeat([0, 1, 2], [6, 50, 20])
    result = evaluate(labels, np.eye(3)[labels] * 0.7 + 0.1, ["a", "b", "c"])
    assert result.overall["accuracy"] == Estimate(1.0, pytest.approx(1 / (1 + 1.96**2 / 76), abs=1e-4), 1.0)
    first = result.per_class[0].scores
    assert (first["sensitivity"].low, first["precision"].low) == pytest.approx((0.6097, 0.6097), abs=1e-4)
    assert (first["specificity"].low, first["npv"].low) == pytest.approx((70 / (70 + 1.96**2),) * 2, abs=1e-4)
    assert first["auroc"] == first["f1"] == Estimate(1.0, 1.0, 1.0)  # no proportions
    lows = [row.scores["sensitivity"].low for row in result.per_class]
    mean = 1 - math.sqrt(sum((1 - low) ** 2 for low in lows)) / 3
    for name in ("balanced_accuracy", "sensitivity", "precision"):
        assert result.overall[name].low == pytest.approx(mean), name
    assert min(row.scores["specificity"].low for row in result.per_class) < result.overall["specificity"].low < 1


def test_images_of_one_patient_are_one_trial() -> None:
    labels = np.repeat([0, 1], 30)
    p = np.eye(2)[labels] * 0.8 + 0.1
    result = evaluate(labels, p, ["a", "b"], patients=[f"p{i // 5}" for i in range(60)])
    assert result.overall["accuracy"].low == pytest.approx(12 / (12 + 1.96**2), abs=1e-4)
    wrong = evaluate(labels, 1 - p, ["a", "b"]).overall
    assert wrong["accuracy"].low == 0 and wrong["accuracy"].high == pytest.approx(1.96**2 / (60 + 1.96**2), abs=1e-4)
    assert wrong["balanced_accuracy"].high == pytest.approx(0.0803, abs=1e-3)
    many = evaluate(np.eye(2, dtype=int)[labels], p, ["a", "b"], task="multilabel")
    assert many.overall["subset_accuracy"].low == pytest.approx(60 / (60 + 1.96**2), abs=1e-4)
    assert many.per_class[0].scores["sensitivity"].low == pytest.approx(30 / (30 + 1.96**2), abs=1e-4)


@pytest.mark.slow
def test_interval_of_auroc_matches_resampling_by_hand() -> None:
    labels, p = example(4, n=200, k=2)
    score = evaluate(labels, p, ["a", "b"], resamples=1000, seed=1).overall["auroc"]
    rng = np.random.default_rng(2)
    strata = [np.flatnonzero(labels == i) for i in (0, 1)]
    draws = [np.concatenate([rng.choice(rows, len(rows)) for rows in strata]) for _ in range(1000)]
    by_hand = np.quantile([sk.roc_auc_score(labels[rows], p[rows, 1]) for rows in draws], (0.025, 0.975))
    assert (score.low, score.high) == pytest.approx(tuple(by_hand), abs=0.008)


def test_intervals_are_repeatable_and_hold_the_value() -> None:
    labels, p = example(5)
    first, again = (evaluate(labels, p, NAMES, seed=7) for _ in range(2))
    assert first == again != evaluate(labels, p, NAMES, seed=8)
    for name, score in first.overall.items():
        if name != "ece":  # biased upwards in resamples, which hold repeated images
            assert score.low < score.value < score.high, name
    wider = evaluate(labels, p, NAMES, level=0.99)
    assert wider.overall["auroc"].low < first.overall["auroc"].low
    assert math.isnan(evaluate(labels, p, NAMES, resamples=0).overall["auroc"].low)


def test_patients_are_drawn_whole() -> None:
    """Ten copies of every image under one patient: as images the interval would shrink by the root of ten."""
    labels, p = example(6, n=150, k=3)
    single = evaluate(labels, p, NAMES[:3], resamples=2000)
    many = {"labels": np.repeat(labels, 10), "probabilities": np.repeat(p, 10, axis=0), "classes": NAMES[:3]}
    by_patient = evaluate(**many, patients=[f"p{i // 10}" for i in range(1500)], resamples=2000)
    by_image = evaluate(**many, resamples=2000)

    def width(result: Evaluation) -> float:
        return result.overall["auroc"].high - result.overall["auroc"].low

    assert by_patient.n_patients == 150 and by_patient.resampled_by == "patient" and single.n_patients is None
    assert width(by_patient) == pytest.approx(width(single), rel=0.1)
    assert width(by_image) == pytest.approx(width(single) / math.sqrt(10), rel=0.15)
    alone = evaluate(labels, p, NAMES[:3], patients=[None] * 150, resamples=2000)
    assert alone.n_patients == 150 and alone.overall == single.overall


def test_a_resample_costs_far_less_than_an_evaluation() -> None:
    labels, p = example(8, n=3415, k=8)

    def seconds(resamples: int) -> float:
        start = time.process_time()
        evaluate(labels, p, [str(i) for i in range(8)], resamples=resamples)
        return time.process_time() - start

    single = min(seconds(1) for _ in range(5))
    # A tenth in measurements; the bound leaves room for other processors and versions of NumPy.
    assert seconds(1000) < 1000 * single / 2


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_result_survives_json(task: str, tmp_path: Path) -> None:
    labels, p = example(9) if task == "multiclass" else several(9)
    patients = [f"p{i // 2}" for i in range(len(labels))]
    result = evaluate(
        labels, p, NAMES, task=task, patients=patients, resamples=20, context={"model": "nano", "split": "test"}
    )
    result.to_json(tmp_path / "result.json")
    assert Evaluation.from_json(tmp_path / "result.json") == result == Evaluation.from_json(result.to_json())
    assert dataclasses.is_dataclass(result) and set(PAPER_COLUMNS) <= set(result.overall)


def test_markdown() -> None:
    labels, p = example(10, n=40, k=2)
    text = evaluate(labels, p, ["benign | other", "malignant"], resamples=30, seed=5).to_markdown()
    assert "40 images, 2 classes. In brackets: 95% bootstrap interval (30 resamples by image, stratified" in text
    assert "Wilson" not in text
    accuracy = (p.argmax(1) == labels).mean()
    assert f"| Accuracy | {accuracy:.3f} (" in text
    assert "| benign \\| other |" in text
    rows = sk.confusion_matrix(labels, p.argmax(1))
    assert f"| malignant | {rows[1, 0]} | {rows[1, 1]} |" in text
    all_right = evaluate([0, 1, 1], np.eye(2)[[0, 1, 1]], ["a", "b"], resamples=30, seed=5).to_markdown()
    assert "seed 5); of proportions of 0 and 1 Wilson's." in all_right


def test_an_interval_from_nothing_to_all_is_of_the_bootstrap() -> None:
    """The class is not predicted in some resamples, which have a precision of 0."""
    result = evaluate(*example(10, n=40, k=2), ["a", "b"], resamples=30)
    row = result.per_class[0]
    for found, wilson in ((Estimate(1.0, 0.0, 1.0), False), (Estimate(1.0, 0.6, 1.0), True)):
        changed = dataclasses.replace(row, scores=row.scores | {"precision": found})
        assert dataclasses.replace(result, per_class=(changed, *result.per_class[1:])).has_wilson == wilson


@pytest.mark.parametrize(
    ("labels", "p", "task", "message"),
    [
        ([0, 1], [[0.5, 0.5]], "multiclass", "needs probabilities"),
        ([0, 5], [[0.5, 0.5]] * 2, "multiclass", "labels must be 0 to 1"),
        ([0, 1], [[2.0, -1.0]] * 2, "multiclass", "look like logits"),
        ([0, 1], [[0.9, 0.9]] * 2, "multiclass", "sum to 1"),
        ([0, 1], [[np.nan, 0.5]] * 2, "multiclass", "finite"),
        ([0.5, 1], [[0.5, 0.5]] * 2, "multiclass", "integers"),
        ([0, 1], [[0.5, 0.5]] * 2, "multilabel", "needs probabilities"),
        ([0, 1], [[0.5, 0.5]] * 2, "regression", "task must be"),
        ([], np.zeros((0, 2)), "multiclass", "needs probabilities"),
    ],
)
def test_input_that_does_not_fit(labels: list, p: list, task: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(labels, p, ["a", "b"], task=task)


def test_two_classes_may_be_given_by_the_second_alone() -> None:
    labels, p = example(11, k=2)
    assert (
        evaluate(labels, p[:, 1], NAMES[:2], resamples=0).overall == evaluate(labels, p, NAMES[:2], resamples=0).overall
    )
    with pytest.raises(EvaluationError, match="3 patients for 600 images"):
        evaluate(labels, p, NAMES[:2], patients=["a"] * 3)


# --- memory, and sets where scores are not defined ---


def peak(function) -> int:
    """Returns the peak of additional memory of NumPy and Python in bytes."""
    import tracemalloc

    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("images", "classes", "task"), [(300, 600, "multiclass"), (3000, 120, "multilabel")])
def test_memory_does_not_grow_with_classes_times_resamples(images, classes, task):
    """Confusion matrices of all resamples would take 288 MB of the first; several tables of images by classes, at once,
    of the second 50 MB and more."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(classes), images)
    labels = rng.integers(0, classes, images) if task == "multiclass" else (rng.random(p.shape) < 0.1).astype(int)
    names = [str(i) for i in range(classes)]
    resamples = 100 if task == "multiclass" else 10
    assert peak(lambda: evaluate(labels, p, names, task=task, resamples=resamples)) < 30e6


def test_patients_by_classes_are_no_table():
    from medmamba.metrics.bootstrap import resampling_units

    n = 20_000
    labels = np.arange(n) % 5000
    assert peak(lambda: resampling_units(labels, None)) < 30e6  # the table would be 800 MB
    unit, stratum = resampling_units(np.array([2, 1, 1, 0, 0, 3]), ["a", "a", "a", "b", None, "b"])
    assert unit.tolist() == [0, 0, 0, 1, 2, 1] and stratum.tolist() == [1, 0, 0]  # of equals the lowest


def test_figures_of_a_thousand_classes_are_of_bounded_size():
    plots = pytest.importorskip("medmamba.metrics.plots")
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    classes = 300
    p = rng.dirichlet(np.ones(classes), 3000)
    labels = rng.integers(0, classes, 3000)
    found = evaluate(labels, p, [f"class {i}" for i in range(classes)], resamples=0)
    matrix = plots.confusion_matrix_figure(found)
    assert max(matrix.get_size_inches()) < 30 and not matrix.axes[0].texts
    curves = plots.roc_figure(labels, p, found.classes)
    assert all(len(line.get_xdata()) <= 2000 for line in curves.axes[0].lines)
    assert len(found.to_markdown()) < 100_000


@pytest.mark.parametrize("labels", [[1, 1, 1, 1], [0, 0, 2, 2], [2, 2, 2, 2]])
def test_absent_classes_are_left_out_and_json_stays_json(labels):
    p = np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3], [0.2, 0.2, 0.6]])
    found = evaluate(labels, p, ["a", "b", "c"], resamples=20)
    present = set(labels)
    for i, row in enumerate(found.per_class):
        assert np.isnan(row.scores["sensitivity"].value) == (i not in present)
        assert np.isnan(row.scores["auroc"].value) == (i not in present or len(present) == 1)
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([np.mean(p.argmax(1)[np.array(labels) == c] == c) for c in present])
    )
    assert "NaN" not in found.to_json() and found.notes


def test_scores_that_are_nan_are_refused():
    from medmamba.metrics.plots import roc_curve

    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        scores.rank(np.array([0.1, np.nan, 0.3]))
    with pytest.raises(ValueError, match="NaN"):
        roc_curve(np.array([True, False]), np.array([np.nan, 0.5]))
    with pytest.raises(EvaluationError, match="1 of 2 images have probabilities that are NaN"):
        evaluate([0, 1], [[0.5, 0.5], [np.nan, 0.5]], ["a", "b"])
