"""A model for inference whose blocks run as few kernels on an NVIDIA GPU: `model.fuse()` makes it.

Per block: two convolutions with their ReLU, four matrix products, a depthwise convolution with its SiLU, the scan, its
norm and gate, and the mixing of the branches with the preparation of the next block: ten launches, none of which reads
or writes more than it must. Elsewhere (CPUs, gradients, torch.compile, autocast over float32 weights) the layers of
`model.py` run one by one. Hooks on layers inside a block are called only there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import fused, resolve_backend
from .kernels.layers import pad_rank
from .model import MedMamba, SSConvSSM


class _Block(NamedTuple):
    """What the kernels take of one block, in their layout and types."""

    convs: tuple[nn.Conv2d, nn.Conv2d]
    pointwise: nn.Linear
    in_proj: Tensor
    depthwise: tuple[Tensor, Tensor]  # (9, C), (C,)
    x_proj: Tensor  # (K * (R4 + 2N), C): R padded to a multiple of 4 with zeros, for aligned matrix products
    scan: tuple[Tensor, Tensor, Tensor, Tensor]  # dt_weight (K, C, R4), dt_bias, A, D
    out_norm: tuple[Tensor, Tensor, float]
    out_proj: Tensor
    split: tuple[Tensor, Tensor, Tensor, Tensor, float]  # the affine of the left half, the norm of the right


class FusedMedMamba(MedMamba):
    """See the module. Made by `MedMamba.fuse`."""

    _blocks: list[list[_Block]] | None = None

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The feature maps of the four stages: (B, dims[i], H / 2^(i+2), W / 2^(i+2)), channels_last in memory."""
        self._check_input(x)
        return self.cuda_pyramid(x) if self._runs_fused(x) else super().forward_pyramid(x)

    @torch.inference_mode()
    def graphed(self, example: Tensor) -> Callable[[Tensor], Tensor]:
        """A function from images of the shape of `example` to their logits, as one CUDA graph: what is left of small
        batches is the time of the GPU, without that of Python. Each call overwrites the logits of the last.

        Raises:
            ValueError: not on an NVIDIA GPU. The function: images of another shape.
        """
        images = example.to(self.patch_embed.proj.weight.device).clone()
        if not images.is_cuda:
            raise ValueError("CUDA graphs need a model on an NVIDIA GPU: call model.cuda() first")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and algorithms chosen before
                self(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self(images)

        @torch.inference_mode()
        def run(batch: Tensor) -> Tensor:
            if batch.shape != images.shape:
                raise ValueError(f"this graph takes {tuple(images.shape)}, got {tuple(batch.shape)}")
            images.copy_(batch)
            graph.replay()
            return logits

        return run

    def _apply(self, fn, recurse=True):
        self._blocks = None  # moved, or of another type
        return super()._apply(fn, recurse)

    def _runs_fused(self, x: Tensor) -> bool:
        weight = self.patch_embed.proj.weight
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not (x.is_cuda and weight.is_cuda):
            return False
        if weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            return False
        stages: Any = self.stages
        ssm = stages[0].blocks[0].ssm
        fits = all(dim % 4 == 0 for dim in self.config.dims) and self.config.d_state <= 16
        return fits and resolve_backend(x.device, weight.dtype, ssm.scan_backend) == "cuda"

    @torch.no_grad()
    def cuda_pyramid(self, x: Tensor) -> list[Tensor]:
        """`forward_pyramid` by the kernels of `kernels/fused.py`, for tensors where these run."""
        if self._blocks is None:
            stages: Any = self.stages
            self._blocks = [[_prepare(block) for block in stage.blocks] for stage in stages]
        embed: Any = self.patch_embed
        x = embed.proj(x.to(embed.proj.weight.dtype).contiguous(memory_format=torch.channels_last))
        x = fused.norm(x.permute(0, 2, 3, 1).contiguous(), *_norm(embed.norm))  # (B, H, W, C)
        maps = []
        for i, blocks in enumerate(self._blocks):
            if i:
                merging: Any = self.downsamples[i - 1]
                x = F.linear(fused.gather_norm(x, *_norm(merging.norm)), merging.reduction.weight)
            _, *halves = fused.mix_split(x, None, blocks[0].split)
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                left, right = halves
                assert left is not None and right is not None
                mixed = _conv_branch(left, block), _scan_branch(right, block)
                x, *halves = fused.mix_split(x, mixed, following.split if following else None)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


def _conv_branch(x: Tensor, block: _Block) -> Tensor:
    """(B, H, W, C/2) to the same, before the last ReLU."""
    x = x.permute(0, 3, 1, 2)  # (B, C/2, H, W), channels_last
    for conv in block.convs:
        if x.is_cuda:
            x = torch.cudnn_convolution_relu(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
        else:
            x = F.relu(conv(x))
    return block.pointwise(x).permute(0, 2, 3, 1)


def _scan_branch(x: Tensor, block: _Block) -> Tensor:
    """(B, H, W, C/2) to the same."""
    x, gate = F.linear(x, block.in_proj).chunk(2, dim=-1)  # (B, H, W, C) each
    x = fused.depthwise_silu(x, *block.depthwise)
    proj = F.linear(x, block.x_proj).unflatten(-1, (block.scan[0].shape[0], -1))  # (B, H, W, K, R4 + 2N)
    return F.linear(fused.scan_gate(x, proj, *block.scan, gate, *block.out_norm), block.out_proj)


def _prepare(block: SSConvSSM) -> _Block:
    layers: Any = list(block.conv)
    affine, conv1, _, conv2, _, pointwise, _ = layers
    ssm: Any = block.ssm
    x_proj, dt_weight = pad_rank(ssm.x_proj, ssm.dt_weight.float())
    scale, shift = (getattr(affine, name).flatten().float().contiguous() for name in ("scale", "shift"))
    return _Block(
        convs=(conv1, conv2),
        pointwise=pointwise,
        in_proj=ssm.in_proj.weight,
        depthwise=(ssm.conv.weight.flatten(1).T.float().contiguous(), ssm.conv.bias.float()),
        x_proj=x_proj.flatten(0, 1).contiguous(),
        scan=(
            dt_weight,
            ssm.dt_bias.float(),
            -torch.exp(ssm.A_log.float()),
            ssm.D.float(),
        ),
        out_norm=_norm(ssm.out_norm),
        out_proj=ssm.out_proj.weight,
        split=(scale, shift, *_norm(block.norm)),
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.float(), norm.bias.float(), norm.eps
