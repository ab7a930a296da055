"""Draws the curves of a run in a notebook while it trains."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.extras import require

WIDTH, HEIGHT, DPI = 8.0, 3.0, 96  # 768 pixels, which fit the column of a notebook


class LivePlot:
    """A figure in the output of a notebook cell, drawn again after each epoch.

    Args:
        epochs: of the whole run, the end of the horizontal axis.
        metric: score on val by which the best epoch is chosen, such as "balanced_accuracy".

    Raises:
        ImportError: IPython or matplotlib is missing.
        ValueError: this is not a notebook.
    """

    def __init__(self, epochs: int, metric: str):
        shell = require("IPython", "live_plot=True", "notebooks").get_ipython()
        require("matplotlib", "live_plot=True")
        if shell is None or not hasattr(shell, "kernel"):
            raise ValueError(
                "live_plot=True draws in the cell of a Jupyter or Colab notebook, and this is none; leave it out, and "
                "see history.csv, progress=True or tensorboard=True"
            )
        self.epochs, self.metric = epochs, metric
        self._shown: Any = None

    def show(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Draws a history, one row per epoch, in place of what was drawn before."""
        from IPython.display import Image, display

        picture = Image(data=curves(history, self.epochs, self.metric), format="png")
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)


def curves(history: Sequence[Mapping[str, Any]], epochs: int, metric: str) -> bytes:
    """Returns a PNG of the losses and of the score on val by epoch; a ring marks the epoch that is kept so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    number = [row["epoch"] for row in history]
    kept = [row for row in history if row["best"]][-1:]
    for name, key in (("train", "loss"), ("val", "val_loss")):
        if history and key in history[0]:
            left.plot(number, [row[key] for row in history], marker="o", markersize=4, label=name)
    key = f"val_{metric}"
    right.plot(number, [row.get(key) for row in history], marker="o", markersize=4, color="#b4571a")
    for row in kept:
        right.plot(row["epoch"], row.get(key), "o", markersize=12, fillstyle="none", color="black", label="kept")
        right.legend(frameon=False)
    left.set(ylabel="loss")
    right.set(ylabel=f"{metric.replace('_', ' ')} on val")
    for axes in (left, right):
        axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    if left.lines:
        left.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
