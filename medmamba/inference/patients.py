"""Predicts one class per patient, study or lesion from several images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..decision.patients import METHODS, combine
from ..utils.modes import unwrap
from .decide import Decision, chosen, decisions_of
from .fitted import in_force
from .predict import Failure, Prediction, iter_predict, probabilities


@dataclass(frozen=True)
class GroupPrediction:
    """The prediction for one patient, study or lesion.

    Attributes:
        group: as given; None for an image without one.
        label, probability: the most probable class.
        top: (label, probability) pairs in descending order.
        images: predictions of the images that were combined.
        failures: images that could not be read or classified, and were left out.
        method: how the images were combined, see `medmamba.decision.combine`.
        unusual: share of the images that are out-of-distribution; None if the model has no threshold.
        decisions: results of the decisions that were asked for, for the combined probabilities.
    """

    group: Any
    label: str
    probability: float
    top: list[tuple[str, float]]
    images: list[Prediction]
    failures: list[Failure] = field(default_factory=list)
    method: str = "mean_logit"
    unusual: float | None = None
    decisions: tuple[Decision, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for JSON, without names of files, which may identify a patient."""
        data: dict[str, Any] = {
            "group": self.group,
            "label": self.label,
            "probability": self.probability,
            "top": [list(pair) for pair in self.top],
            "images": len(self.images),
            "failures": len(self.failures),
            "method": self.method,
            "unusual": self.unusual,
        }
        return data | ({"decisions": [d.to_dict() for d in self.decisions]} if self.decisions else {})


def predict_groups(
    model: Any,
    images: Sequence[Any],
    groups: Sequence[Any],
    *,
    method: str | None = None,
    decide: Any = None,
    **options: Any,
) -> list[GroupPrediction | Failure]:
    """Predicts each group of images as one, in order of the first image of each.

    Args:
        model, images: as in `predict`.
        groups: the group of each image, such as those of `medmamba.imaging.dicom.studies.group_files`; None: a group
            of its own.
        method: "mean_logit", "max" or "noisy_or"; None: the one chosen on validation (`medmamba decide`), else
            "mean_logit".
        decide: as in `predict`, for the combined probabilities.
        options: further arguments of `iter_predict`.

    Returns:
        A `GroupPrediction` per group; the first `Failure` for a group of which no image can be classified.

    Raises:
        ValueError: lengths that do not match, or an unknown method.
        DecisionError: as `predict`.
    """
    if len(groups) != len(images):
        raise ValueError(f"{len(groups)} groups for {len(images)} images")
    found = in_force(unwrap(model))
    config = found.config
    if method is None:
        method = (config.decisions.get("patients") or {}).get("method", METHODS[0])
    if method not in METHODS:
        raise ValueError(f"unknown way to combine images {method!r}; there are {', '.join(METHODS)}")
    entries = chosen(found, decide)
    members: dict[Any, tuple[Any, list[Prediction], list[Failure]]] = {}
    results = iter_predict(model, images, **options)
    for i, (key, result) in enumerate(zip(groups, results, strict=True)):
        _, good, bad = members.setdefault((None, i) if key is None else ("", key), (key, [], []))
        if isinstance(result, Prediction):
            good.append(result)
        else:
            bad.append(result)
    answers: list[GroupPrediction | Failure] = []
    for key, good, bad in members.values():
        if not good:
            answers.append(bad[0])
            continue
        logits = torch.tensor([p.logits for p in good], dtype=torch.float64)
        p = combine(probabilities(logits, config).numpy(), method, config.task)
        flags = [one.unusual for one in good]
        known = [flag for flag in flags if flag is not None]
        share = sum(known) / len(flags) if len(known) == len(flags) else None
        mostly = None if share is None else share > 0.5
        order = np.argsort(-p, kind="stable")
        top = [(config.id2label[int(i)], float(p[i])) for i in order]
        said = decisions_of(entries, p[None], config, [mostly])[0] if entries else ()
        answers.append(GroupPrediction(key, *top[0], top, good, bad, method, share, said))
    return answers
