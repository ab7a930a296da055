"""Fixtures of the training tests."""

import pytest

from medmamba.evaluation import results


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing the figures of a finished run takes as long as training the network of these tests.

    Runs of fixtures shared by a file draw them, and `tests/metrics/test_plots.py` checks them.
    """
    monkeypatch.setattr(results, "figures", lambda scored, title="": {})
