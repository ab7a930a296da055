"""Similarity measures between attribution maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def similarities(a: Tensor, b: Tensor, signed: bool) -> dict[str, float]:
    """Returns the similarity of two maps (H, W) by each measure that `Randomisation` lists."""
    if a.device.type != "cuda":  # some other devices lack float64
        a, b = a.cpu(), b.cpu()
    a, b = a.detach().double(), b.detach().double()
    rank = rank_correlation(a, b)
    return {
        "rank_correlation": abs(rank),
        "rank_correlation_magnitude": rank_correlation(a.abs(), b.abs()) if signed else rank,
        "top_overlap": max(top_overlap(a, b), top_overlap(a, -b)) if signed else top_overlap(a, b),
        "ssim": ssim(a, b),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's rank correlation, with mean ranks for ties; 0 if a map is constant."""
    both = torch.stack((ranks(a).flatten(), ranks(b).flatten()))
    centred = both - both.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    if norms.min() == 0:
        return 0.0
    return float((centred[0] @ centred[1] / (norms[0] * norms[1])).clamp(-1, 1))  # rounding can exceed 1


def top_overlap(a: Tensor, b: Tensor, share: float = 0.1) -> float:
    """Returns the overlap of the strongest pixels of two maps: 1 for the same pixels, `share` by chance.

    Pixels tied at the threshold count fractionally.
    """
    return min(float((_top(a, share) * _top(b, share)).sum() / (share * a.numel())), 1.0)  # rounding can exceed 1


def _top(values: Tensor, share: float) -> Tensor:
    values = values.flatten()
    count = share * len(values)
    limit = values.sort(descending=True).values[min(int(count), len(values) - 1)]
    above, equal = (values > limit).double(), (values == limit).double()
    return above + equal * (count - above.sum()) / equal.sum()


def ssim(a: Tensor, b: Tensor, window: int = 7) -> float:
    """Returns the mean structural similarity (Wang et al. 2004) of two maps (H, W), each scaled to a maximum magnitude
    of 1."""
    a, b = (t / t.abs().max().clamp(min=1e-30) for t in (a.double(), b.double()))
    # The data range is 2 for signed maps and 1 for others; the usual constants are relative to it.
    span = 2.0 if min(a.min(), b.min()) < 0 else 1.0
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2

    def local_mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t[None, None], window, stride=1)

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def ranks(values: Tensor) -> Tensor:
    """Returns the rank of each value, from 1 for the lowest, ties with their mean rank; float64, same shape."""
    ordered, order = values.flatten().sort()
    _, run, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    result = torch.empty(len(ordered), dtype=torch.float64, device=values.device)
    result[order] = (last - (counts - 1) / 2.0).double()[run]
    return result.view(values.shape)
