"""The network, and the classifier around it: read `network.py` first."""

from .medmamba import MedMamba, create_model
from .network import (
    DIRECTIONS,
    MIN_SIZE,
    SS2D,
    ConvBranch,
    DropPath,
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
    "MedMamba",
    "PatchEmbed",
    "PatchMerging",
    "SSConvSSM",
    "Stage",
    "create_model",
]
