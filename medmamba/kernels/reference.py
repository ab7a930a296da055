"""Reference implementation of the selective scan in plain PyTorch.

All backends are tested against these functions, values and gradients. They run on any device and in any float dtype
(float64 included, for gradcheck), and are the fallback where no faster kernel is available.

Notation, used in the whole package:
    B  batch            H, W  height and width of a feature map        L = H * W  tokens
    C  channels         N     state size per channel (16)              R  rank of the step size projection
    K = 4  scan directions: row-major, column-major, and both reversed
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the recurrence: float32 at least, because it drifts and overflows in half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def scan_tokens(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the recurrence (equation 2 of the Mamba paper, arXiv 2312.00752).

        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] * B[t]
        y[t] = <C[t], h[t]>

    Args:
        x, dt: (..., L, C) input and step size.
        A: (..., C, N) negative decay rates.
        B, C: (..., L, N) input and output projections.

    Returns:
        y (..., L, C) and the last state h (..., C, N).
    """
    h = x.new_zeros(torch.broadcast_shapes(x.shape[:-2], A.shape[:-2]) + A.shape[-2:])
    ys = []
    # unbind, not indexing: the gradient of each `x[t]` would allocate a zero tensor as long as x, which makes the
    # backward pass quadratic in L.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(-2), dt.unbind(-2), B.unbind(-2), C.unbind(-2), strict=True):
        decay = torch.exp(dt_t.unsqueeze(-1) * A)  # (..., C, N)
        h = decay * h + (dt_t * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        ys.append((h @ C_t.unsqueeze(-1)).squeeze(-1))  # (..., C)
    return torch.stack(ys, dim=-2), h


def to_directions(maps: Tensor) -> Tensor:
    """Reads (B, H, W, K, P) maps along their four directions: (B, K, L, P)."""
    rows = maps.flatten(1, 2)  # (B, L, K, P), row-major
    cols = maps.transpose(1, 2).flatten(1, 2)  # (B, L, K, P), column-major
    return torch.stack(
        (rows[:, :, 0], cols[:, :, 1], rows[:, :, 2].flip(1), cols[:, :, 3].flip(1)), dim=1
    )  # (B, K, L, P)


def from_directions(seqs: Tensor, height: int, width: int) -> Tensor:
    """Inverts `to_directions` and sums over directions: (B, K, L, C) to (B, H, W, C)."""
    rows = seqs[:, 0] + seqs[:, 2].flip(1)  # (B, L, C), row-major
    cols = seqs[:, 1] + seqs[:, 3].flip(1)  # (B, L, C), column-major
    return rows.unflatten(1, (height, width)) + cols.unflatten(1, (width, height)).transpose(1, 2)


def scan_2d(x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Scans a feature map in four directions (SS2D, MedMamba section 3.2; VMamba arXiv 2401.10166).

    Args:
        x: (B, H, W, C) feature map.
        proj: (B, H, W, K, R + 2N) per pixel and direction: [step size code | B | C].
        dt_weight, dt_bias: (K, C, R), (K, C) map the code to the step size, before the softplus.
        A: (K, C, N) negative decay rates.
        D: (K, C) skip connection.

    Returns:
        (B, H, W, C) the sum of the four scans in pixel order, in the dtype of x.
    """
    B, H, W, C = x.shape
    K, _, R = dt_weight.shape
    N = A.shape[-1]
    dtype = compute_dtype(x.dtype)
    xs = to_directions(x.to(dtype).unsqueeze(3).expand(B, H, W, K, C))  # (B, K, L, C)
    code, Bs, Cs = to_directions(proj.to(dtype)).split((R, N, N), dim=-1)
    dt = F.softplus(code @ dt_weight.to(dtype).transpose(1, 2) + dt_bias.to(dtype).unsqueeze(1))  # (B, K, L, C)
    y, _ = scan_tokens(xs, dt, A.to(dtype), Bs, Cs)
    return from_directions(y + xs * D.to(dtype).unsqueeze(1), H, W).to(x.dtype)


def scan_1d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Scans grouped sequences in the layout of `mamba_ssm`, without its gate.

    Args:
        u, delta: (B, C, L). A: (C, N). B, C: (B, G, N, L), group g for C/G consecutive channels. D, bias: (C,).

    Returns:
        y (B, C, L) in the dtype of u, and the last state (B, C, N) in the dtype of the recurrence.
    """
    batch, channels, length = u.shape
    G = B.shape[1]
    dtype = compute_dtype(u.dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype).unsqueeze(-1)
    if softplus:
        dt = F.softplus(dt)

    def tokens(t: Tensor) -> Tensor:
        return t.to(dtype).unflatten(1, (G, channels // G)).transpose(2, 3)  # (B, G, L, C/G)

    y, h = scan_tokens(
        tokens(u),
        tokens(dt),
        A.to(dtype).unflatten(0, (G, channels // G)),
        B.to(dtype).transpose(2, 3),
        C.to(dtype).transpose(2, 3),
    )
    y = y.transpose(2, 3).flatten(1, 2)  # (B, C, L)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * u.to(dtype)
    return y.to(u.dtype), h.flatten(1, 2)


def pad_rank(x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pads R with zeros to a multiple of 4: the same scan, with aligned matrix products and loads.

    Args:
        x_proj: (K, R + 2N, C). dt_weight: (K, C, R).
    """
    R = dt_weight.shape[2]
    if R % 4 == 0:
        return x_proj, dt_weight
    code, vectors = x_proj[:, :R], x_proj[:, R:]
    return torch.cat((F.pad(code, (0, 0, 0, -R % 4)), vectors), dim=1), F.pad(dt_weight, (0, -R % 4))
