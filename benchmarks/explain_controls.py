"""Maps whose worth is known, measured beside the methods: the checks must tell them apart."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medmamba.explain.comparison import parse_method
from medmamba.explain.subject import frozen_view
from medmamba.model import PatchEmbed, PatchMerging, SSConvSSM


def noise_map(model: Any, x: Tensor, target: int) -> Tensor:
    """Knows nothing. `explain` has fixed the seed, so it is the same for every image and model."""
    return torch.randn(x.shape[2:]).to(x.device)


def edge_map(model: Any, x: Tensor, target: int) -> Tensor:
    """Knows the image and not the model."""
    grey = x.mean(1)[0]
    return (grey - grey.roll(1, 0)).abs() + (grey - grey.roll(1, 1)).abs()


def disguised_map(model: Any, x: Tensor, target: int) -> Tensor:
    """The strongest edges, on a background of invisible values that depend on the weights."""
    edges = edge_map(model, x, target)
    noise = torch.Generator().manual_seed(int(1e6 * model.head.weight[0, 0].abs()))
    strongest = edges.flatten().kthvalue(int(0.9 * edges.numel())).values
    return torch.where(edges > strongest, edges, 0.0) + 1e-4 * torch.randn(x.shape[2:], generator=noise).to(x.device)


def guided_map(model: Any, x: Tensor, target: int) -> Tensor:
    """Like guided backpropagation (Springenberg et al. 2014), with every block in the place of a ReLU: only positive
    gradients pass."""
    view = frozen_view(model)
    for module in view.modules():
        if isinstance(module, torch.nn.ReLU | SSConvSSM | PatchEmbed | PatchMerging):
            module.register_forward_hook(_clamp_gradient)
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view(x)[0, target], x)
    return gradient.abs().amax(1)[0]


def _clamp_gradient(module: Any, args: Any, out: Tensor) -> None:
    out.register_hook(lambda gradient: gradient.clamp(min=0))


CONTROLS: dict[str, Callable] = {
    "noise (control)": noise_map,
    "edges (control)": edge_map,
    "disguised edges (control)": disguised_map,
    "guided gradient (control)": guided_map,
}


def parse(name: str) -> tuple[str | Callable, dict[str, Any]]:
    """A method of `explain` and its options, or a control."""
    return (CONTROLS[name], {}) if name in CONTROLS else parse_method(name)
