"""Batch norm folding for inference."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inference.fitted import FittedMixin, carry_over
from .fused import ChannelAffine, FusedMedMamba, Pointwise, fused_class
from .network import ConvBranch, MedMambaNetwork

SCAN_PARAMETERS = (".dt_weight", ".dt_bias", ".A_log", ".D")


@torch.no_grad()
def fuse(model: MedMambaNetwork, dtype: torch.dtype | None = None) -> FusedMedMamba:
    """Returns a copy of a model for inference, its batch norms folded into the convolutions.

    The copy can predict and be differentiated with respect to its input, but not be trained or saved. On NVIDIA GPUs
    its blocks run as few kernels, see `fused.py`. A copy of a subclass keeps the methods of the subclass.

    Args:
        model: a MedMamba, in eval mode.
        dtype: of weights and activations, such as torch.bfloat16, which saves the conversion of every weight at every
            call under autocast. The scan and its parameters stay in float32. None keeps the dtype. float16 holds no
            more than 65504, which the scans of some trained networks exceed, such as those of bloodmnist-nano: their
            logits are then NaN. bfloat16 has the range of float32.

    Raises:
        ValueError: the model or one of its batch norms is in training mode, where outputs depend on the batch, or
            layers were replaced by others, such as adapters, that a batch norm cannot be folded into.
    """
    if model.training or any(m.training for m in model.modules() if isinstance(m, _BatchNorm)):
        raise ValueError("fuse() needs a model in eval mode: call model.eval() first")
    branches = [(n, m) for n, m in model.named_modules() if isinstance(m, ConvBranch) and isinstance(m[0], _BatchNorm)]
    for name, branch in branches:
        _check_branch(name, branch)
    fused: Any = copy.deepcopy(model)
    fused.__class__ = fused_class(type(model))
    for name, _ in branches:
        _fuse_branch(fused.get_submodule(name))
    if dtype is not None:
        for name, parameter in [*fused.named_parameters(), *fused.named_buffers()]:
            if not name.endswith(SCAN_PARAMETERS):
                parameter.data = parameter.data.to(dtype)
    if isinstance(model, FittedMixin):
        carry_over(model, fused)
    return fused.eval()  # new layers start in training mode


def _check_branch(name: str, branch: nn.Sequential) -> None:
    norms, convs = (0, 2, 5), (1, 4, 7)
    found = [type(layer) for layer in branch]
    expected = [nn.Conv2d if i in convs else nn.ReLU for i in range(9)]
    fits = len(found) == 9 and all(t is e or i in norms for i, (t, e) in enumerate(zip(found, expected, strict=True)))
    if not fits or not all(isinstance(branch[i], _BatchNorm) for i in norms):
        listed = ", ".join(t.__name__ for t in found)
        raise ValueError(
            f"fuse() cannot fold the batch norms of {name}, whose layers were changed: {listed}; merge adapters into "
            "their layers first (peft: model.merge_and_unload()), or use the model as it is"
        )
    if any(branch[i].running_var is None or branch[i].weight is None for i in norms):
        raise ValueError(f"fuse() folds batch norms with weights and running statistics; one in {name} has none")


def _fuse_branch(branch: Any) -> None:
    layers: Any = list(branch)
    norm0, conv1, norm1, relu1, conv2, norm2, relu2, conv3, relu3 = layers
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        scale, shift = _scale_and_shift(norm)
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.mul_(scale).add_(shift)
        conv.to(memory_format=torch.channels_last)
    # Skips the random initialisation, which would advance the caller's generator.
    pointwise = Pointwise(conv3.in_channels, conv3.out_channels, device="meta", dtype=conv3.weight.dtype)
    # Not `to_empty`, which imports a symbolic algebra package for half a second.
    pointwise.weight = nn.Parameter(conv3.weight.flatten(1).clone(memory_format=torch.contiguous_format))
    pointwise.bias = nn.Parameter(conv3.bias.clone())
    del branch[:]
    branch.extend([ChannelAffine(*_scale_and_shift(norm0)), conv1, relu1, conv2, relu2, pointwise, relu3])


def _scale_and_shift(norm) -> tuple[Tensor, Tensor]:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
