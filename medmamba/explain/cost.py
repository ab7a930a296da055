"""How long explanations will take: evaluations that each method needs, times the measured speed of a model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..model import MedMamba
from .conditions import controlled
from .explanation import check_batch_size
from .faithfulness import CURVE_STEPS, ORDERS, PERTURBATIONS, RANDOM_MODELS, REPEATS
from .methods import METHODS, check_options
from .subject import frozen_view


class Evaluations(NamedTuple):
    """How many images a method evaluates: those without a gradient, and those with one."""

    forward: int
    gradient: int


@dataclass(frozen=True)
class Speed:
    """Seconds per image of a model on its device, in batches as explanations use them.

    Attributes:
        forward: without a gradient.
        gradient: with the gradient for the image.
    """

    forward: float
    gradient: float


def evaluations(method: str, size: tuple[int, int], **options: Any) -> Evaluations:
    """Returns how many images a method evaluates to explain one.

    Integrated gradients may take up to `max_steps` gradients if it does not converge at once; this is the number that
    it starts with.

    Args:
        method: a name from `methods()`.
        size: (height, width) of the network's input.
        options: options of the method that differ from their defaults.

    Raises:
        ValueError: unknown method or option.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    o = check_options(METHODS[method], options)
    if method == "smoothgrad":
        return Evaluations(1, o["samples"])
    if method == "integrated_gradients":
        return Evaluations(5, 2 * math.ceil(o["n_steps"] / 2))
    if method == "gradient_shap":
        return Evaluations(2 + len(o["baselines"]), o["samples"])
    if method == "occlusion":
        window = max(min(size) // 8, 1) if o["window"] is None else o["window"]
        stride = max(window // 2, 1) if o["stride"] is None else o["stride"]
        return Evaluations(2 + math.prod(math.ceil((side - window) / stride) + 1 for side in size), 0)
    if method == "feature_ablation":
        return Evaluations(2 + o["n_segments"], 0)
    return Evaluations(0, 1)


def measure_speed(model: MedMamba, batch_size: int | None = None) -> Speed:
    """Measures the speed of a model on its device with random images: one small batch, with and without gradient.

    Args:
        batch_size: as in `explain`.

    Raises:
        ValueError: as `explain`.
    """
    view = frozen_view(model)
    count = min(check_batch_size(batch_size, view), 4)
    device, config = view.patch_embed.proj.weight.device, view.config
    shape = (config.in_chans, *config.preprocess.input_size)
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)

    def seconds(gradient: bool) -> float:
        began = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            images = x.clone().requires_grad_(gradient)
            logits = view(images)
            if gradient:
                (logits,) = torch.autograd.grad(logits[:, 0].sum(), images)
            logits.sum().item()  # waits for an accelerator
        return (time.perf_counter() - began) / count

    with controlled(device, 0):
        if device.type != "cpu":  # the first run of a shape loads kernels
            seconds(True)
        return Speed(seconds(False), seconds(True))


def estimate_seconds(
    model: MedMamba, methods: Sequence[str], *, checks: bool = False, speed: Speed | None = None
) -> dict[str, float]:
    """Estimates the seconds that `explain` takes for each method, with its default options, on this machine.

    Args:
        methods: names from `methods()`.
        checks: include all checks of `assess`.
        speed: from `measure_speed`; measured here if None.

    Raises:
        ValueError: unknown method, or the model cannot be explained.
    """
    speed = speed or measure_speed(model)
    size = model.config.preprocess.input_size
    found = {}
    for i, name in enumerate(methods):
        once = evaluations(name, size)
        total = once.forward * speed.forward + once.gradient * speed.gradient
        if checks:
            total *= 1 + REPEATS + RANDOM_MODELS
            removal = 2 * CURVE_STEPS * (1 + (ORDERS if i == 0 else 0))  # random orders are shared by all maps
            total += (removal + (PERTURBATIONS if i == 0 else 0)) * speed.forward
        found[name] = total
    return found
