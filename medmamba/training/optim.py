"""Optimisers, parameter groups, learning rate schedule and averaged weights."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..model import MedMamba
from .recipe import Recipe

ENCODERS = (
    r"^net\.(encoder|backbone)\.net\."  # where a `MedMambaSegmenter` and a `MedMambaDetector` have their networks
)


def parameter_groups(model: MedMamba, recipe: Recipe) -> list[dict]:
    """Groups trainable parameters by learning rate factor (`lr_scale`) and weight decay."""
    exempt = set() if recipe.decay_all else model.no_weight_decay()
    last = sum(model.config.depths) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decay = layer_of(name, model.config.depths), name not in exempt
        group = groups.setdefault(
            (layer if recipe.layer_decay < 1 else last, decay),
            {"params": [], "weight_decay": recipe.weight_decay if decay else 0.0},
        )
        group["lr_scale"] = recipe.layer_decay ** (last - layer)
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_of(name: str, depths: tuple[int, ...]) -> int:
    """Returns the depth of a parameter: 0 for the patch embedding, 1 to n for the n blocks, n + 1 for the classifier,
    or a decoder.

    A merging layer counts with the block that follows it.
    """
    name = re.sub(ENCODERS, "", name)
    if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
        return 1 + sum(depths[: int(match[1])]) + int(match[2])
    if match := re.match(r"downsamples\.(\d+)\.", name):
        return 1 + sum(depths[: int(match[1]) + 1])
    return 0 if name.startswith("patch_embed.") else sum(depths) + 1


def build_optimizer(model: MedMamba, recipe: Recipe) -> torch.optim.Optimizer:
    """Returns the recipe's optimiser over the trainable parameters."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.lr, momentum=recipe.betas[0], nesterov=recipe.betas[0] > 0, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, recipe.lr, betas=recipe.betas, fused=True)


def lr_factor(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Returns the learning rate of an optimiser step, counted from 0 over the run, as a fraction of `recipe.lr`.

    Depends on the step alone, so there is no scheduler state to save.
    """
    warmup = round(min(recipe.warmup_epochs, recipe.epochs / 5) * steps_per_epoch)
    if step < warmup:
        return max((step + 1) / warmup, 1e-3)
    if recipe.schedule == "step":
        return recipe.gamma ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    if recipe.schedule == "constant":
        return 1.0
    switch, total = recipe.final_phase * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < switch:
        return cosine(1.0, recipe.min_lr, (step - warmup) / max(switch - warmup, 1))
    return cosine(recipe.final_lr, recipe.min_lr, (step - switch) / (total - switch))


def cosine(start: float, end: float, done: float) -> float:
    """Interpolates from start to end along half a cosine wave; `done` is 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each group to `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def freeze_stages(model: MedMamba, count: int) -> list[nn.Module]:
    """Freezes the patch embedding and the first `count` stages; returns the frozen modules.

    Their batch norms must also stay in eval mode: call `module.eval()` after each `model.train()`.
    """
    if count == 0:
        return []
    network: Any = getattr(model, "encoder", model)  # of a model with a decoder
    frozen = [network.patch_embed, *network.stages[:count], *network.downsamples[: count - 1]]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


class WeightAverage:
    """Keeps an exponential moving average of all weights and batch norm statistics in a separate model.

    The decay grows with the step t as (1 + t) / (10 + t) up to `decay`, so early weights are quickly forgotten.
    """

    def __init__(self, model: MedMamba, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged = _by_kind(self.model)
        self._source: tuple[nn.Module, tuple[list[Tensor], list[Tensor]]] | None = None

    def forget_tensors(self) -> None:
        """Drops references to the source model's tensors; call when these have been replaced."""
        self._source = None

    @torch.no_grad()
    def update(self, model: MedMamba, step: int) -> None:
        """Adds the weights after optimiser step `step`, counted from 0; a restarted count forgets earlier weights."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        if self._source is None or self._source[0] is not model:
            self._source = (model, _by_kind(model))  # collected once: collecting takes longer than averaging
        (averages, counts), (weights, source_counts) = self._averaged, self._source[1]
        torch._foreach_lerp_(averages, weights, weight)
        if counts:
            torch._foreach_copy_(counts, source_counts)


def _by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the floating-point tensors of a model, which can be averaged, and its integer counts."""
    tensors = list(model.state_dict().values())
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
