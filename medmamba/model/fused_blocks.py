"""The blocks of a fused model: their weights as the kernels take them, and a stage by these kernels.

Each block launches ten kernels: two convolutions with their ReLU, four matrix products, the depthwise convolution with
its SiLU, the scan, its norm with the gate, and the mix of the branches with the preparation of the next block. With few
channels, in 16 bits on a GPU, it launches seven: all from the scan to the next depthwise convolution is one.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backends.cuda import scan_parts
from ..kernels.block import between
from ..kernels.block.memory import parameter
from ..kernels.cuda import graph_capture
from ..kernels.once import once
from ..kernels.reference import pad_rank
from .network import SSConvSSM

SMALLER = 2.0**-6  # scans in float16, whose largest number is 65504


class ChannelAffine(nn.Module):
    """Computes x * scale + shift per channel of (B, C, H, W).

    Replaces the batch norm before the first convolution. Its shift cannot be folded into that convolution, whose zero
    padding is applied after the shift.
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


class Block(NamedTuple):
    """Weights of one block in the layout and dtypes of the kernels."""

    convs: tuple[nn.Conv2d, nn.Conv2d]
    pointwise: nn.Linear
    in_proj: Tensor
    depthwise: tuple[Tensor, Tensor]  # (9, C), (C,)
    x_proj: Tensor  # (K * (R4 + 2N), C): R padded to a multiple of 4 with zeros, for aligned matrix products
    scan: tuple[Tensor, Tensor, Tensor, Tensor]  # dt_weight (K, C, R4), dt_bias, A, D
    out_norm: tuple[Tensor, Tensor, float]
    out_proj: Tensor
    split: tuple[Tensor, Tensor, Tensor, Tensor, float]  # the affine of the left half, the norm of the right
    begin: between.Begin | None  # both None unless the kernels of `between.py` run
    end: between.End | None


def run_stage(x: Tensor, blocks: list[Block], kernels: ModuleType) -> Tensor:
    """Returns the output of the blocks of a stage for x (B, H, W, C), computed by `kernels/block/inference*.py`."""
    if blocks[0].begin is not None:
        return _run_narrow(x, blocks, kernels)
    _, *halves = kernels.mix_split(x, None, blocks[0].split)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        left, right = halves
        assert left is not None and right is not None
        mixed = _branches(left, right, block, kernels)
        x, *halves = kernels.mix_split(x, mixed, following.split if following else None)
    return x


def _run_narrow(x: Tensor, blocks: list[Block], kernels: ModuleType) -> Tensor:
    """Returns the output of the blocks of a stage with few channels."""
    _, left, wide = between.between(x, None, None, blocks[0].begin)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        assert left is not None and wide is not None
        convolved = graph_capture.run_beside(left, functools.partial(_conv_branch, left, block))
        scanned = _narrow_scan(wide, block, kernels)
        mixed = convolved(), *scanned
        x, left, wide = between.between(x, mixed, block.end, following.begin if following else None)
    return x


def _narrow_scan(wide: Tensor, block: Block, kernels: ModuleType) -> tuple[Tensor, Tensor]:
    """Returns the parts of the scan (B, K, L, C) and its gate (B, H, W, C), for wide (B, H, W, 2C)."""
    x, gate = wide.chunk(2, dim=-1)
    x = kernels.depthwise_silu(x, *block.depthwise)
    proj = F.linear(x, block.x_proj).unflatten(-1, (block.scan[0].shape[0], -1))
    return scan_parts(x, proj, *block.scan), gate


def _branches(left: Tensor, right: Tensor, block: Block, kernels: ModuleType) -> tuple[Tensor, Tensor]:
    """Returns the outputs of both branches, in a CUDA graph the convolutions beside the scan branch.

    The scan leaves tensor cores idle, and with few images most of the GPU.
    """
    convolved = graph_capture.run_beside(left, functools.partial(_conv_branch, left, block))
    scanned = _scan(_scan_inputs(right, block, kernels), block, kernels)
    return convolved(), scanned


def _conv_branch(x: Tensor, block: Block) -> Tensor:
    """Returns the convolution branch of x (B, H, W, C/2) before its last ReLU, in the same shape."""
    x = x.permute(0, 3, 1, 2)  # (B, C/2, H, W), channels_last
    for conv in block.convs:
        x = _conv_relu(x, conv.weight, conv.bias)
    return block.pointwise(x).permute(0, 2, 3, 1)


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        return torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    if _onednn_fuses(x.dtype):
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "relu", [], "")
    return F.relu_(F.conv2d(x, weight, bias, padding=1))


@once
def _onednn_fuses(dtype: torch.dtype) -> bool:
    """Returns whether PyTorch's CPU library computes a convolution with its ReLU in this dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _scan_inputs(x: Tensor, block: Block, kernels: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x and gate (B, H, W, C) and proj (B, H, W, K, R4 + 2N) of the scan branch, for x (B, H, W, C/2)."""
    x, gate = F.linear(x, block.in_proj).chunk(2, dim=-1)
    x = kernels.depthwise_silu(x, *block.depthwise)
    return x, gate, F.linear(x, block.x_proj).unflatten(-1, (block.scan[0].shape[0], -1))


def _scan(inputs: tuple[Tensor, Tensor, Tensor], block: Block, kernels: ModuleType) -> Tensor:
    """Returns the scan branch, (B, H, W, C/2)."""
    x, gate, proj = inputs
    return F.linear(kernels.scan_gate(x, proj, *block.scan, gate, *block.out_norm), block.out_proj)


def prepare_block(block: SSConvSSM, narrow: bool) -> Block:
    """Returns the weights of a block as the kernels take them; `narrow`: as those of `between.py` do too."""
    layers: Any = list(block.conv)
    affine, conv1, _, conv2, _, pointwise, _ = layers
    ssm: Any = block.ssm
    x_proj, dt_weight = pad_rank(ssm.x_proj, ssm.dt_weight.float())
    scale, shift = (parameter(getattr(affine, name).flatten()) for name in ("scale", "shift"))
    in_proj, out_proj = ssm.in_proj.weight, ssm.out_proj.weight
    split, out_norm = (scale, shift, *norm_of(block.norm)), norm_of(ssm.out_norm)
    D = ssm.D.float()
    if x_proj.dtype == torch.float16:
        x_proj, D, out_norm = _smaller_scan(x_proj, dt_weight.shape[2], D, out_norm)
    return Block(
        convs=(conv1, conv2),
        pointwise=pointwise,
        in_proj=in_proj,
        depthwise=(ssm.conv.weight.flatten(1).T.float().contiguous(), ssm.conv.bias.float()),
        x_proj=x_proj.flatten(0, 1).contiguous(),
        scan=(
            dt_weight,
            ssm.dt_bias.float(),
            -torch.exp(ssm.A_log.float()),
            D,
        ),
        out_norm=out_norm,
        out_proj=out_proj,
        split=split,
        begin=between.Begin(*split, between.arranged_linear(in_proj)) if narrow else None,
        end=between.End(*out_norm, between.arranged_linear(out_proj)) if narrow else None,
    )


def _smaller_scan(
    x_proj: Tensor, rank: int, D: Tensor, norm: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, float]]:
    """Returns x_proj, D and the norm after the scan such that a scan is `SMALLER` times as large and all else the same.

    The scans of some trained networks exceed the range of float16. A scan is linear in C and D, and the norm takes the
    factor out again, with an epsilon to match. The factor is a power of two, so it rounds nothing but the smallest.
    """
    N = (x_proj.shape[1] - rank) // 2
    x_proj = torch.cat((x_proj[:, : rank + N], x_proj[:, rank + N :] * SMALLER), dim=1)
    weight, bias, eps = norm
    return x_proj, D * SMALLER, (weight, bias, eps * SMALLER**2)


def norm_of(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    """Returns weight and bias in float32, and epsilon."""
    return parameter(norm.weight), parameter(norm.bias), norm.eps
