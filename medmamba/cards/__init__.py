"""Model cards, written from the files of a model folder."""

from .card import write_card

__all__ = ["write_card"]
