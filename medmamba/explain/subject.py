"""What an attribution method works on: one image, one logit, and a view of the model that it may hook and change."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..inference.predict import NotFiniteError, why_not_finite
from ..model import MedMamba, SSConvSSM, Stage
from ..utils import modes
from ..utils.names import AmbiguousNameError, find_name
from .scores import Score

Progress = Callable[[float], object]
"""Called with the fraction done, 0 to 1, never decreasing. Return False (or raise) to stop."""


class ExplainCancelled(RuntimeError):
    """The progress callback returned False."""


class Subject:
    """Maps images (B, C, H, W) to the logit of one class (B,), for the explanation of one image `x` (1, C, H, W).

    Attributes:
        target: class index. If None, the first evaluation must be of `x` and sets it to the predicted class.
        logits: (num_classes,) of `x`, on the CPU; None before the first evaluation.
        batch_size: largest batch a method may evaluate, which bounds its memory.
        planned: total number of evaluations expected, for the progress callback; a method sets it before it begins.
        seed: for random numbers that do not come from PyTorch.
        evaluations: number of images evaluated so far.
    """

    def __init__(
        self,
        model: MedMamba,
        x: Tensor,
        target: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ):
        self.model = model
        self.x = x.to(model.patch_embed.proj.weight.device)
        self.target = target
        self.logits: Tensor | None = None
        self.batch_size = batch_size
        self.planned = 1
        self.evaluations = 0
        self.seed = 0
        self._progress, self._reported = progress, 0.0

    @property
    def config(self) -> MedMambaConfig:
        return self.model.config

    def __call__(self, batch: Tensor) -> Tensor:
        self.report(self.evaluations / max(self.planned, 1))
        self.evaluations += len(batch)
        logits = self.model(batch)
        if self.logits is None:
            self.logits = logits[0].detach().cpu()
            if not self.logits.isfinite().all():
                raise NotFiniteError(why_not_finite(self.model, self.logits))
            if self.target is None:
                self.target = int(self.logits.argmax())
        return logits[:, self.target]

    @torch.no_grad()
    def measure(self) -> None:
        """Evaluates `x`, which sets `logits` and, if it was None, `target`."""
        self(self.x)

    def report(self, fraction: float) -> None:
        """Passes the fraction done to the progress callback.

        Raises:
            ExplainCancelled: the callback returned False.
        """
        self._reported = max(self._reported, min(fraction, 1.0))
        if self._progress is not None and self._progress(self._reported) is False:
            raise ExplainCancelled("the explanation was cancelled by its progress callback")

    def span(self, begin: float, end: float) -> Progress:
        """Returns a progress callback for a part of the work, from `begin` to `end` of the whole."""
        return lambda fraction: self.report(begin + fraction * (end - begin))


def sub_progress(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """Returns a progress callback for a part of the work, from `begin` to `end` of the whole; None for None."""
    return None if progress is None else lambda fraction: progress(begin + fraction * (end - begin))


def frozen_view(model: nn.Module) -> MedMamba:
    """Returns a float32 copy of the modules in eval mode that shares its weights with the original.

    Hooks, gradients and modes set on it do not reach the original, even when a method is interrupted. Weights of
    another dtype are converted, so not shared.

    Args:
        model: a `MedMamba` or a `Score`, possibly wrapped in `torch.compile` or `DataParallel`.

    Raises:
        ValueError: neither of these, or it has no classifier.
    """
    inner = modes.unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, MedMamba | Score):
        raise ValueError(
            f"explanations need a MedMamba, got {type(inner).__name__}; for a mask or a box, pass mask_score(model, "
            "image) or box_score(model, image) of medmamba.explain"
        )
    if not inner.config.num_classes:
        raise ValueError(
            "this model has no classifier to explain: give it one with model.reset_classifier(num_classes)"
        )
    view = modes.frozen_view(inner, torch.float32)
    view.set_grad_checkpointing(False)  # it would run each hooked block twice
    return view  # type: ignore[return-value]


def default_batch_size(device: torch.device) -> int:
    """Returns the default batch size: 8, or on an NVIDIA GPU one per 512 MiB of its memory, 8 to 128."""
    if device.type != "cuda":
        return 8
    # Gradients of the largest variant at 224 pixels take about 0.4 GiB per image.
    return min(max(torch.cuda.get_device_properties(device).total_memory // 2**29, 8), 128)


def blocks(model: MedMamba, stage: int) -> list[SSConvSSM]:
    """Returns the blocks of a stage, numbered from 1.

    Raises:
        ValueError: no such stage.
    """
    if not 1 <= stage <= len(model.stages):
        raise ValueError(f"no stage {stage}; this model has stages 1 to {len(model.stages)}")
    return list(cast(Stage, model.stages[stage - 1]).blocks)  # type: ignore[arg-type]


def resolve_target(target: int | str | None, config: MedMambaConfig) -> int | None:
    """Returns the class index for an index, a label or a number as text; None for None.

    Labels match exactly, else regardless of case and separators if that is unambiguous.

    Raises:
        ValueError: no such class.
    """
    if target is None:
        return None
    labels = config.labels
    if isinstance(target, str):
        try:
            found = find_name(target, labels)
        except AmbiguousNameError as error:
            raise ValueError(f"no class is called {target!r} exactly: {error}") from error
        if found is not None:
            return found
        if not target.strip().isdecimal():
            raise ValueError(f"no class is called {target!r}; the classes are {_listed(labels)}")
        target = int(target)
    if isinstance(target, bool) or not hasattr(target, "__index__"):
        raise ValueError(f"target must be a class index or label, got {target!r}; the classes are {_listed(labels)}")
    index = target.__index__()
    if not 0 <= index < len(labels):
        raise ValueError(f"target {index} is out of range; the classes are {_listed(labels)}")
    return index


def _listed(labels: list[str]) -> str:
    shown = ", ".join(f"{i} {label!r}" for i, label in enumerate(labels[:30]))
    return shown + (f" and {len(labels) - 30} more" if len(labels) > 30 else "")
