"""Binds fitted records to the weights they were fitted with: class names, calibration, decisions, OOD detection.

`model.config.calibration`, `model.config.decisions` and `model.unusual` are bound to the weights when they are assigned
or loaded. If the weights change afterwards (a custom training loop, another state dict, an adapter), the records are
not applied and a warning says so. Changing dtype or device is not a change, see `medmamba.inference.fingerprint`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..config import MedMambaConfig
from ..decision.record import input_checksum
from .fingerprint import Fingerprint, changed_parts, fingerprint, stamp

if TYPE_CHECKING:
    from .ood import Unusual

FINGERPRINT = "weights"  # the key in a calibration and in unusual.json
NOT_CALIBRATED = (
    "warning: the weights have changed since the model was calibrated, so the calibration was not applied; "
    "fit_calibration on validation logits fits it again"
)
NOT_FITTED = (
    "warning: the weights have changed since out-of-distribution detection was fitted, so it was not applied; "
    "medmamba.inference.learn_unusual fits it again"
)


NOT_DECIDED = (
    "warning: the weights have changed since the operating points, sets and abstentions were fitted, so none was "
    "applied; `medmamba decide` or decide_model fits new ones on validation images"
)
OTHER_INPUT = (
    "warning: preprocessing, calibration or classes are not those with which the operating points, sets and "
    "abstentions were fitted, so none was applied; `medmamba decide` or decide_model fits new ones on validation images"
)


class InForce(NamedTuple):
    """The records of a model that are valid for its current weights.

    Attributes:
        config: the configuration, without a calibration or decisions that were fitted with other weights or, for
            decisions, with another preprocessing or calibration.
        unusual: the out-of-distribution detector, or None if there is none or it was fitted with other weights.
        notes: what was left out and why; each begins with "warning".
    """

    config: MedMambaConfig
    unusual: Unusual | None
    notes: tuple[str, ...] = ()


@dataclass
class _Bonds:
    """Records and the fingerprints of their weights; a fingerprint is None if those weights no longer exist."""

    calibration: dict[str, Any] = field(default_factory=dict)
    calibrated: Fingerprint | None = None
    decisions: dict[str, Any] = field(default_factory=dict)
    decided: Fingerprint | None = None
    unusual: Unusual | None = None
    fitted: Fingerprint | None = None
    head: tuple[nn.Module, ...] = ()  # the classifier of the class names; the tuple keeps it from being a submodule
    checked: tuple[tuple[object, ...], MedMambaConfig, Unusual | None, InForce] | None = None


class FittedMixin:
    """Keeps `config` and `unusual` of a network bound to the weights they were fitted with."""

    _config: MedMambaConfig

    @property
    def config(self) -> MedMambaConfig:
        """Architecture, classes, preprocessing and provenance.

        Assigning a configuration binds its class names to the current classifier, and its calibration and decisions to
        the current weights unless they carry a fingerprint of their own.
        """
        return self._config

    @config.setter
    def config(self, config: MedMambaConfig) -> None:
        self.__dict__["_config"] = config
        bonds = _bonds(self)  # created with the model, so that inference does not modify it
        if "patch_embed" not in self.__dict__.get("_modules", {}):
            return  # there are no weights yet
        if bonds.head:
            bonds.head = (self.head,)  # type: ignore[attr-defined]
        if config.calibration and config.calibration != bonds.calibration:
            bonds.calibration = copy.deepcopy(config.calibration)
            bonds.calibrated = config.calibration.get(FINGERPRINT) or fingerprint(_state(self))
        if config.decisions and config.decisions != bonds.decisions:
            bonds.decisions = copy.deepcopy(config.decisions)
            bonds.decided = config.decisions.get(FINGERPRINT) or fingerprint(_state(self))

    @property
    def unusual(self) -> Unusual | None:
        """The out-of-distribution detector, or None.

        Assigning one binds it to the current weights, unless it carries the fingerprint of those it was fitted with."""
        return self.__dict__.get("_unusual")

    @unusual.setter
    def unusual(self, unusual: Unusual | None) -> None:
        self.__dict__["_unusual"] = unusual
        bonds = _bonds(self)
        bonds.unusual = unusual
        bonds.fitted = None
        if unusual is not None:
            bonds.fitted = unusual.weights or _body(fingerprint(_state(self)))


def in_force(model: Any) -> InForce:
    """Returns the records of a model that are valid for its current weights.

    Takes about 0.2 ms if nothing has changed since the last call, otherwise one pass over the weights.

    Raises:
        ValueError: the classifier was replaced by hand, so its class names are unknown.
    """
    config, unusual = model.config, model.unusual
    bonds = _bonds(model)
    if config.num_classes and bonds.head and not _same_head(model.head, bonds.head[0]):
        raise ValueError(
            "the classifier of this model was replaced by hand, and the class names belong to the previous one: use "
            "model.reset_classifier(num_classes, id2label={0: ..., 1: ...}) instead, before training; or, if the names "
            "are still correct, assign them again: model.config = model.config.replace(id2label=..., calibration={})"
        )
    if not config.calibration and not config.decisions and unusual is None:
        return InForce(config, None)
    now = stamp(model)
    checked = bonds.checked
    if checked and checked[0] == now and checked[1] == config and checked[2] is unusual:
        return checked[3] if checked[3].notes else InForce(config, unusual)
    found = _compare(config, unusual, bonds, _state(model))
    bonds.checked = (now, copy.deepcopy(config), unusual, found)
    for note in found.notes:
        warnings.warn(note.removeprefix("warning: "), stacklevel=3)
    return found


def _compare(config: MedMambaConfig, unusual: Unusual | None, bonds: _Bonds, state: Mapping[str, Tensor]) -> InForce:
    notes = []
    if config.calibration:
        if config.calibration != bonds.calibration:  # modified in place: belongs to the current weights
            bonds.calibration = copy.deepcopy(config.calibration)
            bonds.calibrated = config.calibration.get(FINGERPRINT) or fingerprint(state)
        if bonds.calibrated is None or changed_parts(state, bonds.calibrated):
            config = config.replace(calibration={})
            notes.append(NOT_CALIBRATED)
    if config.decisions:
        if config.decisions != bonds.decisions:
            bonds.decisions = copy.deepcopy(config.decisions)
            bonds.decided = config.decisions.get(FINGERPRINT) or fingerprint(state)
        reason = ""
        if bonds.decided is None or changed_parts(state, bonds.decided):
            reason = NOT_DECIDED
        elif config.decisions["input"] != input_checksum(config):
            reason = OTHER_INPUT
        if reason:
            config = config.replace(decisions={})
            notes.append(reason)
    if unusual is not None and (bonds.fitted is None or changed_parts(body(state), bonds.fitted)):
        unusual = None
        notes.append(NOT_FITTED)
    return InForce(config, unusual, tuple(notes))


def bind_loaded(model: Any, unusual: Unusual | None, tensors: Mapping[str, Tensor]) -> None:
    """Binds loaded records to these tensors; drops, with a warning, records whose fingerprint differs."""
    bonds = _bonds(model)
    bonds.head = (model.head,) if isinstance(getattr(model, "head", None), nn.Module) else ()
    calibration = model.config.calibration
    decisions = model.config.decisions
    if not calibration and not decisions and unusual is None:
        return
    now = fingerprint(tensors)
    if FINGERPRINT in calibration and changed_parts(tensors, calibration[FINGERPRINT], now):
        warnings.warn("the calibration in config.json was fitted with other weights and is not used", stacklevel=3)
        model.config = model.config.replace(calibration={})
    else:
        bonds.calibration, bonds.calibrated = copy.deepcopy(calibration), now
    if FINGERPRINT in decisions and changed_parts(tensors, decisions[FINGERPRINT], now):
        warnings.warn("the decisions in config.json were fitted with other weights and are not used", stacklevel=3)
        bonds.decisions, bonds.decided = copy.deepcopy(decisions), None
    else:
        bonds.decisions, bonds.decided = copy.deepcopy(decisions), now
    if unusual is not None and unusual.weights and changed_parts(body(tensors), unusual.weights, _body(now)):
        warnings.warn("unusual.json was fitted with other weights and is not used", stacklevel=3)
        unusual = None
    model.__dict__["_unusual"] = bonds.unusual = unusual
    bonds.fitted = _body(now)


def carry_over(source: Any, target: Any) -> None:
    """Binds the records of a model to another form of it with the same outputs, such as a fused copy.

    Records that are not valid for the source are not valid for the target either.
    """
    found, bonds = in_force(source), _Bonds()
    now = fingerprint(_state(target))
    bonds.calibration = copy.deepcopy(source.config.calibration)
    bonds.calibrated = now if found.config.calibration else None
    bonds.decisions = copy.deepcopy(source.config.decisions)
    bonds.decided = now if found.config.decisions else None
    bonds.unusual = source.unusual
    bonds.fitted = _body(now) if found.unusual is not None else None
    bonds.head = (target.head,) if _bonds(source).head else ()
    target.__dict__["_bonds"] = bonds


def body(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that the pooled features depend on: all except the classifier's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def _body(found: Fingerprint) -> dict[str, list[float]]:
    return {part: values for part, values in found.items() if part.partition(".")[0] != "head"}


def _bonds(model: Any) -> _Bonds:
    return model.__dict__.setdefault("_bonds", _Bonds())


def _state(model: Any) -> dict[str, Tensor]:
    return model.state_dict()


def _same_head(head: nn.Module, known: nn.Module) -> bool:
    """Returns whether `head` is the known classifier, possibly wrapped, or shares its parameters."""
    if any(module is known for module in head.modules()):
        return True
    weights = {id(parameter) for parameter in known.parameters()}
    return any(id(parameter) in weights for parameter in head.parameters())
