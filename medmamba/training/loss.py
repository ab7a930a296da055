"""Classification loss and its soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_targets(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Returns smoothed probabilities (B, K) from class indices (B,) or 0/1 labels (B, K)."""
    if targets.ndim == 2:
        return targets * (1 - smoothing) + smoothing / 2
    return F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes


def classification_loss(logits: Tensor, targets: Tensor, task: str, weights: Tensor | None = None) -> Tensor:
    """Returns the mean cross entropy, or the binary cross entropy averaged over images and labels, in float32.

    The mean is over images, not class weights, so it does not depend on which rare classes share a batch.

    Args:
        logits: (B, K).
        targets: (B, K) probabilities.
        task: "multiclass" or "multilabel".
        weights: (K,) class weights; for multi-label tasks, weights of the positive labels.
    """
    logits = logits.float()
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    return F.cross_entropy(logits, targets, weight=weights)
