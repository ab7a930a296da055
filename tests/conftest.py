"""Fixtures for all tests."""

from pathlib import Path

import pytest
import torch

import medmamba

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden vectors and real images that do not travel with the project."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("needs the folder ../shared beside the clone, with golden vectors and data")
    return SHARED


@pytest.fixture
def tiny_model() -> "medmamba.MedMamba":
    """A seeded model of the test variant: three classes, 32x32 pixels."""
    torch.manual_seed(0)
    return medmamba.create_model("test", num_classes=3).eval()
