"""Batch norm folding for inference."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

SCAN_PARAMETERS = (".dt_weight", ".dt_bias", ".A_log", ".D")


class ChannelAffine(nn.Module):
    """x * scale + shift per channel of (B, C, H, W).

    What is left of the batch norm before the first convolution. Its shift cannot move into the convolution: there, the
    zero padding comes after the shift.
    """

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.view(-1, 1, 1).clone())
        self.register_buffer("shift", shift.view(-1, 1, 1).clone())
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class Pointwise(nn.Linear):
    """A 1x1 convolution as a matrix product over channels-last memory, which needs no layout change on any device."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, H, W)


@torch.no_grad()
def fuse(model, dtype: torch.dtype | None = None):
    """A copy of a MedMamba in eval mode, its batch norms folded away. It can predict and be differentiated for its
    input, but not be trained or saved. On NVIDIA GPUs its blocks run as few kernels, see `fused_model.py`.

    Args:
        dtype: of weights and activations, e.g. torch.bfloat16, which spares autocast its conversions of every weight at
            every call. The scan and its parameters stay in float32.

    Raises:
        ValueError: the model is in training mode, where its batch norms depend on the batch.
    """
    from .fused_model import FusedMedMamba
    from .model import ConvBranch

    if model.training:
        raise ValueError("fuse() needs a model in eval mode: call model.eval() first")
    fused = copy.deepcopy(model)
    fused.__class__ = FusedMedMamba
    for module in fused.modules():
        if isinstance(module, ConvBranch) and isinstance(module[0], nn.BatchNorm2d):
            _fuse_branch(module)
    if dtype is not None:
        for name, parameter in [*fused.named_parameters(), *fused.named_buffers()]:
            if not name.endswith(SCAN_PARAMETERS):
                parameter.data = parameter.data.to(dtype)
    return fused


def _fuse_branch(branch: nn.Sequential) -> None:
    layers: Any = list(branch)
    norm0, conv1, norm1, relu1, conv2, norm2, relu2, conv3, relu3 = layers
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        scale, shift = _scale_and_shift(norm)
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.mul_(scale).add_(shift)
        conv.to(memory_format=torch.channels_last)
    pointwise = Pointwise(conv3.in_channels, conv3.out_channels).to(conv3.weight)
    pointwise.weight.copy_(conv3.weight.flatten(1))
    pointwise.bias.copy_(conv3.bias)
    del branch[:]
    branch.extend([ChannelAffine(*_scale_and_shift(norm0)), conv1, relu1, conv2, relu2, pointwise, relu3])


def _scale_and_shift(norm) -> tuple[Tensor, Tensor]:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
