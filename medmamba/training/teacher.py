"""Distillation: a trained model whose probabilities are learnt beside the labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..imaging.preprocess import normalise
from ..model import MedMamba
from ..utils.names import shown
from .recipe import RecipeError

if TYPE_CHECKING:
    from ..segmentation import MedMambaSegmenter, SegmenterConfig

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


class MaskTeacher(nn.Module):
    """A segmentation model as a teacher: images (B, C, H, W) in [0, 1] to probabilities (B, K, H, W)."""

    def __init__(self, model: MedMambaSegmenter):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        prepared = normalise(images, self.model.config.preprocess).contiguous(memory_format=torch.channels_last)
        return self.model(prepared).float().sigmoid()


def load_mask_teacher(
    teacher: str | os.PathLike | MedMambaSegmenter, config: SegmenterConfig, device: torch.device
) -> nn.Module:
    """Returns a frozen segmentation model in eval mode on a device, as a `MaskTeacher`.

    Args:
        teacher: "org/name", folder, or model.
        config: of the student.

    Raises:
        RecipeError: the teacher has other classes or channels, or the classes are exclusive.
        PretrainedError: no such model.
    """
    from ..segmentation import MedMambaSegmenter

    found = teacher if isinstance(teacher, nn.Module) else MedMambaSegmenter.from_pretrained(teacher)
    theirs = found.config
    if config.exclusive or theirs.exclusive:
        raise RecipeError("a teacher of masks is for classes that may overlap; exclusive ones are not distilled")
    if (tuple(theirs.classes), theirs.in_chans) != (tuple(config.classes), config.in_chans):
        raise RecipeError(
            f"the teacher must have the student's classes in the same order: it has {shown(*theirs.classes)} "
            f"({theirs.in_chans} channels), the student {shown(*config.classes)} ({config.in_chans} channels)"
        )
    found = MaskTeacher(found)
    return found.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


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
