"""Losses of the three tasks, and their soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_targets(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Returns smoothed probabilities (B, K) from class indices (B,) or 0/1 labels (B, K)."""
    if targets.ndim == 2:
        return targets * (1 - smoothing) + smoothing / 2
    return F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes


def classification_loss(logits: Tensor, targets: Tensor, task: str, weights: Tensor | None = None) -> Tensor:
    """Returns the mean loss over images in float32.

    One class per image: cross entropy. Several labels: binary cross entropy, averaged over labels. Grades: cross
    entropy plus the squared earth mover's distance between the distributions over grades, sum_k (P_k - T_k)^2 of the
    cumulative probabilities (Hou et al. 2016, arXiv:1611.05916), so that a distant grade costs more than the next.

    The mean is over images, not class weights, so it does not depend on which rare classes share a batch.

    Args:
        logits: (B, K).
        targets: (B, K) probabilities.
        task: "multiclass", "multilabel" or "ordinal".
        weights: (K,) class weights; for multi-label tasks, weights of the positive labels.
    """
    logits = logits.float()
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    entropy = F.cross_entropy(logits, targets, weight=weights)
    if task != "ordinal":
        return entropy
    distance = (logits.softmax(1).cumsum(1) - targets.cumsum(1)).square().sum(1)  # (B,)
    return entropy + (distance if weights is None else distance * (targets @ weights)).mean()
