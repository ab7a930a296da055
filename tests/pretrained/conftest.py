"""Fixtures of the tests of model folders and the Hub."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return tiny_model.save_pretrained(tmp_path / "saved")
