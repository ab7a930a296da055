"""MedMamba: a hybrid of convolutions and four-direction selective scans (Yue and Li, arXiv 2403.03849).

    image (B, in_chans, H, W)
      -> PatchEmbed     4x4 patches, LayerNorm                            (B, H/4,  W/4,  dims[0])
      -> Stage 1..4     SSConvSSM blocks, then PatchMerging except last   (B, H/32, W/32, dims[3])
      -> mean over pixels -> Linear                                       (B, num_classes)

Feature maps are channels-last, (B, H, W, C), throughout. A permute to (B, C, H, W) is a view of the same memory, which
PyTorch calls the channels_last memory format, so the convolutions work on it without a copy.

Written from the paper and the layout of the published weights; `integrations/upstream.py` maps those onto this model.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import MedMambaConfig
from ..kernels import resolve_backend, selective_scan_2d
from ..kernels.block import layers
from ..kernels.reference import compute_dtype

DIRECTIONS = 4  # K: row-major, column-major, and both reversed
MIN_SIZE = 32  # pixels of a side, for four stages and patches of 4; that of a model is `config.min_size`


class DropPath(nn.Module):
    """Draws which samples of a residual branch are dropped in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor | None:
        """What each sample of x is to be multiplied with, 0 or 1 / (1 - rate), float32 (B, 1, 1, 1); None: nothing."""
        if not self.training or self.rate == 0:
            return None
        kept = torch.empty((len(x), 1, 1, 1), device=x.device).bernoulli_(1 - self.rate)
        return kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SS2D(nn.Module):
    """Selective scan of a feature map in four directions, between two linear layers with a gate (section 3.2)."""

    def __init__(self, dim: int, d_state: int, expand: int, dt_rank: int):
        super().__init__()
        C, N, R, K = expand * dim, d_state, dt_rank, DIRECTIONS
        self.in_proj = nn.Linear(dim, 2 * C, bias=False)
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.x_proj = nn.Parameter(torch.empty(K, R + 2 * N, C))
        self.dt_weight = nn.Parameter(torch.empty(K, C, R))
        self.dt_bias = nn.Parameter(torch.empty(K, C))
        self.A_log = nn.Parameter(torch.empty(K, C, N))
        self.D = nn.Parameter(torch.empty(K, C))
        self.out_norm = nn.LayerNorm(C)
        self.out_proj = nn.Linear(C, dim, bias=False)
        self.scan_backend: str | None = None  # None: MEDMAMBA_SCAN, else the fastest available
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Mamba's initialisation: A = -(1..N), step sizes log-uniform in [0.001, 0.1] (arXiv 2312.00752, 3.6)."""
        K, C, R = self.dt_weight.shape
        bound = C**-0.5
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.uniform_(self.dt_weight, -(R**-0.5), R**-0.5)
        dt = torch.exp(torch.empty(K, C).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x, proj, dt_weight, A, gate = self.scan_inputs(x)
        y = selective_scan_2d(x, proj, dt_weight, self.dt_bias, A, self.D, self.scan_backend)  # (B, H, W, C)
        return layers.gate_project(y, gate, self.out_norm, self.out_proj, self.scan_backend)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, H, W, dim) to what the scan reads, x (B, H, W, C), proj (B, H, W, K, R + 2N), dt_weight (K, C, R) and
        A (K, C, N), and to the gate (B, H, W, C)."""
        x, gate = layers.conv_silu(self.in_proj(x), self.conv, self.scan_backend)  # (B, H, W, C) each
        # Projecting each pixel once and letting the scan read it in four orders gives the same numbers as building the
        # four sequences first, without four copies of x.
        proj, dt_weight = layers.project(x, self.x_proj, self.dt_weight)  # (B, H, W, K, R + 2N), (K, C, R)
        A = -torch.exp(self.A_log.to(compute_dtype(self.A_log.dtype)))
        return x, proj, dt_weight, A, gate


class ConvBranch(nn.Sequential):
    """The convolution half of a block, (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__(
            nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1),
            nn.ReLU(),
        )


class SSConvSSM(nn.Module):
    """SS-Conv-SSM block: half of the channels convolved, half scanned, shuffled together, added (figure 2)."""

    def __init__(self, dim: int, d_state: int, expand: int, dt_rank: int, drop_path: float):
        super().__init__()
        self.conv = ConvBranch(dim // 2)
        self.norm = nn.LayerNorm(dim // 2)
        self.ssm = SS2D(dim // 2, d_state, expand, dt_rank)
        self.drop_path = DropPath(drop_path)
        # A place to hook the scan branch as (B, C, H, W), for attribution, before training drops samples. `conv` is one
        # for the other branch.
        self.ssm_map = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        backend = self.ssm.scan_backend
        x, left, right = layers.split_norm(x, self.norm, backend)  # (B, H, W, C), twice (B, H, W, C/2)
        left = layers.conv_branch(left, self.conv, backend)  # (B, H, W, C/2)
        right = self.ssm_map(self.ssm(right).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C/2)
        factors = self.drop_path(right)
        # Channel shuffle with two groups, the halves alternate, and the residual connection.
        return layers.mix(x, left, right, factors, backend)  # (B, H, W, C)


class PatchEmbed(nn.Module):
    """Image to patches: (B, in_chans, H, W) to (B, H/patch, W/patch, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)
        self.scan_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, H/patch, W/patch, dim)
        return layers.channel_norm(x, self.norm, self.scan_backend)


class PatchMerging(nn.Module):
    """Each 2x2 patch of pixels becomes one: (B, H, W, C) to (B, H/2, W/2, 2C), as in Swin. An odd last row or column is
    dropped, as in the published model."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.scan_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(layers.merge_norm(x, self.norm, self.scan_backend))


class Stage(nn.Module):
    """Blocks at one resolution. `map` is a place to hook its output as (B, C, H, W)."""

    def __init__(self, blocks: list[SSConvSSM]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.map = nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, context_fn=partial(_checkpoint_contexts, block))
            else:
                x = block(x)
        return self.map(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MedMambaNetwork(nn.Module):
    """The network alone: images to logits. `MedMamba` adds weights, labels and files.

    Input: (B, in_chans, H, W) float, normalised as `config.preprocess` says; any H and W of at least `config.min_size`,
    32 by default. Output: logits (B, num_classes).
    """

    def __init__(self, config: MedMambaConfig):
        super().__init__()
        self.config = config
        stages, downsamples = len(config.depths), len(config.depths) - 1
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)]
        self.patch_embed = PatchEmbed(config.in_chans, config.dims[0], config.patch_size)
        self.stages = nn.ModuleList(
            Stage(
                [
                    SSConvSSM(dim, config.d_state, config.ssm_expand, config.dt_rank(i), rates.pop(0))
                    for _ in range(config.depths[i])
                ]
            )
            for i, dim in enumerate(config.dims[:stages])
        )
        self.downsamples = nn.ModuleList(PatchMerging(dim) for dim in config.dims[:downsamples])
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self._new_head(config.num_classes)
        self.apply(_init_weights)

    def _new_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.config.dims[-1], num_classes) if num_classes else nn.Identity()

    # --- inference ---

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Last feature map, (B, dims[-1], H/32, W/32)."""
        return self.forward_pyramid(x)[-1]

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The feature maps of the four stages: (B, dims[i], H / 2^(i+2), W / 2^(i+2)), channels_last in memory."""
        self._check_input(x)
        x = self.patch_embed(x)  # (B, H, W, C)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.downsamples[i - 1](x))
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) feature map to logits (B, num_classes), or to the pooled features (B, C) if `pre_logits`."""
        pooled = self.drop(features.mean((2, 3)))  # (B, C)
        return pooled if pre_logits else self.head(pooled)

    # --- configuration ---

    def reset_classifier(self, num_classes: int, id2label: dict[int, str] | None = None) -> None:
        """Replaces the classifier by a new, randomly initialised one, and the labels and calibration with it."""
        config = self.config.replace(num_classes=num_classes, id2label=id2label or {}, calibration={})
        head = self._new_head(num_classes).to(self.patch_embed.proj.weight)
        head.apply(_init_weights)
        self.head = head
        self.config = config  # after the classifier whose classes it names

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: less memory for about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def set_scan_backend(self, name: str | None) -> None:
        """Fixes the scan backend of this model ("native", "cuda", "triton", "mamba_ssm", "torch"); None: choose.

        Raises:
            BackendError: unknown, or not available on this model's device.
        """
        if name is not None:
            weight = self.patch_embed.proj.weight
            resolve_backend(weight.device, weight.dtype, name)
        for module in self.modules():
            if isinstance(module, SS2D | PatchEmbed | PatchMerging):
                module.scan_backend = name

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay harms: the scan's A and D, biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith(("A_log", ".D", "dt_bias"))}

    def _check_input(self, x: Tensor) -> None:
        if (torch.jit.is_tracing() or torch.compiler.is_exporting()) and _exports_onnx():
            raise RuntimeError(
                "torch.onnx.export does not know the selective scan: use medmamba.export.to_onnx(model, 'model.onnx'), "
                "or `medmamba export MODEL --to onnx --out model.onnx`"
            )
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(
                f"expected a batch of images (B, {self.config.in_chans}, H, W), got {tuple(x.shape)}; "
                "model.predict(...) takes files and single images"
            )
        least = self.config.min_size
        if min(x.shape[2:]) < least:
            raise ValueError(f"images must be at least {least}x{least}, got {x.shape[2]}x{x.shape[3]}; resize them")


@torch.compiler.assume_constant_result  # else torch.export takes it for False
def _exports_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _second_pass(block)


@contextmanager
def _second_pass(block: nn.Module) -> Iterator[None]:
    """Checkpointing runs a block twice; its batch norms must count the batch once."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
