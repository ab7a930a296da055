"""Figures of a report: subgroups, corruptions, scores of unusual images, pictures of errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.corruptions import Corruptions
from ..metrics.group_result import Subgroups
from ..metrics.result import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSIDE = 4
"""The most decision curves whose legend has a place among them."""

_SHOWN = ("balanced_accuracy", "auroc", "ece")


def subgroup_figure(found: Subgroups, whole: Any) -> Figure:
    """Draws each group's metrics with their intervals beside the value of all images (dashed)."""
    rows: list[tuple[str, Any]] = []
    for column in found.columns:
        rows += [(f"{column}: {group.name} ({group.evaluation.n_images})", group) for group in found.of(column)]
    figure = _figure(7.2, 0.9 + 0.26 * len(rows))
    axes = figure.subplots(1, len(_SHOWN), sharey=True)
    for axis, metric in zip(axes, _SHOWN, strict=True):
        for y, (_, group) in enumerate(rows):
            e = group.evaluation.overall[metric]
            if math.isnan(e.value):
                continue
            colour = "0.6" if group.warnings else "#1f4e79"
            if not math.isnan(e.low):
                axis.plot([e.low, e.high], [y, y], color=colour, linewidth=1.6)
            axis.plot(e.value, y, "o", color=colour, markersize=4)
        axis.axvline(whole[metric], color="0.4", linestyle="--", linewidth=0.8)
        axis.set_title(TITLES[metric], fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    return figure


def corruption_figure(found: Corruptions) -> Figure:
    """Draws the balanced error of each kind at each severity as a table of colours, worst kind on top."""
    kinds = sorted(found.errors, key=lambda kind: -sum(found.errors[kind]))
    values = np.array([found.errors[kind] for kind in kinds])
    figure = _figure(6.4, 0.9 + 0.27 * len(kinds))
    axes = figure.subplots()
    highest = max(values.max(), found.clean.value, 0.05)
    picture = axes.imshow(values, cmap="OrRd", vmin=0, vmax=highest, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        colour = "white" if values[i, j] > 0.65 * highest else "black"
        axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=8)
    axes.set_xticks(range(values.shape[1]), [str(level) for level in range(1, values.shape[1] + 1)], fontsize=8)
    axes.set_xlabel(f"severity; without corruption the error is {found.clean.value:.2f}", fontsize=8)
    figure.colorbar(picture, ax=axes, label="balanced error")
    return figure


def score_figure(reference: np.ndarray | None, found: np.ndarray, threshold: float) -> Figure:
    """Draws the distributions of the out-of-distribution score, with the threshold."""
    figure = _figure(6.4, 2.4)
    axes = figure.subplots()
    parts = [found] if reference is None else [reference, found]
    edges = np.linspace(min(p.min() for p in parts), max(np.quantile(p, 0.995) for p in parts) + 1e-9, 40).tolist()
    if reference is not None:
        axes.hist(np.clip(reference, None, edges[-1]), edges, density=True, alpha=0.5, label="validation images")
    axes.hist(np.clip(found, None, edges[-1]), edges, density=True, alpha=0.5, label="these images")
    axes.axvline(threshold, color="black", linestyle="--", linewidth=0.9, label="threshold")
    axes.set(xlabel="distance to the training images", ylabel="density")
    axes.legend(fontsize=8)
    return figure


def risk_coverage_figure(selective: Mapping[str, Any]) -> Figure:
    """Draws the share of wrong answers against the share of images that get one, from `RiskCoverage.to_dict`."""
    figure = _figure(4.8, 2.6)
    axes = figure.subplots()
    axes.plot(selective["coverage"], selective["risk"], linewidth=1.4)
    axes.set(xlabel="share of images that get an answer", ylabel="of which wrong", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    return figure


def net_benefit_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws decision curves by class or group of classes, from `DecisionCurve.to_dict`."""
    figure = _figure(7.2 if len(curves) > INSIDE else 5.6, 3.0)
    axes = figure.subplots()
    top = 0.02
    for name, curve in curves.items():
        model = np.array([math.nan if v is None else v for v in curve["model"]])
        everybody = np.array([math.nan if v is None else v for v in curve["treat_all"]])
        (line,) = axes.plot(curve["thresholds"], model, linewidth=1.4, label=name)
        axes.plot(curve["thresholds"], everybody, linewidth=0.9, linestyle=":", color=line.get_color())
        top = max(top, float(np.nanmax(model)))
    axes.axhline(0, color="0.5", linewidth=0.9)
    axes.set(xlabel="threshold probability", ylabel="net benefit", xlim=(0, 1), ylim=(-0.3 * top, 1.15 * top))
    about: dict[str, Any] = {"title": "dotted: acting on everybody;\nline at 0: on nobody", "title_fontsize": 8}
    if len(curves) > INSIDE:
        about |= {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}
    axes.legend(fontsize=8, **about)
    return figure


def gallery(pictures: Sequence[tuple[np.ndarray, str]], columns: int = 4) -> Figure:
    """Draws images with a line or two of text above each."""
    rows = math.ceil(len(pictures) / columns)
    figure = _figure(7.2, 2.25 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, text) in zip(axes.flat, pictures, strict=False):
        axis.imshow(pixels[..., 0] if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_title(text, fontsize=6.5)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
