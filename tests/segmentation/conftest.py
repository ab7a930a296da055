"""Fixtures for tests of segmentation."""

import pytest
import torch

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra segment: make setup")


@pytest.fixture
def segmenter():
    """A seeded segmentation model of the test variant, 64 x 64 pixels, one class."""
    from medmamba.segmentation import create_segmenter

    torch.manual_seed(0)
    return create_segmenter("test", ("disc",), size=64).eval()
