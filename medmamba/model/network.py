"""MedMamba: a hybrid of convolutions and four-direction selective scans (Yue and Li, arXiv 2403.03849).

    image (B, in_chans, H, W)
      -> PatchEmbed     4x4 patches, LayerNorm                            (B, H/4,  W/4,  dims[0])
      -> Stage 1..4     SSConvSSM blocks, then PatchMerging except last   (B, H/32, W/32, dims[3])
      -> mean over pixels -> Linear                                       (B, num_classes)

Tiny, the default of `MedMambaConfig`: dims 96, 192, 384, 768; 2, 2, 4, 2 blocks; state size N = 16; the rank of the
step size projection is R = ceil(dim / 32).

Feature maps are channels-last, (B, H, W, C), throughout. A permute to (B, C, H, W) is a view of the same memory, which
PyTorch calls the channels_last memory format, so the convolutions work on it without a copy.

The whole network is defined here, in plain PyTorch, except for the recurrence of the scan (`kernels/reference.py`,
stated in `SS2D`). A function marked `@replaceable` runs as a CUDA kernel where `kernels/block/eligibility.py` allows.

Written from the paper and the layout of the published weights; `integrations/upstream.py` maps those onto this model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..kernels import resolve_backend, selective_scan_2d
from ..kernels.block import replaceable
from ..kernels.reference import compute_dtype, pad_rank
from .checkpointing import checkpoint_block

DIRECTIONS = 4  # K: row-major, column-major, and both reversed
MIN_SIZE = 32  # pixels per side, for four stages and patches of 4; that of a model is `config.min_size`


@replaceable("channel_norm")
def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalises each pixel of x (B, H, W, C), in the dtype of x also under autocast."""
    return norm(x).to(x.dtype)


@replaceable("merge_norm")
def merge_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Concatenates each 2x2 patch of x (B, H, W, C) and normalises it: (B, H/2, W/2, 4C).

    The order is (row, column) = (0,0), (1,0), (0,1), (1,1), as in Swin. An odd last row or column is dropped.
    """
    B, H, W, C = x.shape
    x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
    return norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3))


@replaceable("embed_patches")
def embed_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolves patches of images x (B, C, H, W), as large as they are apart, to (B, H/patch, W/patch, dim)."""
    return conv(x).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Embeds patches of an image: (B, in_chans, H, W) to (B, H/patch, W/patch, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)
        self.scan_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = embed_patches(x, self.proj, backend=self.scan_backend)  # (B, H/patch, W/patch, dim)
        return channel_norm(x, self.norm, backend=self.scan_backend)


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the channels: (B, H, W, C) to (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.scan_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(merge_norm(x, self.norm, backend=self.scan_backend))


@replaceable("conv_silu")
def conv_silu(wide: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Splits wide (B, H, W, 2C) into x and gate (B, H, W, C); returns silu(depthwise 3x3 convolution of x), gate."""
    x, gate = wide.chunk(2, dim=-1)
    return F.silu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), gate


def project(x: Tensor, x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Projects each pixel to what the scan reads there in each direction.

    Args:
        x: (B, H, W, C). x_proj: (K, R + 2N, C). dt_weight: (K, C, R).

    Returns:
        proj (B, H, W, K, R + 2N) and dt_weight; on GPUs, both with R padded by `pad_rank`.
    """
    if _pads_rank(x):
        x_proj, dt_weight = pad_rank(x_proj, dt_weight)
    return F.linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2]), dt_weight


def _pads_rank(x: Tensor) -> bool:
    return x.is_cuda


@replaceable("gate_project")
def gate_project(y: Tensor, gate: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Returns linear(norm(y) * silu(gate)): y and gate (B, H, W, C) to (B, H, W, dim)."""
    return linear(norm(y) * F.silu(gate))


class SS2D(nn.Module):
    """Selective scan of a feature map in four directions, between two linear layers with a gate (section 3.2).

    At each pixel, direction k reads [code (R) | B (N) | C (N)] = x_proj[k] @ x. Along the pixels t in its order, with
    dt = softplus(dt_weight[k] @ code + dt_bias[k]) and A = -exp(A_log[k]), each channel has a state h of size N:

        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] * B[t]
        y[t] = <C[t], h[t]> + D[k] * x[t]

    The orders are row-major, column-major, and both reversed; the four y are put back in pixel order and summed.
    """

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
        """Initialises as Mamba does: A = -(1..N), step sizes log-uniform in [0.001, 0.1] (arXiv 2312.00752, 3.6)."""
        if self.dt_weight.is_meta:  # weights are loaded later; computing without data would import PyTorch's compiler
            return
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
        return gate_project(y, gate, self.out_norm, self.out_proj, backend=self.scan_backend)

    def scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Computes what the scan and the gate read from the input (B, H, W, dim).

        Returns:
            x (B, H, W, C), proj (B, H, W, K, R + 2N), dt_weight (K, C, R), A (K, C, N), gate (B, H, W, C).
        """
        x, gate = conv_silu(self.in_proj(x), self.conv, backend=self.scan_backend)  # (B, H, W, C) each
        # Projecting each pixel once and letting the scan read it in four orders gives the same numbers as building the
        # four sequences first, without four copies of x.
        proj, dt_weight = project(x, self.x_proj, self.dt_weight)
        A = -torch.exp(self.A_log.to(compute_dtype(self.A_log.dtype)))
        return x, proj, dt_weight, A, gate


@replaceable("split_norm")
def split_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Begins a block: x (B, H, W, C) to x, its left half, and its normalised right half, (B, H, W, C/2) each.

    The kernel adds up the gradients of all three uses of x, so the residual connection must use the returned x.
    """
    left, right = x.chunk(2, dim=-1)
    return x, left, norm(right)


class ConvBranch(nn.Sequential):
    """The convolution branch of a block, (B, C, H, W) to (B, C, H, W)."""

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


@replaceable("conv_branch")
def conv_branch(x: Tensor, branch: ConvBranch) -> Tensor:
    """Applies the convolution branch to a channels-last map x (B, H, W, C)."""
    return branch(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Drops the residual branch of random samples in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, H, W, C) with dropped samples set to 0 and the others scaled by 1/(1 - rate)."""
        keep = self.keep_mask(x)
        return x if keep is None else (x * keep).to(x.dtype)

    def keep_mask(self, x: Tensor) -> Tensor | None:
        """Returns a per-sample keep mask scaled by 1/(1 - rate), float32 (B, 1, 1, 1), or None when inactive."""
        if not self.training or self.rate == 0:
            return None
        kept = torch.empty((len(x), 1, 1, 1), dtype=torch.float32, device=x.device).bernoulli_(1 - self.rate)
        return kept.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


@replaceable("mix")
def mix(x: Tensor, left: Tensor, right: Tensor, drop_path: nn.Module) -> Tensor:
    """Ends a block: adds its branches (B, H, W, C/2) to x (B, H, W, C), their channels interleaved.

    Interleaving is a channel shuffle with two groups: left[0], right[0], left[1], right[1], ...
    """
    return x + torch.stack((left, drop_path(right)), dim=-1).flatten(-2)


class SSConvSSM(nn.Module):
    """SS-Conv-SSM block: half of the channels convolved, half scanned, shuffled together, added (figure 2)."""

    def __init__(self, dim: int, d_state: int, expand: int, dt_rank: int, drop_path: float):
        super().__init__()
        self.conv = ConvBranch(dim // 2)
        self.norm = nn.LayerNorm(dim // 2)
        self.ssm = SS2D(dim // 2, d_state, expand, dt_rank)
        self.drop_path = DropPath(drop_path)
        # Hook point for the scan branch as (B, C, H, W), for attribution, before training drops samples; `conv` is that
        # of the other branch.
        self.ssm_map = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        whole = type(self.ssm) is SS2D and torch.is_grad_enabled()
        return run_block(x, self, backend=self.ssm.scan_backend) if whole else self.run_pieces(x)

    def run_pieces(self, x: Tensor) -> Tensor:
        """Runs the block layer by layer."""
        backend = self.ssm.scan_backend
        x, left, right = split_norm(x, self.norm, backend=backend)  # (B, H, W, C), twice (B, H, W, C/2)
        left = conv_branch(left, self.conv, backend=backend)  # (B, H, W, C/2)
        right = self.ssm_map(self.ssm(right).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, C/2)
        return mix(x, left, right, self.drop_path, backend=backend)  # (B, H, W, C)


@replaceable("run_block")
def run_block(x: Tensor, block: SSConvSSM) -> Tensor:
    """Runs a block, whose scan branch is an `SS2D`, on x (B, H, W, C)."""
    return block.run_pieces(x)


class Stage(nn.Module):
    """Blocks at one resolution. `map` is the hook point for its output as (B, C, H, W)."""

    def __init__(self, blocks: list[SSConvSSM]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.map = nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint_block(block, x) if recompute else block(x)
        return self.map(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MedMambaNetwork(nn.Module):
    """The bare network, images to logits. `MedMamba` adds pretrained weights, labels and prediction.

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
        """Returns the last feature map, (B, dims[-1], H/32, W/32)."""
        return self.forward_pyramid(x)[-1]

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of the four stages: (B, dims[i], H / 2^(i+2), W / 2^(i+2)), channels_last in memory."""
        self._check_input(x)
        x = self.patch_embed(x)  # (B, H, W, C)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.downsamples[i - 1](x))
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps features (B, C, H, W) to logits (B, num_classes), or to pooled features (B, C) if `pre_logits`."""
        pooled = self.drop(features.mean((2, 3)))  # (B, C)
        return pooled if pre_logits else self.head(pooled)

    # --- configuration ---

    def reset_classifier(self, num_classes: int, id2label: dict[int, str] | None = None) -> None:
        """Replaces the classifier by a randomly initialised one, and resets labels and calibration."""
        config = self.config.replace(num_classes=num_classes, id2label=id2label or {}, calibration={}, decisions={})
        head = self._new_head(num_classes).to(self.patch_embed.proj.weight)
        head.apply(_init_weights)
        self.head = head
        self.config = config  # last, so that a failure above leaves model and config consistent

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass: less memory at the cost of about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def set_scan_backend(self, name: str | None) -> None:
        """Fixes the scan backend of this model.

        Args:
            name: "native", "cuda", "triton", "mamba_ssm" or "torch"; None selects automatically.

        Raises:
            BackendError: the backend is unknown, or not available on this model's device.
        """
        if name is not None:
            weight = self.patch_embed.proj.weight
            resolve_backend(weight.device, weight.dtype, name)
        for module in self.modules():
            if isinstance(module, SS2D | PatchEmbed | PatchMerging):
                module.scan_backend = name

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters to exclude from weight decay: the scan's A and D, biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith(("A_log", ".D", "dt_bias"))}

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(
                f"expected a batch of images (B, {self.config.in_chans}, H, W), got {tuple(x.shape)}; "
                "model.predict(...) takes files and single images"
            )
        least = self.config.min_size
        if min(x.shape[2:]) < least:
            raise ValueError(f"images must be at least {least}x{least}, got {x.shape[2]}x{x.shape[3]}; resize them")


def _init_weights(module: nn.Module) -> None:
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # see `reset_scan_parameters`
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
