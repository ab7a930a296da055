"""The loss, and the labels as it wants them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_targets(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class indices (B,) or 0/1 labels (B, K) to probabilities (B, K), smoothed."""
    if targets.ndim == 2:
        return targets * (1 - smoothing) + smoothing / 2
    return F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes


def loss(logits: Tensor, targets: Tensor, task: str, weights: Tensor | None = None) -> Tensor:
    """Mean over the batch of cross entropy, or over labels too of binary cross entropy ("multilabel"); in float32.

    The mean is over images, not weights, so that it does not depend on which rare images share a batch.

    Args:
        targets: (B, K) probabilities.
        weights: (K,) of the classes; of the positive labels if multi-label.
    """
    logits = logits.float()
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    return F.cross_entropy(logits, targets, weight=weights)
