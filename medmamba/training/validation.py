"""Scores a model on the validation split, to select the best epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..evaluation import predict_logits
from ..inference.predict import NotFiniteError
from ..metrics import evaluate
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from . import loss
from .recipe import SELECTABLE

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data import CachedDataset


def validate(model: MedMamba, data: CachedDataset, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
    """Returns the metrics that can select an epoch, and the mean loss, over the images of all processes.

    Raises:
        NotFiniteError: logits that are NaN or infinite.
    """
    logits = predict_logits(model, data, batch_size, accelerator)
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise NotFiniteError(f"the logits of {bad} of {len(logits)} validation images are NaN or infinite")
    task, labels = model.config.task, data.index.targets
    targets = loss.soft_targets(labels, model.config.num_classes, 0.0)
    probabilities = to_probabilities(logits.numpy(), task)
    found = evaluate(data.index.labels, probabilities, data.index.classes, task=task, resamples=0)
    scores = {name: found[name] for name in SELECTABLE if name in found.overall}
    return {"loss": float(loss.classification_loss(logits, targets, task)), **scores}


def validation_batch(part: int, device: torch.device) -> int:
    """Returns a batch size for inference: at least that of training, and larger on a GPU, to keep it busy."""
    return max(part, 256 if device.type == "cuda" else 16)


def selection_score(scores: dict[str, float], metric: str) -> float:
    """Returns a score for which higher is better; undefined metrics give minus infinity."""
    value = -scores["loss"] if metric == "loss" else scores[metric]
    return -math.inf if np.isnan(value) else float(value)
