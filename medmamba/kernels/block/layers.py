"""What surrounds the scan in a block. The plain PyTorch expressions here define it; where the scan runs on the backend
"cuda", the kernels of `fused_ops.py` and `conv_ops.py` compute the same, values and gradients, in fewer passes over
memory.

The expressions run everywhere else: on CPUs and other backends, while torch.compile or torch.export trace (a compiler
fuses them itself), in float64, for channels that are no multiple of 4, under `torch.func` and forward-mode derivatives,
and where a module that the kernels would pass by has hooks or is not the layer that is expected. `backend` is what
`selective_scan_2d` takes; so `model.set_scan_backend("triton")`, or MEDMAMBA_SCAN, turns the kernels off.

Under autocast the expressions return the norms in float32, which the linear layer behind rounds to 16 bits; the kernels
round the same numbers to the type of the map.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends.cuda import TYPES
from ..dispatch import resolve_backend, transformed
from . import training_conv as conv_ops
from .training import MAX_CHANNELS, ConvSilu, GateProject, Mix, Norm, SplitNorm


def split_norm(x: Tensor, norm: nn.LayerNorm, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The beginning of a block: x (B, H, W, C) to x, for the residual connection, its left half and the layer norm of
    its right half, (B, H, W, C/2) each. Using the x that is returned spares adding up its gradients."""
    if _kernels_run(x, backend) and _takes_norm(norm, x, x.shape[-1] // 2):
        return SplitNorm.apply(x, norm.weight, norm.bias, norm.eps)
    left, right = x.chunk(2, dim=-1)
    return x, left, norm(right)


def conv_branch(x: Tensor, branch: nn.Sequential, backend: str | None = None) -> Tensor:
    """branch, layers of (B, C, H, W), of x (B, H, W, C): a batch norm, and 3x3 convolution, batch norm and ReLU twice,
    1x1 convolution, ReLU."""
    if _kernels_run(x, backend) and _takes_branch(branch, x):
        parameters: list[nn.Parameter] = []
        norms = []
        for layer in branch:
            parameters += layer.parameters(recurse=False)  # none of a ReLU
            if isinstance(layer, nn.BatchNorm2d):
                norms.append(conv_ops.Norm(layer.running_mean, layer.running_var, layer.momentum, layer.eps))
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.add_(1)
        return conv_ops.ConvBranch.apply(x, norms, *parameters)
    return branch(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def conv_silu(wide: Tensor, conv: nn.Conv2d, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """wide (B, H, W, 2C) to silu(conv(left half)), where conv is 3x3 and depthwise, and its right half, a view: both
    (B, H, W, C)."""
    if _kernels_run(wide, backend) and _takes_conv(conv, wide):
        return ConvSilu.apply(wide, conv.weight, conv.bias)
    x, gate = wide.chunk(2, dim=-1)
    return F.silu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), gate


def project(x: Tensor, x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the scan needs of each pixel, for all directions: x (B, H, W, C) by x_proj (K, R + 2N, C) to (B, H, W, K,
    R + 2N), and dt_weight (K, C, R). On GPUs both with R up to a multiple of 4, see `pad_rank`."""
    if _prefers_fours(x):
        x_proj, dt_weight = pad_rank(x_proj, dt_weight)
    return F.linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2]), dt_weight


def pad_rank(x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same scan with zeros in the step size code up to a multiple of 4: then matrix products and loads are aligned.
    x_proj (K, R + 2N, C) and dt_weight (K, C, R)."""
    R = dt_weight.shape[2]
    if R % 4 == 0:
        return x_proj, dt_weight
    code, vectors = x_proj[:, :R], x_proj[:, R:]
    return torch.cat((F.pad(code, (0, 0, 0, -R % 4)), vectors), dim=1), F.pad(dt_weight, (0, -R % 4))


def gate_project(y: Tensor, gate: Tensor, norm: nn.LayerNorm, linear: nn.Linear, backend: str | None = None) -> Tensor:
    """linear(norm(y) * silu(gate)): y and gate (B, H, W, C), linear without bias to (B, H, W, C')."""
    fits = _kernels_run(y, backend) and _takes_norm(norm, y, y.shape[-1]) and _like(gate, y, y.shape)
    if fits and _takes_linear(linear, y):
        return GateProject.apply(y, gate, norm.weight, norm.bias, norm.eps, linear.weight)
    return linear(norm(y) * F.silu(gate))


def mix(x: Tensor, left: Tensor, right: Tensor, factors: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The end of a block: x (B, H, W, C) plus its branches left and right, (B, H, W, C/2) each, their channels in turn.

    Args:
        factors: float32 (B, 1, 1, 1), of the right branch of each image; None: 1.
    """
    if _kernels_run(x, backend) and _takes_branches(x, left, right, factors):
        return Mix.apply(x, left, right, factors)
    if factors is not None:
        right = (right * factors).to(right.dtype)
    return x + torch.stack((left, right), dim=-1).flatten(-2)


def channel_norm(x: Tensor, norm: nn.LayerNorm, backend: str | None = None) -> Tensor:
    """The layer norm of each pixel of x (B, H, W, C), in the dtype of x also under autocast."""
    if _kernels_run(x, backend) and _takes_norm(norm, x, x.shape[-1]):
        return Norm.apply(x, norm.weight, norm.bias, norm.eps, False)
    return norm(x).to(x.dtype)


def merge_norm(x: Tensor, norm: nn.LayerNorm, backend: str | None = None) -> Tensor:
    """The layer norm of each 2x2 patch of pixels: (B, H, W, C) to (B, H/2, W/2, 4C), in it pixels (0,0), (1,0), (0,1),
    (1,1). An odd last row or column is dropped."""
    B, H, W, C = x.shape
    if _kernels_run(x, backend) and C % 4 == 0 and H > 1 and W > 1 and _takes_norm(norm, x, 4 * C):
        return Norm.apply(x, norm.weight, norm.bias, norm.eps, True)
    x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
    return norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3))  # (B, H/2, W/2, 4C)


# --- when the kernels run -------------------------------------------------------------------------------------------


def observed(module: nn.Module) -> bool:
    """Whether somebody looks at what this module in particular takes or returns. A tracer always does."""
    return torch.compiler.is_compiling() or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _kernels_run(x: Tensor, backend: str | None) -> bool:
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype not in TYPES:
        return False  # subclasses: whoever traces or distributes has its own way with operators, not with addresses
    if torch.jit.is_tracing() or transformed():
        return False
    return _on_cuda_backend(x, backend)


def _prefers_fours(x: Tensor) -> bool:
    return x.is_cuda


def _on_cuda_backend(x: Tensor, backend: str | None) -> bool:
    return x.is_cuda and _resolve(x.device, x.dtype, backend, os.environ.get("MEDMAMBA_SCAN")) == "cuda"


# To resolve asks CUDA whether it is there, which takes longer than to launch a kernel.
@functools.cache
def _resolve(device: torch.device, dtype: torch.dtype, backend: str | None, default: str | None) -> str:
    return resolve_backend(device, dtype, backend)


def _takes_norm(norm: nn.LayerNorm, x: Tensor, channels: int) -> bool:
    fits = channels % 4 == 0 and channels <= MAX_CHANNELS and x.ndim == 4 and x.numel() > 0
    return fits and type(norm) is nn.LayerNorm and norm.normalized_shape == (channels,) and _takes_parameters(norm, x)


def _takes_conv(conv: nn.Conv2d, wide: Tensor) -> bool:
    channels = wide.shape[-1] // 2
    if wide.ndim != 4 or channels % 4 or wide.numel() == 0 or type(conv) is not nn.Conv2d:
        return False
    if wide.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):  # the expression would return 16 bits
        return False
    plain = conv.stride == conv.padding == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and conv.weight.shape == (channels, 1, 3, 3) and _takes_parameters(conv, wide)


def _takes_linear(linear: nn.Linear, x: Tensor) -> bool:
    if type(linear) is not nn.Linear or linear.bias is not None or linear.in_features != x.shape[-1]:
        return False
    return _computes_in(x, linear.weight) and linear.weight.device == x.device and not observed(linear)


def _computes_in(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch would multiply x by this weight in the type of x."""
    device = x.device.type
    return x.dtype == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)


BRANCH = (nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.ReLU)


def _takes_branch(branch: nn.Sequential, x: Tensor) -> bool:
    C = x.shape[-1]
    if x.ndim != 4 or C % 4 or C > conv_ops.MAX_CHANNELS or x.numel() < 2 * C or observed(branch):
        return False
    if tuple(map(type, branch)) != BRANCH or any(map(observed, branch)):
        return False
    for layer in branch:
        if isinstance(layer, nn.BatchNorm2d):
            running = layer.running_mean, layer.running_var
            if not layer.training or layer.momentum is None or layer.num_features != C:
                return False
            if any(t is None or t.dtype != torch.float32 or t.device != x.device for t in running):
                return False
        elif isinstance(layer, nn.Conv2d):
            size = layer.kernel_size[0]
            if layer.weight.shape != (C, C, size, size) or size not in (1, 3) or layer.padding_mode != "zeros":
                return False
            if (layer.stride, layer.dilation, layer.padding) != ((1, 1), (1, 1), (size // 2, size // 2)):
                return False
            if not _computes_in(x, layer.weight):
                return False
    return all(_takes_parameters(branch[i], x) for i in (0, 1, 2, 4, 5, 7))


def _takes_branches(x: Tensor, left: Tensor, right: Tensor, factors: Tensor | None) -> bool:
    half = (*x.shape[:-1], x.shape[-1] // 2)
    fits = x.shape[-1] % 8 == 0 and x.numel() > 0 and _like(left, x, half) and _like(right, x, half)
    if factors is not None:
        fits = fits and factors.shape == (len(x), 1, 1, 1) and factors.dtype == torch.float32
        fits = fits and factors.device == x.device and not factors.requires_grad
    return fits


def _like(t: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Kernels get addresses: what does not fit is for the expression to complain about."""
    return t.shape == shape and t.dtype == x.dtype and t.device == x.device


def _takes_parameters(module: nn.Module, x: Tensor) -> bool:
    present = module.weight is not None and module.bias is not None
    return present and module.weight.device == x.device and not observed(module)
