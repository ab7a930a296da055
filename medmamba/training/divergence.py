"""Training that has diverged: how it is noticed, and what to do about it."""

from __future__ import annotations

import math

import torch
from torch import nn

from .checkpoint import CheckpointStore


class TrainingError(RuntimeError):
    """Raised when training cannot continue, such as when the loss is NaN."""


def check_weights(model: nn.Module, epoch: int, store: CheckpointStore) -> None:
    """Checks weights and statistics, since a loss reflects the weights before its step; `epoch` counts from 0.

    Raises:
        TrainingError: one is NaN or infinite.
    """
    tensors = [t.detach() for t in model.state_dict().values() if t.is_floating_point()]
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, math.inf)])
    if not bool(torch.isfinite(largest).all()):
        raise diverged(f"weights are NaN or infinite in epoch {epoch + 1}", store)


def diverged(what: str, store: CheckpointStore) -> TrainingError:
    """Returns the error for a run that has diverged; `what` says how it was noticed."""
    kept = f"the last good checkpoint is in {store.folder}" if store else "no checkpoint was saved yet"
    return TrainingError(
        f"{what}: training has diverged. Use a smaller lr, clip_grad=1, or precision='fp32'. Other settings need a "
        f"new run (another folder, or restart=True, --restart); {kept}"
    )
