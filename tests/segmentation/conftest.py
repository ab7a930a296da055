"""Fixtures for tests of segmentation."""

import importlib.util

import pytest
import torch

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)


@pytest.fixture
def segmenter():
    """A seeded segmentation model of the test variant, 64 x 64 pixels, one class."""
    from medmamba.segmentation import create_segmenter

    torch.manual_seed(0)
    return create_segmenter("test", ("disc",), size=64).eval()
