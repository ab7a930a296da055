"""Segmentation: MedMamba as the encoder of a decoder from segmentation_models_pytorch (extra `segment`)."""

from .config import SegmenterConfig
from .encoder import register
from .model import MedMambaSegmenter, create_segmenter
from .result import Region, Segmentation

__all__ = ["MedMambaSegmenter", "Region", "Segmentation", "SegmenterConfig", "create_segmenter", "register"]
