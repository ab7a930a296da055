"""Conditions under which a kernel of this package may replace a piece of the network.

The kernels run where the scan runs on the backend "cuda" and a predicate `fits_...` accepts the arguments of the piece.
The plain PyTorch of `model/network.py` runs in all other cases: on CPUs and with other backends (so
`model.set_scan_backend("triton")` or MEDMAMBA_SCAN turns the kernels off), while torch.compile or torch.export trace (a
compiler fuses by itself), under modes of PyTorch that see each operation (FlopCounterMode, selective checkpointing), in
float64, for channel counts that are no multiple of 4, under `torch.func` and forward-mode derivatives, and where a
module has hooks or is not of the expected type.

Under autocast, the plain norms return float32, which the next linear layer rounds to 16 bits; the kernels round the
same numbers to the dtype of the map.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends import cuda as cuda_backend
from ..backends.cuda import TYPES
from ..dispatch import resolve_backend, transformed

MAX_NORM_CHANNELS = 2048  # a warp keeps a row in its registers
MAX_BRANCH_CHANNELS = 1024
MAX_IMAGE_NUMBERS = 2**31  # of a batch of images, counted in 32 bits
WITH_MEMORY = {Tensor, nn.Parameter}  # subclasses, such as quantised weights, may have no address


def kernels_run(x: Tensor, backend: str | None) -> bool:
    """Returns whether kernels may run on x at all, whichever piece of the network is asked for."""
    if torch.compiler.is_compiling() or not _on_cuda_backend(x, backend):
        return False
    # Subclasses of Tensor and modes trace, distribute or keep what operators return; a kernel, which takes addresses,
    # would bypass them.
    seen = type(x) is not Tensor or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing()
    return not seen and x.dtype in TYPES and not transformed()


def observed(*modules: nn.Module) -> bool:
    """Returns whether one of the modules has hooks or a `forward` of its own, or a tracer is active."""
    return torch.compiler.is_compiling() or _has_any_global_hook() or any(map(_hooked, modules))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as libraries that watch or offload layers replace it
    )


# --- one predicate per piece, with the arguments of the piece -------------------------------------------------------


def fits_embed_patches(x: Tensor, conv: nn.Conv2d) -> bool:
    if type(conv) is not nn.Conv2d or conv.bias is None or observed(conv) or conv.padding_mode != "zeros":
        return False
    size = conv.kernel_size[0]
    if conv.kernel_size != (size, size) or conv.stride != (size, size) or conv.padding not in ((0, 0), "valid"):
        return False
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.weight.device == conv.bias.device == x.device
    if type(conv.weight) not in WITH_MEMORY or type(conv.bias) not in WITH_MEMORY:
        return False
    if x.ndim != 4 or not x.numel() or x.shape[1] != conv.in_channels or min(x.shape[2:]) < size or not plain:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    dtype = computes_in(conv.weight)
    same = x.dtype == conv.weight.dtype == conv.bias.dtype or torch.is_autocast_enabled(x.device.type)
    return same and dtype in TYPES and x.numel() < MAX_IMAGE_NUMBERS


def fits_split_norm(x: Tensor, norm: nn.LayerNorm) -> bool:
    return _takes_norm(norm, x, x.shape[-1] // 2)


def fits_channel_norm(x: Tensor, norm: nn.LayerNorm) -> bool:
    return _takes_norm(norm, x, x.shape[-1])


def fits_merge_norm(x: Tensor, norm: nn.LayerNorm) -> bool:
    _, H, W, C = x.shape
    return C % 4 == 0 and H > 1 and W > 1 and _takes_norm(norm, x, 4 * C)


def fits_conv_silu(wide: Tensor, conv: nn.Conv2d) -> bool:
    channels = wide.shape[-1] // 2
    if wide.ndim != 4 or channels % 4 or wide.numel() == 0 or type(conv) is not nn.Conv2d:
        return False
    if wide.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):  # the convolution would return 16 bits
        return False
    plain = conv.stride == conv.padding == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and conv.weight.shape == (channels, 1, 3, 3) and _takes_parameters(conv, wide)


def fits_gate_project(y: Tensor, gate: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> bool:
    return _takes_norm(norm, y, y.shape[-1]) and _like(gate, y, y.shape) and _takes_linear(linear, y)


def fits_mix(x: Tensor, left: Tensor, right: Tensor, drop_path: nn.Module) -> bool:
    half = (*x.shape[:-1], x.shape[-1] // 2)
    fits = x.shape[-1] % 8 == 0 and x.numel() > 0 and _like(left, x, half) and _like(right, x, half)
    return fits and hasattr(drop_path, "keep_mask") and not observed(drop_path)


LAYERS = (nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.ReLU)


def fits_conv_branch(x: Tensor, branch: nn.Sequential) -> bool:
    C = x.shape[-1]
    if x.ndim != 4 or C % 4 or C > MAX_BRANCH_CHANNELS or x.numel() < 2 * C or observed(branch):
        return False
    # Not by `for layer in branch` and `layer.weight`, whose look-ups cost more than the conditions.
    layers = tuple(branch._modules.values())
    if tuple(map(type, layers)) != LAYERS or any(map(_hooked, layers)):  # type: ignore[arg-type]
        return False
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    weight: Any
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            if not layer.training or layer.momentum is None or layer.num_features != C:
                return False
            buffers = layer._buffers
            for name in ("running_mean", "running_var"):
                t = buffers[name]
                if t is None or t.dtype != torch.float32 or t.device != x.device:
                    return False
            tracked = buffers["num_batches_tracked"]
            if tracked is not None and (tracked.dtype != torch.int64 or tracked.device != x.device):
                return False
        elif isinstance(layer, nn.Conv2d):
            size, weight = layer.kernel_size[0], own_parameter(layer, "weight")
            if weight is None or weight.shape != (C, C, size, size) or size not in (1, 3):
                return False
            if layer.padding_mode != "zeros" or x.dtype != (autocast or weight.dtype):
                return False
            if (layer.stride, layer.dilation, layer.padding) != ((1, 1), (1, 1), (size // 2, size // 2)):
                return False
        else:
            continue
        weight, bias = own_parameter(layer, "weight"), own_parameter(layer, "bias")
        if type(weight) not in WITH_MEMORY or type(bias) not in WITH_MEMORY or weight.device != x.device:
            return False
    return True


def own_parameter(layer: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter of a layer, quicker than `getattr`; also where it is a plain tensor.

    The copies of a module in nn.DataParallel and the layers that FSDP has flattened hold plain tensors.
    """
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name)


class Like(NamedTuple):
    """What predicates ask of a map that is computed only later."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def fits_block(x: Tensor, block: Any) -> bool:
    """Of an `SSConvSSM` whose scan branch is an `SS2D`: whether all of its pieces have kernels and none is observed."""
    modules = block._modules  # quicker than through the attributes of modules, as below
    branch, ssm, hook, drop_path = (modules[name] for name in ("conv", "ssm", "ssm_map", "drop_path"))
    if x.ndim != 4 or x.shape[-1] % 8 or not x.numel() or type(hook) is not nn.Identity:
        return False
    layers = ssm._modules
    in_proj, conv, out_norm, out_proj = (layers[name] for name in ("in_proj", "conv", "out_norm", "out_proj"))
    if observed(branch, ssm, hook, drop_path, in_proj, conv):
        return False
    of_scan: Any = (own_parameter(ssm, name) for name in ("x_proj", "dt_weight", "dt_bias", "A_log", "D"))
    x_proj, dt_weight, dt_bias, A_log, D = of_scan
    rows, half = x.shape[:-1], x.shape[-1] // 2
    K, C, R = dt_weight.shape
    N = A_log.shape[-1]
    side: Any = Like((*rows, half), x.dtype, x.device)  # a branch of the block
    inner: Any = Like((*rows, C), x.dtype, x.device)
    wide: Any = Like((*rows, 2 * C), x.dtype, x.device)
    w_in: Any = own_parameter(in_proj, "weight")
    w_out: Any = own_parameter(out_proj, "weight")
    matrices = (
        (x_proj, (K, R + 2 * N, C)), (dt_weight, (K, C, R)), (dt_bias, (K, C)), (A_log, (K, C, N)), (D, (K, C)),
        (w_in, (2 * C, half)), (w_out, (half, C)),
    )  # fmt: skip
    return (
        hasattr(drop_path, "keep_mask")
        and K == cuda_backend.K
        and all(p.shape == shape and p.device == x.device and p.is_floating_point() for p, shape in matrices)
        and all([type(p) in WITH_MEMORY for p, _ in matrices])  # noqa: C419
        and x_proj.dtype in TYPES
        and cuda_backend.covers(rows[1] * rows[2], C, x.dtype.itemsize, R + -R % 4, N)
        and fits_split_norm(x, modules["norm"])
        and _takes_linear(in_proj, side)
        and _computes_in(inner, x_proj)
        and fits_conv_silu(wide, conv)
        and fits_gate_project(inner, inner, out_norm, out_proj)
        and fits_conv_branch(side, branch)
    )


# --- conditions that pieces share -----------------------------------------------------------------------------------


def _on_cuda_backend(x: Tensor, backend: str | None) -> bool:
    return x.is_cuda and _resolve(x.device, x.dtype, backend, os.environ.get("MEDMAMBA_SCAN")) == "cuda"


# Cached: resolving queries CUDA, which takes longer than a kernel launch.
@functools.cache
def _resolve(device: torch.device, dtype: torch.dtype, backend: str | None, default: str | None) -> str:
    return resolve_backend(device, dtype, backend)


def _takes_norm(norm: nn.LayerNorm, x: Tensor, channels: int) -> bool:
    fits = channels % 4 == 0 and channels <= MAX_NORM_CHANNELS and x.ndim == 4 and x.numel() > 0
    return fits and type(norm) is nn.LayerNorm and norm.normalized_shape == (channels,) and _takes_parameters(norm, x)


def _takes_linear(linear: nn.Linear, x: Tensor) -> bool:
    if type(linear) is not nn.Linear or own_parameter(linear, "bias") is not None or linear.in_features != x.shape[-1]:
        return False
    weight: Any = own_parameter(linear, "weight")
    return _computes_in(x, weight) and weight.device == x.device and not observed(linear)


def computes_in(weight: Tensor) -> torch.dtype:
    """Returns the dtype in which PyTorch would multiply by this weight: that of autocast, else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _computes_in(x: Tensor, weight: Tensor) -> bool:
    """Returns whether PyTorch would multiply x by this weight in the dtype of x."""
    return x.dtype == computes_in(weight)


def _like(t: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Returns whether a kernel, which takes addresses, may read t; PyTorch reports mismatches itself."""
    return t.shape == shape and t.dtype == x.dtype and t.device == x.device


def _takes_parameters(module: nn.Module, x: Tensor) -> bool:
    weight: Any = own_parameter(module, "weight")
    bias = own_parameter(module, "bias")
    plain = type(weight) in WITH_MEMORY and type(bias) in WITH_MEMORY
    return plain and weight.device == x.device and not observed(module)
