"""Plots of an evaluation as matplotlib figures: confusion matrix, ROC curves, reliability diagram.

No global state: nothing is shown and no backend is selected. Save with `figure.savefig("roc.png", dpi=150)`. Needs
`pip install "medmamba[train]"` (matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .result import Evaluation
from .scores import bin_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_LENGTH = 28
_MAX_LEGEND = 14
_MAX_CELLS = 40
_MAX_POINTS = 2000  # of a curve, above the resolution of a figure
_BLOCK = 2**22  # elements in memory at once


def confusion_matrix_figure(evaluation: Evaluation, *, title: str = "") -> Figure:
    """Draws counts as text and fractions of the true class as colour; above 40 classes only colour.

    Raises:
        ValueError: a multi-label evaluation, which has one 2x2 table per label instead.
    """
    if evaluation.task == "multilabel":
        raise ValueError("a multi-label evaluation has no single confusion matrix; see evaluation.confusion")
    counts = np.array(evaluation.confusion)  # (K, K)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    k = len(counts)
    side = 2.8 + 0.55 * min(max(k, 3), _MAX_CELLS)
    figure, axes = _figure(side + 0.6, side)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, ax=axes, label="fraction of the true class", fraction=0.046, pad=0.04)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if k > _MAX_CELLS:  # names and counts would be illegible
        return figure
    names = [_short(name) for name in evaluation.classes]
    axes.set_xticks(range(k), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(k), names)
    for i, j in np.ndindex(k, k):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def roc_figure(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], *, title: str = "") -> Figure:
    """Draws the ROC curve of each class against the rest; for two classes only that of the second.

    Args:
        labels: `(N,)` integers or `(N, K)` of 0 and 1.
        probabilities: `(N, K)`.
        classes: K names.
        title: of the figure.
    """
    truth, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    shown = [1] if truth.ndim == 1 and p.shape[1] == 2 else range(p.shape[1])
    figure, axes = _figure(5.2, 5)
    for column in shown:
        positive = truth[:, column].astype(bool) if truth.ndim == 2 else truth == column
        false_rate, true_rate = roc_curve(positive, p[:, column])
        if np.isnan(false_rate).any() or np.isnan(true_rate).any():
            continue  # no positives or no negatives
        area = float(np.sum(np.diff(false_rate) * (true_rate[1:] + true_rate[:-1]) / 2))
        if len(false_rate) > _MAX_POINTS:
            kept = np.linspace(0, len(false_rate) - 1, _MAX_POINTS).round().astype(int)
            false_rate, true_rate = false_rate[kept], true_rate[kept]
        axes.plot(false_rate, true_rate, label=f"{_short(classes[column])} ({area:.3f})", linewidth=1.4)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=title, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_aspect("equal")
    if axes.lines and len(axes.lines) - 1 <= _MAX_LEGEND:
        axes.legend(loc="lower right", fontsize=8, title="class (AUROC)", title_fontsize=8)
    return figure


def reliability_figure(
    labels: ArrayLike, probabilities: Mapping[str, ArrayLike], *, bins: int = 15, title: str = ""
) -> Figure:
    """Draws a reliability diagram: accuracy against confidence, above a histogram of confidence.

    Args:
        labels: `(N,)` integers or `(N, K)` of 0 and 1.
        probabilities: `(N, K)` for each curve by its name, such as {"raw": p, "calibrated": q}.
        bins: bins of equal width, as for the ECE.
        title: of the figure.
    """
    truth = np.asarray(labels)
    figure, axes = _figure(5.2, 6)
    axes.remove()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    edges = np.linspace(0, 1, bins + 1)
    for name, values in probabilities.items():
        count, said, happened = _bin_sums(truth, np.asarray(values), bins)
        used = count > 0
        said, happened = said[used] / count[used], happened[used] / count[used]
        ece = float(np.abs(said - happened) @ count[used] / count.sum())
        upper.plot(said, happened, marker="o", markersize=4, linewidth=1.4, label=f"{name}, ECE {ece:.3f}")
        lower.stairs(count, edges, fill=True, alpha=0.4)
    upper.set(ylabel="observed frequency" if truth.ndim == 2 else "accuracy", title=title, ylim=(-0.02, 1.02))
    upper.legend(loc="best", fontsize=8)
    lower.set(xlabel="predicted probability", ylabel="count", xlim=(0, 1))
    return figure


def roc_curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns false and true positive rates at every distinct threshold, from (0, 0) to (1, 1); NaN where undefined.

    Equal to `sklearn.metrics.roc_curve(drop_intermediate=False)`, whose import takes longer than drawing the figures.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, which have no ROC curve")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # last of each run of equal scores
    hits = np.concatenate([[0], np.cumsum(positive[order])[last]])
    misses = np.concatenate([[0], np.cumsum(~positive[order])[last]])
    with np.errstate(invalid="ignore"):
        return misses / misses[-1], hits / hits[-1]


def _bin_sums(truth: np.ndarray, p: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, per confidence bin, the number of predictions, the sum of their confidence, and how many are correct."""
    sums = np.zeros((3, bins))
    step = max(1, _BLOCK // p.shape[1])
    for start in range(0, len(p), step):
        part, labels = p[start : start + step].astype(np.float64), truth[start : start + step]
        if truth.ndim == 2:
            confidence, right = part.ravel(), labels.ravel().astype(float)
        else:
            confidence, right = part.max(axis=1), (part.argmax(axis=1) == labels).astype(float)
        place = bin_index(confidence, bins)
        sums += [np.bincount(place, weights, bins) for weights in (np.ones(len(place)), confidence, right)]
    return sums[0].astype(np.int64), sums[1], sums[2]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError('plots need matplotlib: pip install "medmamba[train]"') from exc
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…"
