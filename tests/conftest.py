"""Fixtures for all tests."""

import importlib.util
from pathlib import Path

import pytest
import torch

import medmamba

_VISION = torch.library.Library("torchvision", "FRAGMENT")  # see `timm`; lives as long as the process
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images that do not travel with the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the folder ../shared beside the clone, with real images")
    return SHARED


@pytest.fixture(scope="session")
def timm():
    """timm, also where torchvision was compiled for a PyTorch with CUDA and PyTorch was not."""
    found = importlib.util.find_spec("torchvision")
    if found is None or importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm and torchvision: pip install 'medmamba[dev]'")
    version = (Path(found.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    if "+cu" in version and torch.version.cuda is None:
        # Its operators cannot be loaded, and it refuses to be imported without these two, which timm never calls.
        for name in ("nms", "qnms"):
            _VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


@pytest.fixture
def tiny_model() -> "medmamba.MedMamba":
    """A seeded model of the test variant: three classes, 32x32 pixels."""
    torch.manual_seed(0)
    return medmamba.create_model("test", num_classes=3).eval()
