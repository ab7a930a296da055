"""Reference implementation of the published network, used to verify converted checkpoints.

Independent of `medmamba`: plain functions on the published tensor names, in float64, with the scan as a loop over
positions. Slow; meant for small images. Written from the checkpoint layout and the paper (arXiv 2403.03849).
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


@torch.no_grad()
def reference_logits(state: State, images: Tensor) -> Tensor:
    """Computes float64 logits (B, classes) of normalised images (B, C, H, W)."""
    state = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = _norm(x.permute(0, 2, 3, 1), state, "patch_embed.norm")  # (B, H, W, C)
    stages = 1 + max(int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.", key)))
    for stage in range(stages):
        block = 0
        while f"layers.{stage}.blocks.{block}.ln_1.weight" in state:
            x = _block(x, _under(state, f"layers.{stage}.blocks.{block}."))
            block += 1
        if f"layers.{stage}.downsample.reduction.weight" in state:
            x = _merge(x, _under(state, f"layers.{stage}.downsample."))
    return F.linear(x.mean((1, 2)), state["head.weight"], state["head.bias"])


def _block(x: Tensor, state: State) -> Tensor:
    half = x.shape[-1] // 2
    left = _convolutions(x[..., :half].permute(0, 3, 1, 2), _under(state, "conv33conv33conv11.")).permute(0, 2, 3, 1)
    right = _scan_branch(_norm(x[..., half:], state, "ln_1"), _under(state, "self_attention."))
    both = torch.empty_like(x)
    both[..., 0::2], both[..., 1::2] = left, right  # the channel shuffle
    return x + both


def _convolutions(x: Tensor, state: State) -> Tensor:
    def batch_norm(x: Tensor, i: int) -> Tensor:
        mean, variance = state[f"{i}.running_mean"], state[f"{i}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{i}.weight"], state[f"{i}.bias"], eps=1e-5)

    x = batch_norm(x, 0)
    x = F.relu(batch_norm(F.conv2d(x, state["1.weight"], state["1.bias"], padding=1), 2))
    x = F.relu(batch_norm(F.conv2d(x, state["4.weight"], state["4.bias"], padding=1), 5))
    return F.relu(F.conv2d(x, state["7.weight"], state["7.bias"]))


def _scan_branch(x: Tensor, state: State) -> Tensor:
    x, gate = F.linear(x, state["in_proj.weight"]).chunk(2, dim=-1)  # (B, H, W, D)
    B, H, W, D = x.shape
    x = F.conv2d(x.permute(0, 3, 1, 2), state["conv2d.weight"], state["conv2d.bias"], padding=1, groups=D)
    x = F.silu(x)  # (B, D, H, W)
    rank, states = state["dt_projs_weight"].shape[-1], state["A_logs"].shape[-1]
    A, skip = -torch.exp(state["A_logs"]).view(4, D, states), state["Ds"].view(4, D)
    total = torch.zeros(B, D, H, W, dtype=x.dtype)
    for k in range(4):  # row-major, column-major, and both reversed
        u = (x if k % 2 == 0 else x.transpose(2, 3)).flatten(2)  # (B, D, L)
        u = u.flip(-1) if k >= 2 else u
        projected = torch.einsum("bdl,cd->bcl", u, state["x_proj_weight"][k])
        dt, b, c = projected.split([rank, states, states], dim=1)
        dt = torch.einsum("brl,dr->bdl", dt, state["dt_projs_weight"][k]) + state["dt_projs_bias"][k].view(1, D, 1)
        y = _scan(u, F.softplus(dt), A[k], b, c) + skip[k].view(1, D, 1) * u
        y = y.flip(-1) if k >= 2 else y
        total += y.view(B, D, H, W) if k % 2 == 0 else y.view(B, D, W, H).transpose(2, 3)
    y = _norm(total.permute(0, 2, 3, 1), state, "out_norm")
    return F.linear(y * F.silu(gate), state["out_proj.weight"])


def _scan(u: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Computes h[t] = exp(dt[t] A) h[t-1] + dt[t] b[t] u[t] and y[t] = c[t] h[t]; u, dt (B, D, L), b, c (B, N, L)."""
    h = torch.zeros(*u.shape[:2], A.shape[-1], dtype=u.dtype)
    y = []
    for t in range(u.shape[-1]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t]).unsqueeze(-1) * b[:, None, :, t]
        y.append((h * c[:, None, :, t]).sum(-1))
    return torch.stack(y, dim=-1)


def _merge(x: Tensor, state: State) -> Tensor:
    H, W = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:H:2, j:W:2] for j in (0, 1) for i in (0, 1)]  # (0,0), (1,0), (0,1), (1,1)
    return F.linear(_norm(torch.cat(corners, dim=-1), state, "norm"), state["reduction.weight"])


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def _under(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference, infinity if any is NaN."""
    difference = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(difference) else difference
