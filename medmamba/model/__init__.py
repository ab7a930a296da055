"""The network and the classifier built on it; start reading at `network.py`."""

from .fused import FusedMedMamba
from .medmamba import MedMamba, create_model
from .network import (
    DIRECTIONS,
    MIN_SIZE,
    SS2D,
    ConvBranch,
    DropPath,
    MedMambaNetwork,
    PatchEmbed,
    PatchMerging,
    SSConvSSM,
    Stage,
)

__all__ = [
    "DIRECTIONS",
    "MIN_SIZE",
    "SS2D",
    "ConvBranch",
    "DropPath",
    "FusedMedMamba",
    "MedMamba",
    "MedMambaNetwork",
    "PatchEmbed",
    "PatchMerging",
    "SSConvSSM",
    "Stage",
    "create_model",
]
