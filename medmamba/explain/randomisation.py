"""The sanity check for saliency maps (Adebayo et al. 2018): a map that stays the same when the weights are replaced by
random ones shows the image, not what the model learned of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import MedMamba
from .explanation import attribute
from .methods import Method
from .subject import Subject, blocks, frozen_view

SIMILAR = 0.7
"""A map that is at least this similar (largest of the measures) after all weights were replaced fails."""


@dataclass(frozen=True)
class Randomisation:
    """How similar the map stays.

    Attributes:
        steps: for each state of the model, which of its parts were random by then, the rank correlation (Spearman)
            with the original map, that of the magnitudes, and the structural similarity of the two maps of ranks (of
            the values themselves, flat areas would look alike in any two maps with a few peaks). In the last, all of
            the weights were random.
    """

    steps: tuple[dict[str, Any], ...]

    @property
    def similarity(self) -> float:
        """The largest of the three measures with all weights random."""
        last = self.steps[-1]
        return max(abs(last["rank_correlation"]), last["rank_correlation_magnitude"], last["ssim"])

    @property
    def passed(self) -> bool:
        return self.similarity < SIMILAR

    def to_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "similarity": self.similarity, "passed": self.passed}


def randomisation_check(
    subject: Subject, method: Method, options: dict[str, Any], map_: Tensor, cascade: bool = False, seed: int = 0
) -> Randomisation:
    """Runs a method again on models with random weights, for the same class.

    Args:
        subject: the image and class; its model is not changed.
        map_: (H, W) of the trained model.
        cascade: from the classifier down, one more part at each step; else all at once.
    """
    states = list(random_models(subject.model, cascade, seed))
    steps = []
    original = map_.cpu().double()
    for i, (name, model) in enumerate(states):
        progress = subject.span(i / len(states), (i + 1) / len(states))
        other = Subject(model, subject.x, subject.target, subject.batch_size, progress)
        changed = attribute(other, method, options, seed).values.detach().cpu().double()
        steps.append(
            {
                "randomised": name,
                "rank_correlation": rank_correlation(original, changed),
                "rank_correlation_magnitude": rank_correlation(original.abs(), changed.abs()),
                "ssim": ssim(ranks(original), ranks(changed)),
            }
        )
    return Randomisation(tuple(steps))


def random_models(model: MedMamba, cascade: bool, seed: int) -> Iterator[tuple[str, MedMamba]]:
    """The model with freshly initialised parts: all, or ever more from the output to the input."""
    device = model.patch_embed.proj.weight.device
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        fresh = frozen_view(MedMamba(model.config).to(device))
    fresh.set_scan_backend(blocks(model, 1)[0].ssm.scan_backend)
    if not cascade:
        yield "all", fresh
        return
    mixed = frozen_view(model)
    mixed.head = fresh.head
    yield "classifier", frozen_view(mixed)
    for i in reversed(range(len(mixed.stages))):
        mixed.stages[i] = fresh.stages[i]
        if i:
            mixed.downsamples[i - 1] = fresh.downsamples[i - 1]
        else:
            mixed.patch_embed = fresh.patch_embed
        yield f"stage{i + 1} and above" if i else "all", frozen_view(mixed)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, with mean ranks for ties; 0 where a map is constant."""
    both = torch.stack((ranks(a).flatten(), ranks(b).flatten()))
    centred = both - both.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if norms.min() > 0 else 0.0


def ssim(a: Tensor, b: Tensor, window: int = 7) -> float:
    """Mean structural similarity (Wang et al. 2004) of two maps (H, W), each scaled to a largest magnitude of 1."""
    a, b = (t / t.abs().max().clamp(min=1e-30) for t in (a.double(), b.double()))
    # The range of a signed map is 2, of an unsigned one 1; the customary constants are relative to it.
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
    """Each value by its rank, 1 the lowest, ties by their mean rank; float64, in the same shape."""
    _, inverse, counts = np.unique(values.flatten().numpy(), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return torch.from_numpy((last - (counts - 1) / 2)[inverse.reshape(-1)]).view(values.shape)
