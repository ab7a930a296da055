"""Fixtures of the training tests."""

from pathlib import Path

import pytest
from training_cases import COMMON, QUICK, make_folder

from medmamba.evaluation import results
from medmamba.training import (
    train,
)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing the figures of a finished run takes as long as training the network of these tests.

    Runs of fixtures shared by a file draw them, and `tests/metrics/test_plots.py` checks them.
    """
    monkeypatch.setattr(results, "figures", lambda scored, title="": {})


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """An uninterrupted run, and what it was called with."""
    out = tmp_path_factory.mktemp("finished")
    return train(folder, out, "default", "test", **QUICK, **COMMON)
