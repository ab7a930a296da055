"""Distillation: a trained model whose probabilities are learnt beside the labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..imaging.preprocess import normalise
from ..model import MedMamba
from ..utils.names import shown
from .recipe import RecipeError

# Images (B, C, H, W) in [0, 1], augmented and mixed as the student sees them, to probabilities (B, K).
Teacher = Callable[[Tensor], Tensor]


class MedMambaTeacher(nn.Module):
    """A MedMamba as a teacher: images (B, C, H, W) in [0, 1] to probabilities (B, K)."""

    def __init__(self, model: MedMamba):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        config = self.model.config
        logits = self.model(normalise(images, config.preprocess).contiguous(memory_format=torch.channels_last)).float()
        return logits.sigmoid() if config.task == "multilabel" else logits.softmax(-1)


def load_teacher(teacher: str | os.PathLike | nn.Module, config: MedMambaConfig, device: torch.device) -> nn.Module:
    """Returns a frozen teacher in eval mode on a device.

    Args:
        teacher: bundled name, "org/name", folder, `MedMamba`, or another module with the interface of
            `MedMambaTeacher`.
        config: of the student; a MedMamba must have its task, classes and channels.

    Raises:
        RecipeError: the teacher has other classes, channels or another task.
        PretrainedError: no such model.
    """
    found = teacher if isinstance(teacher, nn.Module) else MedMamba.from_pretrained(teacher)
    if isinstance(found, MedMamba):
        theirs = found.config
        if (theirs.labels, theirs.task, theirs.in_chans) != (config.labels, config.task, config.in_chans):
            raise RecipeError(
                f"the teacher must have the student's classes in the same order: it has {shown(*theirs.labels)} "
                f"({theirs.task}, {theirs.in_chans} channels), the student {shown(*config.labels)} ({config.task}, "
                f"{config.in_chans} channels)"
            )
        found = MedMambaTeacher(found)
    return found.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def weights_digest(module: nn.Module) -> str:
    """Returns a digest of all weights and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
