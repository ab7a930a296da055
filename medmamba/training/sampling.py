"""Order and weights of the training images, as functions of the seed and the position in the run alone.

No random state is carried from step to step, so a run resumed at any step continues as if it had never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .recipe import RecipeError

# Independent streams of random numbers.
_ORDER, _AUGMENT, _NETWORK = range(3)


@dataclass(frozen=True)
class Batches:
    """Division of an epoch into `steps` optimiser steps of `size` images, each in parts of `part` images.

    Part p of a step belongs to process p // accumulate, so two processes take the same parts as one process that
    accumulates twice. Images that do not fill a step are left out; each epoch has another order.
    """

    steps: int
    size: int
    part: int
    accumulate: int

    @classmethod
    def plan(cls, images: int, batch_size: int, processes: int, accumulate: int) -> Batches:
        """Divides an epoch of `images` images.

        Raises:
            RecipeError: the batch cannot be divided, or a part has fewer than 2 images, too few for batch norm.
        """
        parts = processes * accumulate
        size = min(batch_size, images // parts * parts)
        if batch_size % parts:
            raise RecipeError(
                f"batch_size {batch_size} cannot be divided among {processes} processes with {accumulate} parts each"
            )
        if size // parts < 2:
            raise RecipeError(
                f"{images} training images in batches of {batch_size}, divided by {parts}, leave fewer than 2 images "
                "per part, too few for batch norm; use a larger batch, fewer processes or less accumulation"
            )
        return cls(images // size, size, size // parts, accumulate)

    def rows(self, step: int, process: int, turn: int) -> tuple[slice, slice]:
        """Returns the rows of the epoch's order, and of the step, that `process` takes in accumulation turn `turn`."""
        start = (process * self.accumulate + turn) * self.part
        return (
            slice(step * self.size + start, step * self.size + start + self.part),
            slice(start, start + self.part),
        )


def epoch_order(labels: np.ndarray, balance: str, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the training images in this epoch, drawn with replacement if `balance` is "sampling"."""
    rng = np.random.default_rng((seed, _ORDER, epoch))
    if balance != "sampling":
        return rng.permutation(len(labels))
    weights = 1 / np.bincount(labels)[labels]
    return rng.choice(len(labels), len(labels), p=weights / weights.sum())


def augment_rng(seed: int, epoch: int, step: int) -> np.random.Generator:
    """Returns the generator for the augmentation of a step."""
    return np.random.default_rng((seed, _AUGMENT, epoch, step))


def seed_network(seed: int, epoch: int, step: int, part: int, device: torch.device) -> None:
    """Seeds dropout and stochastic depth of a network on a device, as `torch.manual_seed` would.

    That seeds the generators of all kinds of devices there may be, and takes down where it was called from for each
    kind that is not in use: a millisecond a step, and a list that grows.
    """
    number = int(np.random.SeedSequence((seed, _NETWORK, epoch, step, part)).generate_state(1, np.uint64)[0] >> 1)
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(number)
        return
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)


def class_weights(labels: np.ndarray, classes: int, power: float = 1.0) -> Tensor:
    """Returns class weights (K,), inverse to the class counts to a `power` and 1 on average over the images.

    For multi-label data, (N, K) of 0 and 1: images without the label over images with it, clipped to [0.01, 100], to
    the `power`.
    """
    if labels.ndim == 2:
        positive = labels.sum(0)
        weights = np.clip((len(labels) - positive) / np.maximum(positive, 1), 0.01, 100) ** power
    else:
        counts = np.bincount(labels, minlength=classes)
        weights = np.maximum(counts, 1) ** -power
        weights *= len(labels) / (counts * weights).sum()
    return torch.tensor(weights, dtype=torch.float32)
