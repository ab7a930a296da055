"""The sanity check for saliency maps (Adebayo et al. 2018): a map that stays the same when the weights are replaced by
random ones shows the image, not what the model learned of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import MedMamba
from ..model.fused import FusedMedMamba
from .explanation import attribute
from .methods import Method
from .randomness import PrivateRandom
from .subject import Subject, blocks, frozen_view

SIMILAR = 0.7
"""A map at least this similar after all weights were replaced fails. Where a map is the sum of a part that the image
alone makes and a part that the weights make, the rank correlation is the share of the first in the variance."""

JUDGED = ("rank_correlation", "rank_correlation_magnitude", "top_overlap")
"""The measures of which the largest is the similarity."""


@dataclass(frozen=True)
class Randomisation:
    """How similar the map stays.

    Attributes:
        steps: for each state of the model, which of its parts were random by then ("randomised") and how similar the
            map was to the original, by several random models the least: a map of the image alone is the same for all,
            while coarse maps look alike by chance. "rank_correlation" (Spearman's; a map turned upside down is as
            similar as the same map), "rank_correlation_magnitude", "top_overlap" (of the tenth of the pixels with the
            strongest evidence), and "ssim" (structural similarity of the values), which is for comparison with the
            literature only: two different maps with a few peaks on a flat background score high. In the last state,
            all of the weights were random.
    """

    steps: tuple[dict[str, Any], ...]

    @property
    def similarity(self) -> float:
        """The largest of the measures of `JUDGED` with all weights random."""
        return max(self.steps[-1][name] for name in JUDGED)

    @property
    def passed(self) -> bool:
        return self.similarity < SIMILAR

    def to_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "similarity": self.similarity, "passed": self.passed}


State = tuple[str, list[MedMamba]]
"""Which parts are random, and models in which they are, by several seeds."""


def randomisation_check(
    subject: Subject, method: Method, options: dict[str, Any], map_: Tensor, states: Sequence[State], seed: int = 0
) -> Randomisation:
    """Runs a method again on models with random weights, for the same class.

    Args:
        subject: the image and class; its model is not changed.
        map_: (H, W) of the trained model.
        states: of `random_states`.
    """
    if "max_steps" in options:
        # The logit of a random model hardly changes: integrated gradients would spend all their steps on adding up.
        options = options | {"max_steps": options["n_steps"]}
    total, done, steps = sum(len(models) for _, models in states), 0, []
    for name, models in states:
        measured = []
        for model in models:
            other = Subject(
                model, subject.x, subject.target, subject.batch_size, subject.span(done / total, (done + 1) / total)
            )
            changed = attribute(other, method, options, seed).values.detach()
            measured.append(similarities(map_, changed, method.signed))
            done += 1
        steps.append({"randomised": name} | {k: min(m[k] for m in measured) for k in measured[0]})
    return Randomisation(tuple(steps))


def random_states(model: MedMamba, models: int, cascade: bool, seed: int) -> list[State]:
    """The model with freshly initialised weights: of all its parts, or (with `cascade`) of ever more of them from the
    output to the input. `models` of each, by different seeds."""
    states = [_cascade(model, _fresh(model, 1000 * seed + i)) for i in range(models)]
    return [(row[0][0], [m for _, m in row]) for row in zip(*states, strict=True)][0 if cascade else -1 :]


def _fresh(model: MedMamba, seed: int) -> MedMamba:
    with PrivateRandom(seed):
        made = MedMamba(model.config.replace(calibration={})).eval().to(model.patch_embed.proj.weight.device)
        fresh = frozen_view(made.fuse() if isinstance(model, FusedMedMamba) else made)  # parts of both are put together
    fresh.set_scan_backend(blocks(model, 1)[0].ssm.scan_backend)
    return fresh


def _cascade(model: MedMamba, fresh: MedMamba) -> Iterator[tuple[str, MedMamba]]:
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


def similarities(a: Tensor, b: Tensor, signed: bool) -> dict[str, float]:
    """How alike two maps (H, W) are, by each measure; see `Randomisation`."""
    if a.device.type != "cuda":  # not all others have float64
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
    """Spearman's, with mean ranks for ties; 0 where a map is constant."""
    both = torch.stack((ranks(a).flatten(), ranks(b).flatten()))
    centred = both - both.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if norms.min() > 0 else 0.0


def top_overlap(a: Tensor, b: Tensor, share: float = 0.1) -> float:
    """Which part of the largest values of one map, a tenth of all, is among those of the other; `share` by chance.
    Where the tenth ends within values that are equal, each of them counts as a fraction."""
    return float((_top(a, share) * _top(b, share)).sum() / (share * a.numel()))


def _top(values: Tensor, share: float) -> Tensor:
    values = values.flatten()
    count = share * len(values)
    limit = values.sort(descending=True).values[min(int(count), len(values) - 1)]
    above, equal = (values > limit).double(), (values == limit).double()
    return above + equal * (count - above.sum()) / equal.sum()


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
    ordered, order = values.flatten().sort()
    _, run, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    result = torch.empty(len(ordered), dtype=torch.float64, device=values.device)
    result[order] = (last - (counts - 1) / 2.0).double()[run]
    return result.view(values.shape)
