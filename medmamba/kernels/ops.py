"""The scan as PyTorch operators: `torch.ops.medmamba.scan_2d` and `torch.ops.medmamba.scan_1d`.

One node each for autograd, torch.compile and torch.export, whatever backend does the work.
"""

from types import ModuleType
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import load_backend, resolve_backend, states_chunk
from .reference import compute_dtype


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Four-direction selective scan over a feature map; see `reference.scan_2d` for the definition.

    Args:
        x: (B, H, W, C) feature map, any float dtype. The recurrence runs in float32 at least.
        proj: (B, H, W, 4, R + 2N) per pixel and direction: step size code, B and C.
        dt_weight: (4, C, R). dt_bias: (4, C). A: (4, C, N), negative. D: (4, C).
        backend: "native", "cuda", "triton", "mamba_ssm", "torch", or None for MEDMAMBA_SCAN, else the fastest there is.

    Returns:
        (B, H, W, C) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit. BackendError: a backend that cannot run here.
    """
    batch, height, width, channels = x.shape
    K, _, R = dt_weight.shape
    N = A.shape[-1]
    expected = {
        "proj": (proj, (batch, height, width, 4, R + 2 * N)),
        "dt_weight": (dt_weight, (4, channels, R)),
        "dt_bias": (dt_bias, (4, channels)),
        "A": (A, (4, channels, N)),
        "D": (D, (4, channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
    # An exported program chooses where it runs, not where it was made. PyTorch 2.11 takes torch.compile for an export.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    name = "auto" if exporting else resolve_backend(x.device, x.dtype, backend)
    tensors = (x, proj, dt_weight, dt_bias, A, D)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # How often states are saved shapes an output, so it is an argument: a compiled graph kept on disk by another
    # version must not be taken for this one's.
    chunk = states_chunk(name) if needs_grad and name != "auto" else 0
    return torch.ops.medmamba.scan_2d(*tensors, name, chunk)[0]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *args,
    return_last_state: Literal[False] = False,
    **kwargs,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *args, return_last_state: Literal[True], **kwargs
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    backend=None,
):
    """Drop-in for `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, on any device.

    Args:
        u: (B, C, L). delta: (B, C, L). A: (C, N), real.
        B, C: (C, N) constant, or (B, N, L), or (B, G, N, L) grouped: group g serves C/G consecutive channels.
        D: (C,) skip. z: (B, C, L) gate, y * silu(z). delta_bias: (C,). delta_softplus: apply softplus to delta + bias.
        return_last_state: also return the state after the last token, (B, C, N); it carries no gradient.
        backend: as in `selective_scan_2d`.

    Returns:
        y (B, C, L) in the dtype of u, or (y, last_state).

    Raises:
        ValueError: complex A, or shapes that do not fit.
    """
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(
            f"u and delta must both be (batch, channels, length); got {tuple(u.shape)}, {tuple(delta.shape)}"
        )
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise ValueError("complex A, B or C are not supported; MedMamba, VMamba and VM-UNet use real ones")
    batch, channels, length = u.shape
    N = A.shape[-1]
    B = _grouped(B, "B", batch, channels, N, length)
    C = _grouped(C, "C", batch, channels, N, length)
    if B.shape[1] != C.shape[1]:
        groups = channels if channels in (B.shape[1], C.shape[1]) else max(B.shape[1], C.shape[1])
        B, C = (t.repeat_interleave(groups // t.shape[1], dim=1) for t in (B, C))
    if tuple(A.shape) != (channels, N):
        raise ValueError(f"A has shape {tuple(A.shape)}, expected {(channels, N)} (channels of u, state size)")
    for label, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {(channels,)}")
    # The operator takes tensors only; a zero skip and a zero bias are the same function.
    dtype = compute_dtype(u.dtype)
    D = u.new_zeros(channels, dtype=dtype) if D is None else D
    delta_bias = u.new_zeros(channels, dtype=dtype) if delta_bias is None else delta_bias
    name = resolve_backend(u.device, u.dtype, backend)
    y, last_state = torch.ops.medmamba.scan_1d(u, delta, A, B, C, D, delta_bias, bool(delta_softplus), name)
    if z is not None:
        y = (y * F.silu(z.to(dtype))).to(y.dtype)
    return (y, last_state.detach()) if return_last_state else y


def _grouped(tensor: Tensor, label: str, batch: int, channels: int, N: int, length: int) -> Tensor:
    """Brings B or C to (batch, groups, N, length)."""
    if tuple(tensor.shape) == (channels, N):
        return tensor.unsqueeze(0).unsqueeze(-1).expand(batch, channels, N, length)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    good = tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (batch, N, length)
    if not good or channels % tensor.shape[1]:
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}; expected ({channels}, {N}), ({batch}, {N}, {length}) or "
            f"({batch}, groups, {N}, {length}) with groups dividing {channels}"
        )
    return tensor


# --- scan_2d --------------------------------------------------------------------------------------------------------


def _backend(name: str, x: Tensor) -> ModuleType:
    return load_backend(resolve_backend(x.device, x.dtype) if name == "auto" else name)


def _without_autocast(x: Tensor) -> torch.autocast:
    """A backend decides itself what is computed in which type; its float32 must not become bfloat16 underneath."""
    return torch.autocast(x.device.type, enabled=False)


def _states_shape(x: Tensor, A: Tensor, chunk: int) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return (batch, A.shape[0], -(-(height * width) // chunk), A.shape[2], channels)


@torch.library.custom_op("medmamba::scan_2d", mutates_args=())
def _scan_2d(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    backend: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    module = _backend(backend, x)
    if chunk not in (0, module.CHUNK):
        raise ValueError(f"backend {backend!r} saves a state every {module.CHUNK} tokens, not every {chunk}")
    shape = _states_shape(x, A, chunk) if chunk else (0,)
    states = x.new_empty(shape, dtype=torch.float32)
    with _without_autocast(x):
        return module.scan_2d_forward(x, proj, dt_weight, dt_bias, A, D, states), states


@_scan_2d.register_fake
def _(x, proj, dt_weight, dt_bias, A, D, backend, chunk):
    shape = _states_shape(x, A, chunk) if chunk else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("medmamba::scan_2d_backward", mutates_args=())
def _scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _backend(backend, x)
    with _without_autocast(x):
        if module.CHUNK and not states.numel():  # an exported program saves none in its forward
            states = x.new_empty(_states_shape(x, A, module.CHUNK), dtype=torch.float32)
            module.scan_2d_forward(x, proj, dt_weight, dt_bias, A, D, states)
        return module.scan_2d_backward(dy, x, proj, dt_weight, dt_bias, A, D, states)


@_scan_2d_backward.register_fake
def _(dy, x, proj, dt_weight, dt_bias, A, D, states, backend):
    return tuple(t.new_empty(t.shape) for t in (x, proj, dt_weight, dt_bias, A, D))


def _scan_2d_setup(ctx, inputs, output):
    *tensors, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)  # else PyTorch fills a tensor as large as the states with zeros, to no use
    ctx.save_for_backward(*tensors, output[1])


def _scan_2d_grad(ctx, dy, _):
    *tensors, states = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    return *torch.ops.medmamba.scan_2d_backward(dy, *tensors, states, ctx.backend), None, None


_scan_2d.register_autograd(_scan_2d_grad, setup_context=_scan_2d_setup)


# --- scan_1d --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("medmamba::scan_1d", mutates_args=())
def _scan_1d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _without_autocast(u):
        return load_backend(backend).scan_1d_forward(u, delta, A, B, C, D, delta_bias, softplus)


@_scan_1d.register_fake
def _(u, delta, A, B, C, D, delta_bias, softplus, backend):
    state = u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=compute_dtype(u.dtype))
    return u.new_empty(u.shape), state


@torch.library.custom_op("medmamba::scan_1d_backward", mutates_args=())
def _scan_1d_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _without_autocast(u):
        return load_backend(backend).scan_1d_backward(dy, u, delta, A, B, C, D, delta_bias, softplus)


@_scan_1d_backward.register_fake
def _(dy, u, delta, A, B, C, D, delta_bias, softplus, backend):
    return tuple(t.new_empty(t.shape) for t in (u, delta, A, B, C, D, delta_bias))


def _scan_1d_setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _scan_1d_grad(ctx, dy, _):
    grads = torch.ops.medmamba.scan_1d_backward(dy, *ctx.saved_tensors, ctx.softplus, ctx.backend)
    return *grads, None, None


_scan_1d.register_autograd(_scan_1d_grad, setup_context=_scan_1d_setup)
