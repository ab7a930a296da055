"""Scores and thresholds against scikit-learn and MedMNIST's evaluator, and by hand."""

import json
import math
import warnings

import numpy as np
import pytest
from metrics_cases import NAMES, K, example, several, softmax

from medmamba.metrics import Evaluation, EvaluationError, evaluate, scores
from medmamba.metrics.thresholds import best_f1_thresholds

sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


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
