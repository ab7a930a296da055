"""CUDA kernels for the layers of a block around the scan, and the registry through which they replace them."""

from . import patches, training, training_conv, whole  # noqa: F401  register their kernels
from .registry import replaceable

__all__ = ["replaceable"]
