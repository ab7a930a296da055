"""Plots of an evaluation."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmamba.metrics import evaluate, plots

pytest.importorskip("matplotlib", reason="needs matplotlib")
sk = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")

NAMES = ["benign", "malignant", "a name that is much too long for the margin of a figure"]


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(200, 3)) + 2 * np.eye(3)[labels]
    e = np.exp(logits)
    return labels, e / e.sum(1, keepdims=True)


def test_confusion_matrix(predictions: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    labels, p = predictions
    figure = plots.confusion_matrix_figure(evaluate(labels, p, NAMES, resamples=0), title="test")
    axes = figure.axes[0]
    shown = [int(text.get_text()) for text in axes.texts]
    assert shown == sk.confusion_matrix(labels, p.argmax(1)).ravel().tolist()
    assert axes.get_xlabel() == "predicted" and axes.get_title() == "test"
    assert axes.get_yticklabels()[2].get_text().endswith("…")
    figure.savefig(tmp_path / "matrix.png")
    assert Image.open(tmp_path / "matrix.png").size[0] > 200


def test_confusion_matrix_of_several_labels_is_refused() -> None:
    result = evaluate([[0, 1], [1, 0]], [[0.2, 0.8], [0.7, 0.1]], ["a", "b"], task="multilabel", resamples=0)
    with pytest.raises(ValueError, match="no single confusion matrix"):
        plots.confusion_matrix_figure(result)


def test_roc_curve_and_its_area(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = predictions
    rounded = p[:, 1].round(1)  # ties
    x, y = plots.roc_curve(labels == 1, rounded)
    fpr, tpr, _ = sk.roc_curve(labels == 1, rounded, drop_intermediate=False)
    np.testing.assert_allclose(x, fpr)
    np.testing.assert_allclose(y, tpr)
    figure = plots.roc_figure(labels, p, NAMES)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(legend) == 3
    for i, text in enumerate(legend):
        assert text.endswith(f"({sk.roc_auc_score(labels == i, p[:, i]):.3f})")


def test_roc_of_two_classes_and_of_a_missing_one(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = predictions
    two = plots.roc_figure(np.array([0, 1, 1, 0]), [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], ["a", "b"])
    assert [text.get_text() for text in two.axes[0].get_legend().get_texts()] == ["b (0.750)"]
    missing = plots.roc_figure(np.minimum(labels, 1), p, NAMES)
    assert len(missing.axes[0].get_legend().get_texts()) == 2


def test_reliability_diagram(predictions: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    labels, p = predictions
    figure = plots.reliability_figure(labels, {"raw": p, "calibrated": p**0.5 / (p**0.5).sum(1, keepdims=True)})
    upper, lower = figure.axes
    ece = evaluate(labels, p, NAMES, resamples=0)["ece"]
    assert upper.get_legend().get_texts()[0].get_text() == f"raw, ECE {ece:.3f}"
    assert len(upper.lines) == 3 and lower.get_xlabel() == "predicted probability"
    several = np.eye(3, dtype=int)[labels]
    assert plots.reliability_figure(several, {"raw": p}).axes[0].get_ylabel() == "observed frequency"
    figure.savefig(tmp_path / "reliability.svg")


def test_no_global_state(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = predictions
    before = "matplotlib.pyplot" in sys.modules
    plots.roc_figure(labels, p, NAMES)
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_grades_have_a_confusion_matrix():
    result = evaluate([0, 1, 2], np.eye(3), ["none", "mild", "severe"], task="ordinal", resamples=0)
    assert plots.confusion_matrix_figure(result).axes
