"""Fixtures for tests of segmentation."""

import importlib.util

import pytest
import torch

# Importing it takes seconds, which every process would spend while it collects.
MISSING = importlib.util.find_spec("segmentation_models_pytorch") is None


class Skipped(pytest.Module):
    """A test file that is not imported."""

    def collect(self):
        pytest.skip("needs the extra segment: make setup")


def pytest_pycollect_makemodule(module_path, parent):
    """Skips each file; to skip here, at module level, ends pytest where it is given this folder as an argument."""
    return Skipped.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture
def segmenter():
    """A seeded segmentation model of the test variant, 64 x 64 pixels, one class."""
    from medmamba.segmentation import create_segmenter

    torch.manual_seed(0)
    return create_segmenter("test", ("disc",), size=64).eval()
