"""The curves that a run draws in a notebook."""

import io

import numpy as np
import pytest
from PIL import Image
from training_cases import COMMON, QUICK

from medmamba.training import live_plot, train

pytest.importorskip("IPython", reason='needs pip install "medmamba[notebooks]"')


class Handle:
    def __init__(self, drawn):
        self.drawn = drawn

    def update(self, picture):
        self.drawn.append(picture.data)


@pytest.fixture
def drawn(monkeypatch):
    """The pictures in the output of a cell, in the order in which they replace each other."""
    found: list[bytes] = []

    def display(picture, display_id):
        assert display_id and not found, "one output, updated"
        found.append(picture.data)
        return Handle(found)

    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": 1})())
    monkeypatch.setattr("IPython.display.display", display)
    return found


def test_a_run_draws_after_each_epoch_and_a_repeated_call_draws_the_finished_run(folder, tmp_path, drawn, monkeypatch):
    seen = []
    draw = live_plot.curves
    monkeypatch.setattr(
        live_plot, "curves", lambda rows, *rest: (seen.append((len(rows), *rest)), draw(rows, *rest))[1]
    )
    options = {**QUICK, **COMMON, "live_plot": True, "select": ["balanced_accuracy", "loss"], "epochs": 2}
    result = train(folder, tmp_path, "default", "test", **options)
    assert seen == [(n, 2, "balanced_accuracy") for n in (1, 2)] and len(set(drawn)) == 2
    assert max(Image.open(io.BytesIO(drawn[-1])).size) <= 800
    last = drawn[-1]
    drawn.clear()
    again = train(folder, tmp_path, "default", "test", **options)
    assert again.history == result.history and drawn == [last]


def test_it_draws_what_the_history_says():
    rows = [
        {"epoch": n, "loss": 1 / n, "val_loss": None if n == 2 else 2 / n, "val_auroc": n / 4, "best": n < 3}
        for n in (1, 2, 3)
    ]
    whole = np.asarray(Image.open(io.BytesIO(live_plot.curves(rows, 4, "auroc"))).convert("RGB")).astype(int)
    other = [{**row, "best": row["epoch"] == 3} for row in rows]
    moved = np.asarray(Image.open(io.BytesIO(live_plot.curves(other, 4, "auroc"))).convert("RGB")).astype(int)
    half = whole.shape[1] // 2
    assert (whole[:, :half] == moved[:, :half]).all() and (whole[:, half:] != moved[:, half:]).any(), "the ring moves"
    assert live_plot.curves([], 4, "auroc")[:4] == b"\x89PNG"


def test_outside_a_notebook_it_says_so_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match=r"live_plot=True draws in the cell of a Jupyter.*history\.csv"):
        train(folder, tmp_path / "new", "default", "test", **QUICK, **COMMON, live_plot=True)
    assert not (tmp_path / "new").exists()
