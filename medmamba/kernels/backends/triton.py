"""Backend "triton": GPU kernels compiled at first use by Triton, which comes with PyTorch's CUDA builds.

No tensor is permuted, and none of size (B, K, L, C, N) is written to memory. `triton/forward.py` and
`triton/backward.py` hold the kernels, `triton/plan.py` the launch parameters.

Both scans become one of (B, K, L, C) views: K directions over the same pixels in 2-D, K groups of channels in 1-D.
"""

import importlib.util
import math
import os

import torch
from torch import Tensor

from ..triton.launch import backward, forward, sum_parts
from ..triton.plan import CHUNK, Plan
from .base import Backend, Gradients1d, Gradients2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = math.log2(math.e)


def _too_old(device: int) -> str | None:
    if torch.version.hip is not None or _interpreted():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (7, 0):
        return None
    return f"Triton needs a GPU of compute capability 7.0, cuda:{device} has {major}.{minor}; use backend 'torch'"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _rows(t: Tensor) -> Tensor:
    """Returns t, copied unless its channels are contiguous and aligned for loads of four."""
    four = math.gcd(t.shape[-1], 4)
    steps = [stride for stride, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    aligned = t.data_ptr() % (four * t.element_size()) == 0 and all(s % four == 0 for s in steps)
    if aligned and (t.stride(-1) == 1 or t.shape[-1] == 1):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _lines_2d(x: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x as (B, K, L, C) and proj as (B, K, L, P), without a copy if their channels are contiguous."""
    xs = _rows(x).flatten(1, 2).unsqueeze(1).expand(-1, proj.shape[3], -1, -1)
    projs = proj if proj.stride(-1) == 1 else proj.contiguous()
    return xs, projs.flatten(1, 2).transpose(1, 2)


def _parts(xs: Tensor, plan: Plan | None) -> Tensor:
    """Allocates (B, K, L, C) terms that are to be summed over K."""
    half = plan is not None and plan.half_sums
    return xs.new_empty(xs.shape, dtype=xs.dtype if half else torch.float32)


def _token_rows(t: Tensor, groups: int) -> Tensor:
    """Converts (B, C, L) to (B, G, L, C/G), channels last in memory."""
    return t.transpose(1, 2).contiguous().unflatten(2, (groups, -1)).transpose(1, 2)


def _channels_first(t: Tensor) -> Tensor:
    """Inverts `_token_rows`."""
    return t.transpose(2, 3).flatten(1, 2).contiguous()


def _lines_1d(u, delta, A, B, C, D, delta_bias):
    """Returns u and delta as (B, G, L, C/G), B and C as proj (B, G, L, 2N), and the arguments of `_table` by group."""
    G = B.shape[1]
    proj = torch.cat((B, C), dim=2).permute(0, 3, 1, 2).contiguous().transpose(1, 2)
    A, D, delta_bias = (t.unflatten(0, (G, -1)) for t in (A, D, delta_bias))
    return _token_rows(u, G), _token_rows(delta, G), proj, (A, A.new_empty(A.shape[:2] + (0,)), delta_bias, D)


def _table(A: Tensor, dt_weight: Tensor, dt_bias: Tensor, D: Tensor) -> Tensor:
    """Returns all parameters as (K, N + R + 2, C) float32; A for exp2: exp(dt * A) = exp2(dt * (A * log2(e)))."""
    rows = ((A.float() * LOG2E).mT, dt_weight.float().mT, dt_bias.float().unsqueeze(1), D.float().unsqueeze(1))
    return torch.cat(rows, dim=1).contiguous()


def _split_table(dtable: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Returns the gradients of A, dt_weight, dt_bias and D from that of the table, in which log2(e) is factored out."""
    A, dt_weight, dt_bias, D = parameters
    dA, dweight, dbias, dD = dtable.split((A.shape[2], dt_weight.shape[2], 1, 1), dim=1)
    grads = (dA.mT, dweight.mT, dbias.squeeze(1), dD.squeeze(1))
    # Copies: with K = 1, the slices are contiguous views that would share the memory of the table.
    return [
        g.to(p.dtype, copy=True, memory_format=torch.contiguous_format) for g, p in zip(grads, parameters, strict=True)
    ]


class TritonBackend(Backend):
    """Runs the Triton kernels of `kernels/triton`. `plan` overrides the launch, for tuning."""

    name = "triton"
    chunk = CHUNK

    def why_not(self) -> str | None:
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

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"the Triton kernels compute in float32 and take no {dtype}; use backend 'torch'"
        if device.type == "cpu" and _interpreted():
            return None
        if device.type != "cuda":
            return f"the Triton kernels run on CUDA GPUs, the tensors are on {device.type}"
        return _too_old(device.index if device.index is not None else torch.cuda.current_device())

    def scan_2d(
        self,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
        plan: Plan | None = None,
    ) -> Tensor:
        B, H, W, C = x.shape
        xs, projs = _lines_2d(x, proj)
        ys = _parts(xs, plan)  # what each direction adds to y
        with torch.cuda.device_of(x):
            table = _table(A, dt_weight, dt_bias, D)
            forward(xs, None, projs, table, A.shape[2], (H, W), True, plan, ys, states if states.numel() else None)
            return sum_parts(ys.view(B, -1, H * W * C), x.dtype).view(B, H, W, C)

    def scan_2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
        plan: Plan | None = None,
    ) -> Gradients2d:
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

    def scan_1d(
        self,
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
        G, N = B.shape[1:3]
        us, deltas, projs, grouped = _lines_1d(u, delta, A, B, C, D, delta_bias)
        ys = torch.empty_like(us)  # (B, G, L, C/G), with the memory layout of us
        last = u.new_empty((u.shape[0], G, N, u.shape[1] // G), dtype=torch.float32)
        with torch.cuda.device_of(u):
            forward(us, deltas, projs, _table(*grouped), N, None, softplus, plan, ys, None, last)
        return _channels_first(ys), last.mT.reshape(u.shape[0], -1, N).contiguous()

    def scan_1d_backward(
        self,
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
    ) -> Gradients1d:
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


BACKEND = TritonBackend()
