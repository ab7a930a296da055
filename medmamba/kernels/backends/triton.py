"""The scan on a GPU: kernels that Triton, which comes with PyTorch's CUDA builds, compiles when they first run.

Nothing is permuted, and nothing as large as (B, K, L, C, N) touches memory. `triton_forward.py` and
`triton_backward.py` hold the kernels, `triton_plan.py` decides how they are launched.
"""

import importlib.util
import math
import os

import torch
from torch import Tensor

from ..triton.launch import backward, forward, sum_parts
from ..triton.plan import CHUNK, Plan

__all__ = ["CHUNK", "scan_1d_backward", "scan_1d_forward", "scan_2d_backward", "scan_2d_forward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = math.log2(math.e)


def unavailable() -> str | None:
    """None where this backend can run, else the reason and its cure."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch for CUDA on Linux brings it (elsewhere: pip install triton)"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return (
            "PyTorch finds no CUDA GPU; check nvidia-smi, and that this PyTorch was built for CUDA "
            "(or set TRITON_INTERPRET=1 before starting Python to run the kernels on the CPU, slowly, for tests)"
        )
    reasons = [_too_old(device) for device in range(torch.cuda.device_count())]
    return reasons[0] if reasons and all(reasons) else None


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where this backend runs tensors of `dtype` on `device`, else the reason."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32 and take no {dtype}; use backend 'torch'"
    if device.type == "cpu" and _interpreted():
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA GPUs, the tensors are on {device.type}"
    return _too_old(device.index if device.index is not None else torch.cuda.current_device())


def _too_old(device: int) -> str | None:
    if torch.version.hip is not None or _interpreted():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (7, 0):
        return None
    return f"Triton needs a GPU of compute capability 7.0, cuda:{device} has {major}.{minor}; use backend 'torch'"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# --- the operators --------------------------------------------------------------------------------------------------
# Both become a scan of (B, K, L, C) views: in 2-D, K directions over the same pixels, in 1-D, K groups of channels.


def scan_2d_forward(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    plan: Plan | None = None,
) -> Tensor:
    """`reference.scan_2d`, contiguous.

    `states` is empty when no gradient is wanted. Else it has room for (B, K, ceil(L / CHUNK), N, C) in float32: the
    state before each chunk of tokens, in scan order. `plan` overrides the launch, for tuning.
    """
    B, H, W, C = x.shape
    xs, projs = _lines_2d(x, proj)
    ys = _parts(xs, plan)  # what each direction adds to y
    with torch.cuda.device_of(x):
        table = _table(A, dt_weight, dt_bias, D)
        forward(xs, None, projs, table, A.shape[2], (H, W), True, plan, ys, states if states.numel() else None)
        return sum_parts(ys.view(B, -1, H * W * C), x.dtype).view(B, H, W, C)


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, proj, dt_weight, dt_bias, A, D, each contiguous, in the shape and dtype of its tensor."""
    B, H, W, C = x.shape
    xs, projs = _lines_2d(x, proj)
    dys, _ = _lines_2d(dy, proj)
    dxs = _parts(xs, plan)
    with torch.cuda.device_of(x):
        table = _table(A, dt_weight, dt_bias, D)
        dproj, dtable = backward(dys, xs, None, projs, table, states, A.shape[2], (H, W), True, plan, dxs, None)
        dx = sum_parts(dxs.view(B, -1, H * W * C), x.dtype).view(B, H, W, C)
    dA, dweight, dbias, dD = _split_table(dtable, A, dt_weight, dt_bias, D)
    return dx, dproj.view(proj.shape), dweight, dbias, dA, dD


def scan_1d_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.scan_1d`: y (B, C, L) in the dtype of u, and the last state (B, C, N), both contiguous."""
    G, N = B.shape[1:3]
    us, deltas, projs, grouped = _lines_1d(u, delta, A, B, C, D, delta_bias)
    ys = torch.empty_like(us)  # (B, G, L, C/G), with the memory layout of us
    last = u.new_empty((u.shape[0], G, N, u.shape[1] // G), dtype=torch.float32)
    with torch.cuda.device_of(u):
        forward(us, deltas, projs, _table(*grouped), N, None, softplus, plan, ys, None, last)
    return _channels_first(ys), last.mT.reshape(u.shape[0], -1, N).contiguous()


def scan_1d_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    softplus: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for u, delta, A, B, C, D, delta_bias, each contiguous, in the shape and dtype of its tensor."""
    batch, G, N, length = B.shape
    us, deltas, projs, grouped = _lines_1d(u, delta, A, B, C, D, delta_bias)
    dys = _token_rows(dy, G)
    dus, ddeltas = torch.empty_like(us), torch.empty_like(deltas)
    states = u.new_empty((batch, G, -(-length // CHUNK), N, us.shape[-1]), dtype=torch.float32)
    with torch.cuda.device_of(u):
        table = _table(*grouped)
        forward(us, deltas, projs, table, N, None, softplus, None, None, states)
        dproj, dtable = backward(dys, us, deltas, projs, table, states, N, None, softplus, plan, dus, ddeltas)
    dA, _, dbias, dD = _split_table(dtable, *grouped)
    dB, dC = dproj.permute(0, 2, 3, 1).split(N, dim=2)  # (B, L, G, 2N) to (B, G, N, L) each
    grads = (_channels_first(dus), _channels_first(ddeltas), dA, dB, dC, dD, dbias)
    inputs = (u, delta, A, B, C, D, delta_bias)
    return tuple(g.to(t.dtype).reshape(t.shape).contiguous() for g, t in zip(grads, inputs, strict=True))  # type: ignore


# --- views and layouts ----------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """A view can stay one where neighbouring channels lie side by side, and aligned for loads of four of them."""
    four = math.gcd(t.shape[-1], 4)
    steps = [stride for stride, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    aligned = t.data_ptr() % (four * t.element_size()) == 0 and all(s % four == 0 for s in steps)
    if aligned and (t.stride(-1) == 1 or t.shape[-1] == 1):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _lines_2d(x: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """x as (B, K, L, C) and proj as (B, K, L, P), without a copy if their channels are contiguous in memory."""
    xs = _rows(x).flatten(1, 2).unsqueeze(1).expand(-1, proj.shape[3], -1, -1)
    projs = proj if proj.stride(-1) == 1 else proj.contiguous()
    return xs, projs.flatten(1, 2).transpose(1, 2)


def _parts(xs: Tensor, plan: Plan | None) -> Tensor:
    """Room for (B, K, L, C) that are to be summed over K."""
    half = plan is not None and plan.half_sums
    return xs.new_empty(xs.shape, dtype=xs.dtype if half else torch.float32)


def _token_rows(t: Tensor, groups: int) -> Tensor:
    """(B, C, L) to (B, G, L, C/G), channels last in memory."""
    return t.transpose(1, 2).contiguous().unflatten(2, (groups, -1)).transpose(1, 2)


def _channels_first(t: Tensor) -> Tensor:
    """The inverse of `_token_rows`."""
    return t.transpose(2, 3).flatten(1, 2).contiguous()


def _lines_1d(u, delta, A, B, C, D, delta_bias):
    """u and delta as (B, G, L, C/G), B and C as one proj (B, G, L, 2N), and what `_table` takes, per group."""
    G = B.shape[1]
    proj = torch.cat((B, C), dim=2).permute(0, 3, 1, 2).contiguous().transpose(1, 2)
    A, D, delta_bias = (t.unflatten(0, (G, -1)) for t in (A, D, delta_bias))
    return _token_rows(u, G), _token_rows(delta, G), proj, (A, A.new_empty(A.shape[:2] + (0,)), delta_bias, D)


def _table(A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """All parameters as (K, N + R + 2, C) float32. Decays are powers of 2: exp(dt * A) = exp2(dt * (A * log2(e)))."""
    rows = ((A.float() * LOG2E).mT, dt_weight.float().mT, dt_bias.float().unsqueeze(1), D.float().unsqueeze(1))
    return torch.cat(rows, dim=1).contiguous()


def _split_table(dtable: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Gradients of A, dt_weight, dt_bias and D from that of the table; the kernel has taken log2(e) out again."""
    A, dt_weight, dt_bias, D = parameters
    dA, dweight, dbias, dD = dtable.split((A.shape[2], dt_weight.shape[2], 1, 1), dim=1)
    grads = (dA.mT, dweight.mT, dbias.squeeze(1), dD.squeeze(1))
    # Copies, each in memory of its own: with K = 1, slices are contiguous as they are, and share the table's.
    return [
        g.to(p.dtype, copy=True, memory_format=torch.contiguous_format) for g, p in zip(grads, parameters, strict=True)
    ]
