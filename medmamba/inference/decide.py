"""Applies the decisions of a model to its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config import MedMambaConfig
from ..decision import (
    Abstention,
    ConformalSets,
    DecisionError,
    Decisions,
    OperatingPoint,
    confidence_of,
    indices,
    score,
)
from ..decision.record import Entry
from ..utils.names import shown
from .fitted import NOT_DECIDED, OTHER_INPUT, InForce

ALL = "all"


@dataclass(frozen=True)
class Decision:
    """What one decision of the model says of an image.

    Attributes:
        name: of the decision.
        kind: "operating_point", "set" or "abstention".
        answer: in words.
        labels: classes called positive, classes in the set, or the answer that is given; () for a negative image and
            for an answer that is withheld.
        positive: of an operating point: whether the image is called positive; None for the others.
        withheld: of an abstention: whether no answer is given; None for the others.
        score: that is compared with the threshold; None for a set.
        threshold: None for a set.
    """

    name: str
    kind: str
    answer: str
    labels: tuple[str, ...]
    positive: bool | None = None
    withheld: bool | None = None
    score: float | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, without what does not apply."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return {**data, "labels": list(self.labels)}


def chosen(found: InForce, decide: str | Entry | Sequence[str | Entry] | None) -> list[Entry]:
    """Returns the decisions asked for.

    Args:
        found: of `medmamba.inference.fitted.in_force`.
        decide: names of decisions in the model's configuration, "all" of them, or decisions themselves, one or several.

    Raises:
        DecisionError: no such decision, or those of the model do not hold for its weights, preprocessing or
            calibration.
    """
    if decide is None:
        return []
    wanted = [decide] if isinstance(decide, str) or not isinstance(decide, Sequence) else list(decide)
    if not wanted:
        return []
    named = any(isinstance(item, str) for item in wanted)
    for note in found.notes:
        if named and note in (NOT_DECIDED, OTHER_INPUT):
            raise DecisionError(note.removeprefix("warning: "))
    stored = Decisions.from_config(found.config) if named else Decisions()
    entries: dict[str, Entry] = {}
    for item in wanted:
        if item == ALL and not stored.entries:
            raise DecisionError("the model has no decisions; fit some on validation images with `medmamba decide`")
        if not isinstance(item, str | OperatingPoint | ConformalSets | Abstention):
            raise DecisionError(f"decide takes names or decisions, got {type(item).__name__}")
        several = stored.entries if item == ALL else [stored.find(item) if isinstance(item, str) else item]
        entries |= {entry.name: entry for entry in several}
    return list(entries.values())


def decisions_of(
    entries: Sequence[Entry], probabilities: np.ndarray, config: MedMambaConfig, unusual: Sequence[bool | None]
) -> list[tuple[Decision, ...]]:
    """Returns the decisions of each image, from calibrated probabilities `(N, K)` and the flags of the detector."""
    p = np.asarray(probabilities, dtype=np.float64)
    if not len(p):
        return []
    columns = [_decided(entry, p, config, unusual) for entry in entries]
    return [tuple(column[i] for column in columns) for i in range(len(p))]


def _decided(entry: Entry, p: np.ndarray, config: MedMambaConfig, unusual: Sequence[bool | None]) -> list[Decision]:
    labels = config.labels
    if isinstance(entry, OperatingPoint):
        values = score(p, indices(entry.classes, labels), config.task)
        what = " or ".join(entry.classes)
        found = []
        for value in values:
            yes = bool(value >= entry.threshold)
            text = f"{what}: {'yes' if yes else 'no'} (probability {value:.1%}, threshold {entry.threshold:.1%})"
            held = entry.classes if yes else ()
            found.append(
                Decision(entry.name, "operating_point", text, held, yes, score=float(value), threshold=entry.threshold)
            )
        return found
    if isinstance(entry, ConformalSets):
        sets = [tuple(np.array(labels)[row].tolist()) for row in entry.members(p, config.task)]
        return [Decision(entry.name, "set", _set_text(members, entry.coverage), members) for members in sets]
    flags = None if any(flag is None for flag in unusual) else np.array(unusual, dtype=bool)
    found = []
    for i, value in enumerate(confidence_of(p, flags, config.task)):
        withheld = bool(value < entry.threshold)
        held = () if withheld or config.task == "multilabel" else (labels[int(p[i].argmax())],)
        why = "unlike the training images" if flags is not None and flags[i] else "too uncertain"
        text = f"no answer: {why}" if withheld else "confident enough for an answer"
        found.append(
            Decision(
                entry.name, "abstention", text, held, withheld=withheld, score=float(value), threshold=entry.threshold
            )
        )
    return found


def _set_text(members: Sequence[str], coverage: float) -> str:
    share = f"at {100 * coverage:g} %"
    if not members:
        return f"none of the labels, {share}"
    names = ", ".join(shown(name) if "," in name else name for name in members)
    return f"{names}, {share}" if len(members) == 1 else f"one of: {names}, {share}"
