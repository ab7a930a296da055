"""Scores against scikit-learn and MedMNIST's evaluator, bootstrap intervals, result files."""

import dataclasses
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from medmamba.metrics import PAPER_COLUMNS, Evaluation, EvaluationError, evaluate, scores
from medmamba.metrics.thresholds import best_f1_thresholds

sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")

K = 5
NAMES = [f"class {i}" for i in range(K)]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def example(seed: int = 0, n: int = 600, k: int = K, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns imbalanced labels and probabilities that are mostly correct."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.3
    return labels, softmax(np.round(logits) if ties else logits)


def several(seed: int = 0, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, K)) < (0.6, 0.3, 0.2, 0.1, 0.05)).astype(int)
    return labels, 1 / (1 + np.exp(-(rng.normal(size=(n, K)) * 1.5 + 2 * labels - 1)))


# ---- scikit-learn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_multiclass_scores_are_those_of_scikit_learn(k: int, ties: bool) -> None:
    labels, p = example(1, k=k, ties=ties)
    result = evaluate(labels, p, NAMES[:k], resamples=0)
    said = p.argmax(1)
    onehot = np.eye(k, dtype=int)[labels]
    matrix = sk.confusion_matrix(labels, said)
    tables = sk.multilabel_confusion_matrix(labels, said)
    expected = {
        "accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "precision": sk.precision_score(labels, said, average="macro"),
        "sensitivity": sk.recall_score(labels, said, average="macro"),
        "specificity": np.mean([tn / (tn + fp) for (tn, fp), _ in tables]),
        "f1": sk.f1_score(labels, said, average="macro"),
        "auroc": sk.roc_auc_score(onehot, p, average="macro"),
        "auprc": sk.average_precision_score(onehot, p, average="macro"),
        "brier": sk.brier_score_loss(labels, p),
        "nll": sk.log_loss(labels, p),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-12), name
    assert np.array_equal(result.confusion, matrix)
    for i, row in enumerate(result.per_class):
        assert row.support == (labels == i).sum()
        assert row.scores["auroc"].value == pytest.approx(sk.roc_auc_score(labels == i, p[:, i]), abs=1e-12)
        assert row.scores["auprc"].value == pytest.approx(sk.average_precision_score(labels == i, p[:, i]), abs=1e-12)
        tn, fp, fn, tp = tables[i].ravel()
        assert row.scores["sensitivity"].value == pytest.approx(tp / (tp + fn))
        assert row.scores["specificity"].value == pytest.approx(tn / (tn + fp))
        assert row.scores["precision"].value == pytest.approx(tp / (tp + fp))
        assert row.scores["npv"].value == pytest.approx(tn / (tn + fn))


def test_multilabel_scores_are_those_of_scikit_learn() -> None:
    labels, p = several()
    result = evaluate(labels, p, NAMES, task="multilabel", resamples=0)
    said = (p > 0.5).astype(int)
    expected = {
        "accuracy": (labels == said).mean(),
        "subset_accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(labels[:, i], said[:, i]) for i in range(K)]),
        "precision": sk.precision_score(labels, said, average="macro"),
        "sensitivity": sk.recall_score(labels, said, average="macro"),
        "f1": sk.f1_score(labels, said, average="macro"),
        "auroc": sk.roc_auc_score(labels, p, average="macro"),
        "auprc": sk.average_precision_score(labels, p, average="macro"),
        "brier": np.mean([sk.brier_score_loss(labels[:, i], p[:, i]) for i in range(K)]),
        "nll": np.mean([sk.log_loss(labels[:, i], p[:, i]) for i in range(K)]),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-12), name
    assert np.array_equal(result.confusion, sk.multilabel_confusion_matrix(labels, said))
    stricter = evaluate(labels, p, NAMES, task="multilabel", threshold=0.8, resamples=0)
    assert stricter["specificity"] > result["specificity"] and stricter["auroc"] == result["auroc"]


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    labels = np.array([0, 0, 1, 2])
    p = np.array([[0.6, 0.4, 0.0], [0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.4, 0.5, 0.1]])
    result = evaluate(labels, p, NAMES[:3], resamples=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert result["precision"] == pytest.approx(sk.precision_score(labels, p.argmax(1), average="macro"))
    assert result["f1"] == pytest.approx(sk.f1_score(labels, p.argmax(1), average="macro"))
    assert result.per_class[2].scores["precision"].value == 0


# ---- MedMNIST's evaluator (Yang et al. 2023), written down from its published definition ----------------------------


def medmnist_auc(labels: np.ndarray, scores: np.ndarray, task: str) -> float:
    """Binary: AUC of the last column. Else the mean over columns of the AUC of column against label."""
    if task == "binary-class":
        return sk.roc_auc_score(labels, scores[:, -1])
    columns = labels if task == "multi-label, binary-class" else np.eye(scores.shape[1])[labels]
    return float(np.mean([sk.roc_auc_score(columns[:, i], scores[:, i]) for i in range(scores.shape[1])]))


def medmnist_acc(labels: np.ndarray, scores: np.ndarray, task: str) -> float:
    """Binary: last column above 0.5. Multi-label: mean over labels at 0.5. Else the largest column."""
    if task == "multi-label, binary-class":
        return float(np.mean([sk.accuracy_score(labels[:, i], scores[:, i] > 0.5) for i in range(scores.shape[1])]))
    said = scores[:, -1] > 0.5 if task == "binary-class" else scores.argmax(-1)
    return sk.accuracy_score(labels, said)


@pytest.mark.parametrize("task", ["multi-class", "binary-class", "ordinal-regression", "multi-label, binary-class"])
@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_the_medmnist_evaluator(task: str, seed: int) -> None:
    many = task.startswith("multi-label")
    k = 2 if task == "binary-class" else K
    labels, p = several(seed) if many else example(seed, k=k, ties=True)
    if task == "binary-class":
        p[:9] = 0.5  # the two rules agree on ties: the first class
    result = evaluate(labels, p, NAMES[:k], task="multilabel" if many else "multiclass", resamples=0)
    assert result["auroc"] == pytest.approx(medmnist_auc(labels, p, task), abs=1e-12)
    assert result["accuracy"] == pytest.approx(medmnist_acc(labels, p, task), abs=1e-12)


# ---- calibration error ----------------------------------------------------------------------------------------------


def test_ece_by_hand() -> None:
    """Two bins of ten: (0.6, 0.7] holds 3 images, 2 right; (0.9, 1] holds 2, both right."""
    first = np.array([0.62, 0.66, 0.70, 0.95, 1.0])
    p = np.stack([first, 1 - first], 1)
    labels = np.array([0, 0, 1, 0, 0])
    expected = (3 * abs(2 / 3 - (0.62 + 0.66 + 0.70) / 3) + 2 * abs(1 - 0.975)) / 5
    assert evaluate(labels, p, ["a", "b"], resamples=0, ece_bins=10)["ece"] == pytest.approx(expected)


def test_ece_of_a_calibrated_model_is_small_and_of_a_boaster_large() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 20000)
    labels = (p.cumsum(1) > rng.random((20000, 1))).argmax(1)
    assert evaluate(labels, p, NAMES[:4], resamples=0)["ece"] < 0.01
    boast = softmax(np.log(p) * 5)
    assert evaluate(labels, boast, NAMES[:4], resamples=0)["ece"] > 0.15
    truth = (rng.random((20000, 4)) < p).astype(int)
    assert evaluate(truth, p, NAMES[:4], task="multilabel", resamples=0)["ece"] < 0.01


# ---- classes that are missing ---------------------------------------------------------------------------------------


def test_a_class_without_images_is_left_out_and_said() -> None:
    labels, p = example(2)
    keep = labels != 0
    result = evaluate(labels[keep], p[keep], NAMES, resamples=50)
    present = range(1, K)
    said = p[keep].argmax(1)
    for name, score in (("precision", sk.precision_score), ("sensitivity", sk.recall_score), ("f1", sk.f1_score)):
        assert result[name] == pytest.approx(score(labels[keep], said, labels=list(present), average="macro")), name
    assert result["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(labels[keep] == i, p[keep, i]) for i in present]))
    specificity = [((said != i) & (labels[keep] != i)).sum() / (labels[keep] != i).sum() for i in present]
    assert result["specificity"] == pytest.approx(np.mean(specificity))
    missing = result.per_class[0].scores
    assert (
        math.isnan(missing["sensitivity"].value) and math.isnan(missing["auroc"].value) and str(missing["f1"]) == "n/a"
    )
    assert missing["specificity"].value == pytest.approx((said != 0).mean())
    assert result.notes == ("No images of class 0: left out of macro averages.",)
    assert not any(math.isnan(score.low) for score in result.overall.values())


def test_a_single_class_does_not_crash() -> None:
    _, p = example(3, n=20)
    result = evaluate(np.full(20, 2), p, NAMES, resamples=20)
    assert math.isnan(result["auroc"]) and 0 <= result["accuracy"] <= 1
    assert any("Every image shows class 2" in note for note in result.notes)
    assert json.loads(result.to_json())["overall"]["auroc"]["value"] is None
    assert "| AUROC, macro average | n/a |" in result.to_markdown()
    nothing = evaluate(np.zeros((20, K)), p, NAMES, task="multilabel", resamples=20)
    assert math.isnan(nothing["auroc"]) and nothing.per_class[0].scores["specificity"].value > 0.5
    assert evaluate([1], [[0.2, 0.8]], ["a", "b"])["accuracy"] == 1


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


def test_a_thousand_resamples_of_a_large_test_set_take_seconds() -> None:
    labels, p = example(8, n=3415, k=8)
    start = time.process_time()
    evaluate(labels, p, [str(i) for i in range(8)], resamples=1000)
    assert time.process_time() - start < 10  # processor time: about 2 s, also on a busy machine


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
    accuracy = (p.argmax(1) == labels).mean()
    assert f"| Accuracy | {accuracy:.3f} (" in text
    assert "| benign \\| other |" in text
    rows = sk.confusion_matrix(labels, p.argmax(1))
    assert f"| malignant | {rows[1, 0]} | {rows[1, 1]} |" in text


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
    from medmamba.metrics import scores
    from medmamba.metrics.plots import roc_curve

    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        scores.rank(np.array([0.1, np.nan, 0.3]))
    with pytest.raises(ValueError, match="NaN"):
        roc_curve(np.array([True, False]), np.array([np.nan, 0.5]))
    with pytest.raises(EvaluationError, match="1 of 2 images have probabilities that are NaN"):
        evaluate([0, 1], [[0.5, 0.5], [np.nan, 0.5]], ["a", "b"])


# ---- grades, and thresholds of labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_quadratic_kappa_is_that_of_scikit_learn(seed: int) -> None:
    labels, p = example(seed)
    result = evaluate(labels, p, NAMES, task="ordinal", resamples=50)
    assert result["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(labels, p.argmax(1), weights="quadratic"))
    assert result["mae"] == pytest.approx(sk.mean_absolute_error(labels, p.argmax(1)))
    assert result.overall["quadratic_kappa"].low < result["quadratic_kappa"] < result.overall["quadratic_kappa"].high
    assert result["accuracy"] == evaluate(labels, p, NAMES, resamples=0)["accuracy"]
    assert Evaluation.from_json(result.to_json()) == result
    weights = np.random.default_rng(seed).integers(0, 3, (3, len(labels))).astype(float)
    found = scores.ordinal(labels, p.argmax(1), weights)["quadratic_kappa"]
    for row, value in zip(weights.astype(int), found, strict=True):
        drawn = np.repeat(labels, row), np.repeat(p.argmax(1), row)
        assert value == pytest.approx(sk.cohen_kappa_score(*drawn, weights="quadratic"))


def test_quadratic_kappa_of_one_grade_is_undefined() -> None:
    p = np.eye(3)[[1, 1, 1]]
    assert np.isnan(evaluate([1, 1, 1], p, "abc", task="ordinal", resamples=0)["quadratic_kappa"])


def test_thresholds_reach_the_best_f1_that_scikit_learn_finds() -> None:
    labels, p = several(3)
    p = p.round(2)  # with ties
    limits = best_f1_thresholds(labels, p)
    result = evaluate(labels, p, NAMES, task="multilabel", threshold=limits, resamples=0)
    for i in range(K):
        precision, recall, _ = sk.precision_recall_curve(labels[:, i], p[:, i])
        best = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert sk.f1_score(labels[:, i], p[:, i] > limits[i]) == pytest.approx(best)
        assert result.per_class[i].scores["f1"].value == pytest.approx(best)
        assert limits[i] not in p[:, i]
    assert result.threshold == tuple(limits) and Evaluation.from_json(result.to_json()) == result
    assert result["accuracy_at_half"] == pytest.approx((labels == (p > 0.5)).mean())
    assert f"| {NAMES[0]} | {labels[:, 0].sum()} | {limits[0]:.3g} |" in result.to_markdown()


def test_a_label_without_positives_keeps_the_threshold_of_a_half() -> None:
    limits = best_f1_thresholds([[0, 1, 1], [0, 1, 0]], [[0.9, 0.1, 0.3], [0.2, 0.3, 0.1]])
    assert limits.tolist() == [0.5, 0.5, pytest.approx(0.2)]
    with pytest.raises(ValueError, match=r"must be \(N, K\)"):
        best_f1_thresholds([0, 1], [0.1, 0.9])


@pytest.mark.parametrize("threshold", [1.5, (0.5, 0.5), np.nan])
def test_thresholds_that_do_not_fit_are_refused(threshold) -> None:
    labels, p = several()
    with pytest.raises(EvaluationError, match="threshold must be a probability"):
        evaluate(labels, p, NAMES, task="multilabel", threshold=threshold, resamples=0)
