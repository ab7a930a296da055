"""What was learnt with a model's weights belongs to them: class names, calibration, the warning for unusual images.

`model.config.calibration` and `model.unusual` are bound to the weights when they are assigned or loaded. Where the
weights have changed since (a training loop of one's own, another state dict, an adapter), they are not applied, and
whoever asks is told. Casts and moves are no change, see `medmamba.inference.fingerprint`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..config import MedMambaConfig
from .fingerprint import Fingerprint, changed_parts, fingerprint, stamp

if TYPE_CHECKING:
    from .ood import Unusual

FINGERPRINT = "weights"  # the key in a calibration and in unusual.json
NOT_CALIBRATED = (
    "warning: the weights have changed since the model was calibrated, so the calibration was not applied; "
    "fit_calibration on validation logits makes a new one"
)
NOT_FITTED = (
    "warning: the weights have changed since the detection of unusual images was fitted, so it was not applied; "
    "medmamba.inference.ood.learn_unusual makes a new one"
)


class InForce(NamedTuple):
    """What of a model's records holds for the weights it has now.

    Attributes:
        config: of the model, without a calibration that was fitted with other weights.
        unusual: its warning for unusual images; None where there is none, or it was fitted with other weights.
        notes: what was left out and why; each begins with "warning".
    """

    config: MedMambaConfig
    unusual: Unusual | None
    notes: tuple[str, ...] = ()


@dataclass
class _Bonds:
    """Records, and the fingerprints of the weights they belong to. None as a fingerprint: of weights that are gone."""

    calibration: dict[str, Any] = field(default_factory=dict)
    calibrated: Fingerprint | None = None
    unusual: Unusual | None = None
    fitted: Fingerprint | None = None
    head: tuple[nn.Module, ...] = ()  # the classifier that the class names are of; in a tuple, to be no submodule
    checked: tuple[tuple[object, ...], dict[str, Any], Unusual | None, InForce] | None = None


class FittedMixin:
    """Keeps `config` and `unusual` of a network together with the weights that they were made for."""

    _config: MedMambaConfig

    @property
    def config(self) -> MedMambaConfig:
        """Architecture, classes, preprocessing and provenance.

        Assigning one says that its class names are those of the present classifier, and its calibration, unless it says
        otherwise itself, of the present weights.
        """
        return self._config

    @config.setter
    def config(self, config: MedMambaConfig) -> None:
        self.__dict__["_config"] = config
        bonds = _bonds(self)  # made with the model, so that inference adds nothing to it
        if "patch_embed" not in self.__dict__.get("_modules", {}):
            return  # there are no weights yet
        if bonds.head:
            bonds.head = (self.head,)  # type: ignore[attr-defined]
        if config.calibration and config.calibration != bonds.calibration:
            bonds.calibration = copy.deepcopy(config.calibration)
            bonds.calibrated = config.calibration.get(FINGERPRINT) or fingerprint(_state(self))

    @property
    def unusual(self) -> Unusual | None:
        """The warning for images unlike the training images.

        Assigning one binds it to the present weights, unless it names those that it was learnt with."""
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
    """Returns what of a model's records holds for its present weights.

    Costs about 0.2 ms where nothing has changed since the last call, else one pass over the weights.

    Raises:
        ValueError: its classifier was replaced by hand, so nobody knows the names of its classes.
    """
    config, unusual = model.config, model.unusual
    bonds = _bonds(model)
    if config.num_classes and bonds.head and not _same_head(model.head, bonds.head[0]):
        raise ValueError(
            "the classifier of this model was replaced by hand, and its class names are of the one before: use "
            "model.reset_classifier(num_classes, id2label={0: ..., 1: ...}) instead, before training; or, if you know "
            "that the names hold, assign them: model.config = model.config.replace(id2label=..., calibration={})"
        )
    if not config.calibration and unusual is None:
        return InForce(config, None)
    now = stamp(model)
    checked = bonds.checked
    if checked and checked[0] == now and checked[1] == config.calibration and checked[2] is unusual:
        return checked[3] if checked[3].notes else InForce(config, unusual)
    found = _compare(config, unusual, bonds, _state(model))
    bonds.checked = (now, copy.deepcopy(config.calibration), unusual, found)
    for note in found.notes:
        warnings.warn(note.removeprefix("warning: "), stacklevel=3)
    return found


def _compare(config: MedMambaConfig, unusual: Unusual | None, bonds: _Bonds, state: Mapping[str, Tensor]) -> InForce:
    notes = []
    if config.calibration:
        if config.calibration != bonds.calibration:  # put into the config in place: of the weights as they are now
            bonds.calibration = copy.deepcopy(config.calibration)
            bonds.calibrated = config.calibration.get(FINGERPRINT) or fingerprint(state)
        if bonds.calibrated is None or changed_parts(state, bonds.calibrated):
            config = config.replace(calibration={})
            notes.append(NOT_CALIBRATED)
    if unusual is not None and (bonds.fitted is None or changed_parts(body(state), bonds.fitted)):
        unusual = None
        notes.append(NOT_FITTED)
    return InForce(config, unusual, tuple(notes))


def bind_loaded(model: Any, unusual: Unusual | None, tensors: Mapping[str, Tensor]) -> None:
    """Binds what was loaded with these tensors to them, and leaves out, with a warning, what names others."""
    bonds = _bonds(model)
    bonds.head = (model.head,) if isinstance(getattr(model, "head", None), nn.Module) else ()
    calibration = model.config.calibration
    if not calibration and unusual is None:
        return
    now = fingerprint(tensors)
    if FINGERPRINT in calibration and changed_parts(tensors, calibration[FINGERPRINT], now):
        warnings.warn("the calibration in config.json is of other weights, and is not used", stacklevel=3)
        model.config = model.config.replace(calibration={})
    else:
        bonds.calibration, bonds.calibrated = copy.deepcopy(calibration), now
    if unusual is not None and unusual.weights and changed_parts(body(tensors), unusual.weights, _body(now)):
        warnings.warn("unusual.json is of other weights, and is not used", stacklevel=3)
        unusual = None
    model.__dict__["_unusual"] = bonds.unusual = unusual
    bonds.fitted = _body(now)


def carry_over(source: Any, target: Any) -> None:
    """Binds the records of a model to another form of it with the same outputs, such as a fused copy.

    What did not hold for the source does not hold for the target.
    """
    found, bonds = in_force(source), _Bonds()
    now = fingerprint(_state(target))
    bonds.calibration = copy.deepcopy(source.config.calibration)
    bonds.calibrated = now if found.config.calibration else None
    bonds.unusual = source.unusual
    bonds.fitted = _body(now) if found.unusual is not None else None
    bonds.head = (target.head,) if _bonds(source).head else ()
    target.__dict__["_bonds"] = bonds


def body(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that the pooled features depend on: all but those of the classifier."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def _body(found: Fingerprint) -> dict[str, list[float]]:
    return {part: values for part, values in found.items() if part.partition(".")[0] != "head"}


def _bonds(model: Any) -> _Bonds:
    return model.__dict__.setdefault("_bonds", _Bonds())


def _state(model: Any) -> dict[str, Tensor]:
    return model.state_dict()


def _same_head(head: nn.Module, known: nn.Module) -> bool:
    """Whether it is the known classifier, in a wrapper or not, or a view of it."""
    if any(module is known for module in head.modules()):
        return True
    weights = {id(parameter) for parameter in known.parameters()}
    return any(id(parameter) in weights for parameter in head.parameters())
