"""Fixtures for all tests."""

from pathlib import Path

import pytest
import segmentation_data
import torch

import medmamba

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images that do not travel with the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder ../shared beside the clone, with real images")
    return SHARED


@pytest.fixture(scope="session")
def timm():
    """timm, or a skip where it or its torchvision is missing."""
    return pytest.importorskip("timm", reason="needs timm and a torchvision built for this torch: make setup")


@pytest.fixture
def tiny_model() -> "medmamba.MedMamba":
    """A seeded model of the test variant: three classes, 32x32 pixels."""
    torch.manual_seed(0)
    return medmamba.create_model("test", num_classes=3).eval()


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of discs with train (24), val (6) and test (6); read only."""
    root = tmp_path_factory.mktemp("discs")
    for split, count, first in (("train", 24, 0), ("val", 6, 100), ("test", 6, 200)):
        segmentation_data.write_pairs(root / split, count, first)
    return root
