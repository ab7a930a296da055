"""Backend "torch": the definition in plain PyTorch, for any device and float dtype.

The backward pass is explicit, because operators run below autograd; it is linear in length, and tests compare it with
autograd through `reference`. It recomputes the states, so a deep model needs the memory of one scan, not of all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import compute_dtype, from_directions, to_directions
from .base import Backend, Gradients1d, Gradients2d


def scan_tokens_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of `reference.scan_tokens` for x, dt, A, B, C; that for A keeps the leading dims of x."""
    h = x.new_zeros(x.shape[:-2] + A.shape[-2:])  # (..., C, N)
    states = []  # the state before each token
    for x_t, dt_t, B_t in zip(x.unbind(-2), dt.unbind(-2), B.unbind(-2), strict=True):
        states.append(h)
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)

    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dA, dh = torch.zeros_like(h), torch.zeros_like(h)
    for t in range(x.shape[-2] - 1, -1, -1):
        x_t, dt_t, dy_t = (s[..., t, :].unsqueeze(-1) for s in (x, dt, dy))  # (..., C, 1)
        B_t, C_t = (s[..., t, :].unsqueeze(-2) for s in (B, C))  # (..., 1, N)
        decay, before = torch.exp(dt_t * A), states.pop()
        dC[..., t, :] = (dy_t * (decay * before + dt_t * x_t * B_t)).sum(-2)
        dh = dh + dy_t * C_t
        dexponent = dh * decay * before
        dinput = (dh * B_t).sum(-1)
        dx[..., t, :] = dt_t.squeeze(-1) * dinput
        ddt[..., t, :] = (dexponent * A).sum(-1) + x_t.squeeze(-1) * dinput
        dB[..., t, :] = (dh * dt_t * x_t).sum(-2)
        dA = dA + dexponent * dt_t
        dh = decay * dh
    return dx, ddt, dA, dB, dC


def directions_to_maps(seqs: Tensor, height: int, width: int) -> Tensor:
    """Inverts `reference.to_directions`: (B, K, L, P) to (B, H, W, K, P)."""
    rows, cols = (height, width), (width, height)
    return torch.stack(
        (
            seqs[:, 0].unflatten(1, rows),
            seqs[:, 1].unflatten(1, cols).transpose(1, 2),
            seqs[:, 2].flip(1).unflatten(1, rows),
            seqs[:, 3].flip(1).unflatten(1, cols).transpose(1, 2),
        ),
        dim=3,
    )


class EagerBackend(Backend):
    """Runs the definition."""

    name = "torch"  # chunk = 0: the backward pass recomputes all states

    def why_not(self) -> str | None:
        return None

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating point type"

    def scan_2d(
        self, x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, states: Tensor
    ) -> Tensor:
        return reference.scan_2d(x, proj, dt_weight, dt_bias, A, D).contiguous()

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
    ) -> Gradients2d:
        B, H, W, C = x.shape
        K, _, R = dt_weight.shape
        N = A.shape[-1]
        dtype = compute_dtype(x.dtype)
        inputs = (x, proj, dt_weight, dt_bias, A, D)
        x, proj, dt_weight, dt_bias, A, D = (t.to(dtype) for t in inputs)
        xs = to_directions(x.unsqueeze(3).expand(B, H, W, K, C))  # (B, K, L, C)
        dys = to_directions(dy.to(dtype).unsqueeze(3).expand(B, H, W, K, C))  # (B, K, L, C)
        code, Bs, Cs = to_directions(proj).split((R, N, N), dim=-1)
        pre = code @ dt_weight.transpose(1, 2) + dt_bias.unsqueeze(1)  # (B, K, L, C)

        dxs, ddt, dA, dBs, dCs = scan_tokens_backward(dys, xs, F.softplus(pre), A, Bs, Cs)
        dpre = ddt * torch.sigmoid(pre)
        dx = from_directions(dxs + dys * D.unsqueeze(1), H, W)
        dproj = directions_to_maps(torch.cat((dpre @ dt_weight, dBs, dCs), dim=-1), H, W)
        ddt_weight = torch.einsum("bklc,bklr->kcr", dpre, code)
        grads = (dx, dproj, ddt_weight, dpre.sum((0, 2)), dA.sum(0), (dys * xs).sum((0, 2)))
        return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]

    def scan_1d(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, softplus: bool
    ) -> tuple[Tensor, Tensor]:
        y, last_state = reference.scan_1d(u, delta, A, B, C, D, delta_bias, softplus)
        return y.contiguous(), last_state.contiguous()

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
    ) -> Gradients1d:
        inputs = (u, delta, A, B, C, D, delta_bias)
        dtype = compute_dtype(u.dtype)
        dy, u, delta, A, B, C, D, delta_bias = (t.to(dtype) for t in (dy, *inputs))
        G = B.shape[1]

        def tokens(t: Tensor) -> Tensor:
            return t.unflatten(1, (G, -1)).transpose(2, 3)  # (B, C, L) to (B, G, L, C/G)

        def channels(t: Tensor) -> Tensor:
            return t.transpose(2, 3).flatten(1, 2)  # (B, G, L, C/G) to (B, C, L)

        pre = delta + delta_bias.unsqueeze(-1)
        dt = F.softplus(pre) if softplus else pre
        du, ddt, dA, dB, dC = scan_tokens_backward(
            tokens(dy), tokens(u), tokens(dt), A.unflatten(0, (G, -1)), B.transpose(2, 3), C.transpose(2, 3)
        )
        dpre = channels(ddt) * torch.sigmoid(pre) if softplus else channels(ddt)
        grads = (
            channels(du) + dy * D.unsqueeze(-1),
            dpre,
            dA.sum(0).flatten(0, 1),
            dB.transpose(2, 3),
            dC.transpose(2, 3),
            (dy * u).sum((0, 2)),
            dpre.sum((0, 2)),
        )
        return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, inputs, strict=True))  # type: ignore[return-value]


BACKEND = EagerBackend()
