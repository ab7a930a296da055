"""Shared by segmentation and detection: encoders, tiles and pictures."""

from .encoder import encoder_config, load_weights, names_of, starting_encoder
from .pictures import COLOURS, shown
from .tiles import MIN_TILE, ramp, tiles

__all__ = [
    "COLOURS",
    "MIN_TILE",
    "encoder_config",
    "load_weights",
    "names_of",
    "ramp",
    "shown",
    "starting_encoder",
    "tiles",
]
