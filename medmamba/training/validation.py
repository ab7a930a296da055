"""Scores by which an epoch is chosen, and the logits they come from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..imaging.preprocess import normalise
from ..inference.predict import NotFiniteError
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from ..utils.devices import autocast
from ..utils.modes import eval_view
from . import loss as objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..data import CachedDataset


def validate(model: MedMamba, data: CachedDataset, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
    """Scores that a best epoch can be chosen by, and the mean loss, over all processes.

    Raises:
        NotFiniteError: logits that are no numbers.
    """
    from ..metrics import evaluate

    logits = predict_logits(model, data, batch_size, accelerator)
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise NotFiniteError(f"logits of {bad} of {len(logits)} validation images are no longer numbers")
    task, labels = model.config.task, data.index.targets
    targets = objective.soft_targets(labels, model.config.num_classes, 0.0)
    probabilities = to_probabilities(logits.numpy(), task)
    found = evaluate(data.index.labels, probabilities, data.index.classes, task=task, resamples=0)
    scores = {name: found[name] for name in ("accuracy", "balanced_accuracy", "auroc", "f1")}
    return {"loss": float(objective.loss(logits, targets, task)), **scores}


@torch.no_grad()
def predict_logits(
    model: MedMamba,
    data: CachedDataset,
    batch_size: int,
    accelerator: Accelerator,
    full_precision: bool = False,
    progress: bool = False,
) -> Tensor:
    """Logits (N, K) float32 on the CPU, of all images in order; each process computes its share.

    Computed by a view of the model in eval mode: the model itself, and the modes of its modules, stay as they are.
    """
    view = eval_view(model)
    count, processes = len(data), accelerator.num_processes
    share = math.ceil(count / processes)
    mine = torch.arange(accelerator.process_index * share, (accelerator.process_index + 1) * share) % count
    mine = mine.to(data.images.device)
    found = []
    visible = progress and accelerator.process_index == 0
    for rows in tqdm(mine.split(batch_size), "predicting", unit="batch", disable=not visible):
        images = normalise(data.batch(rows, accelerator.device)[0], model.config.preprocess)
        with autocast(accelerator, enabled=not full_precision):
            found.append(view(images.contiguous(memory_format=torch.channels_last)).float())
    logits = torch.cat(found)
    return (logits if processes == 1 else accelerator.gather(logits))[:count].cpu()


def validation_batch(part: int, device: torch.device) -> int:
    """Images at once without gradients: as many as in training, more on a GPU, which small batches do not fill."""
    return max(part, 256 if device.type == "cuda" else 16)


def selection_score(scores: dict[str, float], metric: str) -> float:
    """Higher is better; what is undefined is worst."""
    value = -scores["loss"] if metric == "loss" else scores[metric]
    return -math.inf if np.isnan(value) else float(value)
