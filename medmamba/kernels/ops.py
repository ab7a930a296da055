"""The scan as PyTorch operators: `torch.ops.medmamba.scan_2d` and `torch.ops.medmamba.scan_1d`.

Each is one node for autograd, torch.compile and torch.export, whichever backend runs. Backends implement first
derivatives in reverse mode. Second derivatives, forward mode and the transforms of `torch.func` differentiate the
reference implementation instead, which is slower and keeps every state.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backends.base import Backend
from .define import assume_constant_result, operator
from .dispatch import load_backend, resolve_backend, states_chunk, transformed
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
    """Scans a feature map in four directions; see `reference.scan_2d` for the definition.

    Args:
        x: (B, H, W, C) feature map, any float dtype. The recurrence runs in float32 at least.
        proj: (B, H, W, 4, R + 2N) per pixel and direction: step size code, B and C.
        dt_weight: (4, C, R). dt_bias: (4, C). A: (4, C, N), negative. D: (4, C).
        backend: "native", "cuda", "triton", "mamba_ssm", "torch"; None for MEDMAMBA_SCAN, else the fastest available.

    Returns:
        (B, H, W, C) in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        BackendError: the backend cannot run here.
    """
    if x.ndim != 4 or dt_weight.ndim != 3 or A.ndim != 3:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, dt_weight, A))
        raise ValueError(f"x must be (B, H, W, C), dt_weight (4, C, R) and A (4, C, N); got {shapes}")
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
    tensors = (x, proj, dt_weight, dt_bias, A, D)
    _check_tensors(("x", *expected), tensors)
    if transformed():
        with _without_autocast(x):
            return reference.scan_2d(*tensors)
    name = "auto" if _exporting() else resolve_backend(x.device, x.dtype, backend)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # An argument, because it determines the shape of an output: a compiled graph that another version cached on disk
    # must not match.
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
    """Replaces `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, on any device.

    Args:
        u: (B, C, L). delta: (B, C, L). A: (C, N), real.
        B, C: (C, N) constant, or (B, N, L), or (B, G, N, L) grouped: group g serves C/G consecutive channels.
        D: (C,) skip. z: (B, C, L) gate, y * silu(z). delta_bias: (C,). delta_softplus: apply softplus to delta + bias.
        return_last_state: also return the state after the last token, (B, C, N); it carries no gradient.
        backend: as in `selective_scan_2d`.

    Returns:
        y (B, C, L) in the dtype of u, or (y, last_state).

    Raises:
        ValueError: complex inputs, or shapes, dtypes or devices that do not match.

    VMamba's `selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus, ...)` has no z, so that its seventh
    argument differs. Pass arguments by name in its code:

    >>> def selective_scan_fn(u, delta, A, B, C, D=None, bias=None, softplus=True, oflex=True, backend=None):
    ...     y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=softplus)
    ...     return y.float() if oflex else y
    """
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(
            f"u and delta must both be (batch, channels, length); got {tuple(u.shape)}, {tuple(delta.shape)}"
        )
    if z is not None and z.shape != u.shape:
        hint = "; VMamba's function has no z: name the argument, delta_bias=..." if z.ndim == 1 else ""
        raise ValueError(f"z has shape {tuple(z.shape)}, expected that of u, {tuple(u.shape)}{hint}")
    if any(t is not None and t.is_complex() for t in (u, delta, A, B, C, D, z, delta_bias)):
        raise ValueError("complex numbers are not supported; MedMamba, VMamba and VM-UNet use real ones")
    batch, channels, length = u.shape
    if A.ndim != 2 or A.shape[0] != channels:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected ({channels}, N) (channels of u, state size)")
    N = A.shape[1]
    for label, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{label} has shape {tuple(tensor.shape)}, expected {(channels,)}")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    _check_tensors(names, (u, delta, A, B, C, D, z, delta_bias))
    B = _grouped(B, "B", batch, channels, N, length)
    C = _grouped(C, "C", batch, channels, N, length)
    groups = math.lcm(B.shape[1], C.shape[1])  # both divide the channels, and so does this
    B, C = (t if t.shape[1] == groups else t.repeat_interleave(groups // t.shape[1], dim=1) for t in (B, C))
    # The operator takes tensors only; a zero skip and a zero bias are the same function.
    dtype = compute_dtype(u.dtype)
    D = u.new_zeros(channels, dtype=dtype) if D is None else D
    delta_bias = u.new_zeros(channels, dtype=dtype) if delta_bias is None else delta_bias
    tensors = (u, delta, A, B, C, D, delta_bias)
    if transformed():
        with _without_autocast(u):
            y, last_state = reference.scan_1d(*tensors, bool(delta_softplus))
    else:
        name = "auto" if _exporting() else resolve_backend(u.device, u.dtype, backend)
        y, last_state = torch.ops.medmamba.scan_1d(*tensors, bool(delta_softplus), name)
    if z is not None:
        y = (y * F.silu(z.to(dtype))).to(y.dtype)
    return (y, last_state.detach()) if return_last_state else y


def _check_tensors(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Checks devices and dtypes, which kernels cannot, as they take addresses."""
    first = tensors[0]
    assert first is not None
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {names[0]} on {first.device}; move one of them")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, which is not a floating point type")


def _exporting() -> bool:
    """Returns whether a program is exported or traced, whose backend is chosen where it runs, not where it was made.

    Raises:
        RuntimeError: the export is that of torch.onnx, which cannot translate the scan.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if exporting and _exporting_onnx():
        raise RuntimeError(
            "torch.onnx.export does not know the selective scan: use medmamba.export.to_onnx(model, 'model.onnx'), "
            "or `medmamba export MODEL --to onnx --out model.onnx`"
        )
    # PyTorch 2.11 reports torch.compile as an export too.
    return exporting and not torch.compiler.is_dynamo_compiling()


@assume_constant_result  # otherwise torch.export traces it to False
def _exporting_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _grouped(tensor: Tensor, label: str, batch: int, channels: int, N: int, length: int) -> Tensor:
    """Reshapes B or C to (batch, groups, N, length)."""
    if tuple(tensor.shape) == (channels, N):
        return tensor.unsqueeze(0).unsqueeze(-1).expand(batch, channels, N, length)
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    good = tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (batch, N, length)
    if not good or not tensor.shape[1] or channels % tensor.shape[1]:
        raise ValueError(
            f"{label} has shape {tuple(tensor.shape)}; expected ({channels}, {N}), ({batch}, {N}, {length}) or "
            f"({batch}, groups, {N}, {length}) with groups dividing {channels}"
        )
    return tensor


# --- scan_2d --------------------------------------------------------------------------------------------------------


def _backend(name: str, x: Tensor) -> Backend:
    return load_backend(resolve_backend(x.device, x.dtype) if name == "auto" else name)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Disables autocast: a backend chooses its own dtypes, and its float32 must not become bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_zeros(t.shape) for t in tensors)


def _differentiable(scan: Callable[..., Tensor], tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor | None]:
    """Returns gradients of a plain PyTorch scan that are differentiable again; None for inputs that need none."""
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    with _without_autocast(dy):
        found = torch.autograd.grad(scan(*tensors), [tensors[i] for i in wanted], dy, create_graph=True)
    grads: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads


def _states_shape(x: Tensor, A: Tensor, chunk: int) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return (batch, A.shape[0], -(-(height * width) // chunk), A.shape[2], channels)


@operator("medmamba::scan_2d")
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
    implementation = _backend(backend, x)
    if chunk not in (0, implementation.chunk):
        raise ValueError(f"backend {backend!r} saves a state every {implementation.chunk} tokens, not every {chunk}")
    shape = _states_shape(x, A, chunk) if chunk else (0,)
    states = x.new_empty(shape, dtype=torch.float32)
    if not x.numel():
        return x.new_empty(x.shape), states
    with _without_autocast(x):
        return implementation.scan_2d(x, proj, dt_weight, dt_bias, A, D, states), states


@torch.library.register_fake("medmamba::scan_2d")
def _(x, proj, dt_weight, dt_bias, A, D, backend, chunk):
    shape = _states_shape(x, A, chunk) if chunk else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@operator("medmamba::scan_2d_backward")
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
    if not x.numel():
        return _zeros(x, proj, dt_weight, dt_bias, A, D)  # type: ignore[return-value]
    implementation = _backend(backend, x)
    with _without_autocast(x):
        if implementation.chunk and not states.numel():  # an exported program saves none in its forward pass
            states = x.new_empty(_states_shape(x, A, implementation.chunk), dtype=torch.float32)
            implementation.scan_2d(x, proj, dt_weight, dt_bias, A, D, states)
        return implementation.scan_2d_backward(dy, x, proj, dt_weight, dt_bias, A, D, states)


@torch.library.register_fake("medmamba::scan_2d_backward")
def _(dy, x, proj, dt_weight, dt_bias, A, D, states, backend):
    return tuple(t.new_empty(t.shape) for t in (x, proj, dt_weight, dt_bias, A, D))


def _scan_2d_setup(ctx, inputs, output):
    *tensors, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)  # otherwise PyTorch allocates zeros as large as the states
    ctx.save_for_backward(*tensors, output[1])


def _scan_2d_grad(ctx, dy, _):
    *tensors, states = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        return *_differentiable(reference.scan_2d, tensors, dy), None, None
    return *torch.ops.medmamba.scan_2d_backward(dy, *tensors, states, ctx.backend), None, None


torch.library.register_autograd("medmamba::scan_2d", _scan_2d_grad, setup_context=_scan_2d_setup)


# --- scan_1d --------------------------------------------------------------------------------------------------------


@operator("medmamba::scan_1d")
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
    if not u.numel():  # for length 0, the state is the initial one
        return u.new_empty(u.shape), u.new_zeros((*u.shape[:2], A.shape[1]), dtype=compute_dtype(u.dtype))
    with _without_autocast(u):
        return _backend(backend, u).scan_1d(u, delta, A, B, C, D, delta_bias, softplus)


@torch.library.register_fake("medmamba::scan_1d")
def _(u, delta, A, B, C, D, delta_bias, softplus, backend):
    state = u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=compute_dtype(u.dtype))
    return u.new_empty(u.shape), state


@operator("medmamba::scan_1d_backward")
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
    if not u.numel():
        return _zeros(u, delta, A, B, C, D, delta_bias)  # type: ignore[return-value]
    with _without_autocast(u):
        return _backend(backend, u).scan_1d_backward(dy, u, delta, A, B, C, D, delta_bias, softplus)


@torch.library.register_fake("medmamba::scan_1d_backward")
def _(dy, u, delta, A, B, C, D, delta_bias, softplus, backend):
    return tuple(t.new_empty(t.shape) for t in (u, delta, A, B, C, D, delta_bias))


def _scan_1d_setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.backend = inputs
    ctx.set_materialize_grads(False)  # otherwise PyTorch allocates zeros as large as the last state
    ctx.save_for_backward(*tensors)


def _scan_1d_grad(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    if torch.is_grad_enabled():

        def scan(*tensors: Tensor) -> Tensor:
            return reference.scan_1d(*tensors, ctx.softplus)[0]  # type: ignore[call-arg, arg-type]

        return *_differentiable(scan, ctx.saved_tensors, dy), None, None
    grads = torch.ops.medmamba.scan_1d_backward(dy, *ctx.saved_tensors, ctx.softplus, ctx.backend)
    return *grads, None, None


torch.library.register_autograd("medmamba::scan_1d", _scan_1d_grad, setup_context=_scan_1d_setup)
