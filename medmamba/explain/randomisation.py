"""Model randomisation test for attribution maps (Adebayo et al. 2018).

A map that stays the same when the weights are replaced by random ones depends on the image, not on what the model
learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model import MedMamba
from ..model.fused import FusedMedMamba
from .explanation import attribute
from .methods import Method
from .randomness import PrivateRandom
from .scores import Score
from .similarity import similarities
from .subject import Subject, blocks, frozen_view

SIMILAR = 0.7
"""Similarity, with all weights random, from which a map fails. For a map that is the sum of an image-only part and a
weight-dependent part, the rank correlation is the share of the first in the variance."""

JUDGED = ("rank_correlation", "rank_correlation_magnitude", "top_overlap")
"""Measures whose maximum is the similarity."""


@dataclass(frozen=True)
class Randomisation:
    """Similarity between the map of the trained model and those of randomised models.

    Attributes:
        steps: one record per state of the model; in the last, all weights are random. "randomised" names the parts
            with random weights; the other entries are similarities to the original map, each the minimum over the
            random models, because coarse maps can look alike by chance. "rank_correlation": Spearman's, absolute
            value. "rank_correlation_magnitude": of the absolute values. "top_overlap": of the strongest tenth of the
            pixels. "ssim": structural similarity, for comparison with the literature only, since different maps with a
            few peaks on a flat background score high.
    """

    steps: tuple[dict[str, Any], ...]

    @property
    def similarity(self) -> float:
        """Maximum of the measures in `JUDGED`, with all weights random."""
        return max(self.steps[-1][name] for name in JUDGED)

    @property
    def passed(self) -> bool:
        """Whether the similarity is below `SIMILAR`."""
        return self.similarity < SIMILAR

    def to_dict(self) -> dict[str, Any]:
        """Returns the record in plain types, for JSON."""
        return {"steps": list(self.steps), "similarity": self.similarity, "passed": self.passed}


State = tuple[str, list[MedMamba]]
"""Names of the randomised parts, and one model per seed with these parts random."""


def randomisation_check(
    subject: Subject, method: Method, options: dict[str, Any], map_: Tensor, states: Sequence[State], seed: int = 0
) -> Randomisation:
    """Runs a method on models with random weights, for the same image and class.

    Args:
        subject: image and class; its model is not changed.
        method, options: the method that made the map.
        map_: (H, W) of the trained model.
        states: from `random_states`.
        seed: for methods that draw random numbers.
    """
    if "max_steps" in options:
        # The logit of a random model hardly changes, so the completeness check would use up all steps.
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
    """Returns copies of the model with reinitialised weights.

    Args:
        models: number of copies per state, each with its own seed.
        cascade: reinitialise stage by stage from the classifier down, one state each, instead of everything at once.
        seed: of the first copy.
    """
    states = [_cascade(model, _fresh(model, 1000 * seed + i)) for i in range(models)]
    return [(row[0][0], [m for _, m in row]) for row in zip(*states, strict=True)][0 if cascade else -1 :]


def _fresh(model: MedMamba, seed: int) -> MedMamba:
    with PrivateRandom(seed):
        if isinstance(model, Score):
            fresh = frozen_view(model.with_random_weights())
        else:
            plain = MedMamba(model.config.replace(calibration={}, decisions={})).eval()
            made = plain.to(model.patch_embed.proj.weight.device)
            fresh = frozen_view(made.fuse() if isinstance(model, FusedMedMamba) else made)
    fresh.set_scan_backend(blocks(model, 1)[0].ssm.scan_backend)
    return fresh


def _cascade(model: MedMamba, fresh: MedMamba) -> Iterator[tuple[str, MedMamba]]:
    if isinstance(model, Score):  # from the decoder down
        mixed, body = frozen_view(fresh), frozen_view(model).encoder
        mixed.set_encoder(body)
        new = fresh.encoder
    else:
        mixed = body = frozen_view(model)
        mixed.head, new = fresh.head, fresh
    yield "classifier", frozen_view(mixed)
    for i in reversed(range(len(body.stages))):
        body.stages[i] = new.stages[i]
        if i:
            body.downsamples[i - 1] = new.downsamples[i - 1]
        else:
            body.patch_embed = new.patch_embed
        yield f"stage{i + 1} and above" if i else "all", frozen_view(mixed)
