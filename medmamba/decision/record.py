"""`Decisions`: what was decided on validation images, as stored in `config.json` under "decisions"."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MedMambaConfig
from ..utils.names import AmbiguousNameError, find_name
from .conformal import ConformalSets
from .operating import OperatingPoint
from .selective import Abstention
from .thresholds import DecisionError

Entry = OperatingPoint | ConformalSets | Abstention
_KINDS: tuple[tuple[str, str, Any], ...] = (
    ("points", "operating_points", OperatingPoint),
    ("sets", "sets", ConformalSets),
    ("abstentions", "abstentions", Abstention),
)


@dataclass(frozen=True)
class Decisions:
    """Operating points, sets and abstentions of a model, all fitted on the same validation images.

    Attributes:
        points, sets, abstentions: the entries; names are unique among all of them.
        patients: {"method": ..., "losses": {...}, "groups": n}: how images of a patient are combined; None where no
            patient of the validation images had several.
        data: {"name", "split", "images", "patients"}: what they were fitted on.
        input: checksum of the preprocessing, the calibration and the classes, see `input_checksum`.
        weights: fingerprint of the weights; None until saved.
    """

    points: tuple[OperatingPoint, ...] = ()
    sets: tuple[ConformalSets, ...] = ()
    abstentions: tuple[Abstention, ...] = ()
    patients: Mapping[str, Any] | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    input: str = ""
    weights: Mapping[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        """Names of all entries."""
        return [entry.name for entry in self.entries]

    @property
    def entries(self) -> list[Entry]:
        """All entries: operating points, then sets, then abstentions."""
        return [*self.points, *self.sets, *self.abstentions]

    def find(self, name: str) -> Entry:
        """Returns the entry of a name.

        Raises:
            DecisionError: no such entry.
        """
        try:
            place = find_name(name, self.names)
        except AmbiguousNameError as error:
            raise DecisionError(str(error)) from error
        if place is None:
            there = ", ".join(self.names) or "none; fit some with `medmamba decide`"
            raise DecisionError(f"the model has no decision {name!r}; there are: {there}")
        return self.entries[place]

    def with_entries(self, *entries: Entry) -> Decisions:
        """Returns a copy with further entries, which replace those of the same name."""
        new = {entry.name for entry in entries}
        parts: dict[str, Any] = {}
        for attribute, _, kind in _KINDS:
            kept = [entry for entry in getattr(self, attribute) if entry.name not in new]
            parts[attribute] = (*kept, *(entry for entry in entries if isinstance(entry, kind)))
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for `MedMambaConfig.decisions`."""
        data: dict[str, Any] = {"data": dict(self.data), "input": self.input}
        for attribute, key, _ in _KINDS:
            data[key] = [entry.to_dict() for entry in getattr(self, attribute)]
        data |= {"patients": dict(self.patients)} if self.patients else {}
        return data | ({"weights": dict(self.weights)} if self.weights else {})

    @classmethod
    def from_config(cls, config: MedMambaConfig) -> Decisions:
        """Returns the decisions in a configuration, which has checked them; none where there are none."""
        found = config.decisions
        if not found:
            return cls()
        parts = {attribute: tuple(map(kind.from_dict, found.get(key, []))) for attribute, key, kind in _KINDS}
        return cls(
            **parts,
            patients=found.get("patients"),
            data=found["data"],
            input=found["input"],
            weights=found.get("weights"),
        )


def input_checksum(config: MedMambaConfig) -> str:
    """Returns a checksum of all that the probabilities depend on apart from the weights.

    Thresholds belong to probabilities of one preprocessing and one calibration; class names say what they are of.
    """
    about = {
        "preprocess": dataclasses.asdict(config.preprocess),
        "temperature": float(config.calibration.get("temperature", 1.0)),
        "labels": config.labels,
        "task": config.task,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
