"""Reports on a run: progress bar, `history.csv`, `history.jsonl` and, optionally, TensorBoard and a live plot."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..utils.files import write_text
from .live_plot import LivePlot

HISTORY = "history.jsonl"
_SHOWN = ("loss", "accuracy", "dice", "map50")


class RunLog:
    """Writes the logs of the main process; other processes (`active=False`) are silent."""

    def __init__(
        self,
        folder: Path,
        progress: bool = True,
        tensorboard: bool = False,
        active: bool = True,
        plot: LivePlot | None = None,
    ):
        self.folder, self.progress, self.active = folder, progress and active, active
        self._plot = plot if active else None
        self._writer: Any = None
        self._tensorboard = tensorboard and active

    def bar(self, images: int, done: int) -> Bar:
        """Returns a progress bar over `images`, of which `done` are done."""
        return Bar(images, done, self.progress)

    def warn(self, text: str) -> None:
        """Issues a `UserWarning`, with or without progress bars."""
        if self.active:
            warnings.warn(text.removeprefix("warning: "), UserWarning, stacklevel=2)

    def note(self, text: str) -> None:
        """Prints a note on the data above any bar, to standard error, or where that looks like a failure, to output."""
        if self.active:
            stream = sys.stderr if self._plot is None else sys.stdout
            tqdm.write(text.encode("utf-8", "backslashreplace").decode(), file=stream)

    def resumed(self, history: list[dict[str, Any]]) -> None:
        """Rewrites the files with this history, dropping rows written after the checkpoint."""
        self._write_history(history)
        self._draw(history)

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Writes and draws the history after an epoch, its last row."""
        self._write_history(history)
        self._draw(history)
        if self._tensorboard:
            row = history[-1]
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=row["epoch"])
            for name, value in row.items():
                if name not in ("epoch", "best") and value is not None:
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Closes the TensorBoard writer."""
        if self._writer is not None:
            self._writer.close()

    def _draw(self, history: list[dict[str, Any]]) -> None:
        if self._plot is not None:
            self._plot.show(history)

    def _write_history(self, history: list[dict[str, Any]]) -> None:
        if not self.active or not history:
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
        for name, text in (("history.csv", table.getvalue()), (HISTORY, lines)):
            write_text(self.folder / name, text)


class Bar:
    """A tqdm bar over all images of the run, with epoch, loss and the latest validation metrics."""

    def __init__(self, images: int, done: int, visible: bool):
        self._tqdm = tqdm(
            total=images,
            initial=done,
            unit="img",
            unit_scale=True,
            disable=not visible,
            smoothing=0.05,
            dynamic_ncols=True,
        )
        self._shown = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()

    @property
    def due(self) -> bool:
        """Returns whether the loss should be shown again, at most once a second: reading it synchronises the device."""
        return time.monotonic() - self._shown > 1.0

    def update(self, images: int) -> None:
        """Advances the bar."""
        self._tqdm.update(images)

    def show(self, epoch: int, loss: float, history: list[dict[str, Any]]) -> None:
        """Shows the epoch, counted from 0, its loss and the last row of the history."""
        self._shown = time.monotonic()
        text = f"epoch {epoch + 1} loss {loss:.4f}"
        if history:
            row = history[-1]
            found = {name: row[f"val_{name}"] for name in _SHOWN if f"val_{name}" in row}
            text += " | val " + " ".join(f"{k} {math.nan if v is None else v:.4f}" for k, v in found.items())
        self._tqdm.set_postfix_str(text, refresh=False)
