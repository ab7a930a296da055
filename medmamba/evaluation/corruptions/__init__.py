"""Robustness to the image corruptions of MedMNIST-C (arXiv:2406.17536)."""

from .kinds import KINDS, corrupt
from .published import PUBLISHED, published_for
from .result import CORRUPTIONS_NAME, Corruptions, load_corruptions
from .run import evaluate_corruptions

__all__ = [
    "CORRUPTIONS_NAME",
    "KINDS",
    "PUBLISHED",
    "Corruptions",
    "corrupt",
    "evaluate_corruptions",
    "load_corruptions",
    "published_for",
]
