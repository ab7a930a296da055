"""Detection: MedMamba as the backbone of torchvision's detectors."""

from .config import DetectorConfig
from .model import MedMambaDetector, create_detector
from .result import Box, Detection

__all__ = ["Box", "Detection", "DetectorConfig", "MedMambaDetector", "create_detector"]
