"""Progress of a training run: position, history and best epoch so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .recipe import Recipe


@dataclass
class Progress:
    """Position of a run. Counts from 0; `step` is within the epoch."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # of the steps of this epoch
    seconds: float = 0.0  # of the steps of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per epoch
    best: dict[str, Any] | None = None  # {"epoch": ..., "score": [...]}

    def finished(self, recipe: Recipe) -> bool:
        """Returns whether all epochs are done or patience has run out."""
        return self.epoch >= recipe.epochs or self.out_of_patience(recipe)

    def out_of_patience(self, recipe: Recipe) -> bool:
        """Returns whether the last `recipe.patience` epochs brought no improvement."""
        return bool(recipe.patience and self.best and self.epoch - 1 - self.best["epoch"] >= recipe.patience)
