"""What the configurations of models with a MedMamba encoder have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..config import MedMambaConfig, PreprocessConfig
from ..utils import config_checks as checks
from ..utils.config_checks import ConfigError

C = TypeVar("C", bound="EncoderModelConfig")


@dataclass
class EncoderModelConfig:
    """Base of `SegmenterConfig` and `DetectorConfig`: an encoder, names of classes, and files.

    Attributes:
        MODEL_TYPE: how `config.json` names this kind of model.
        encoder: the MedMamba; its classifier is not used, and its `preprocess` is that of the model.

    Raises:
        ConfigError: an encoder without four stages, or one that crops images.
    """

    MODEL_TYPE: ClassVar[str] = ""

    encoder: MedMambaConfig

    def __post_init__(self) -> None:
        if isinstance(self.encoder, Mapping):
            self.encoder = MedMambaConfig.from_dict(dict(self.encoder))
        if not isinstance(self.encoder, MedMambaConfig):
            raise ConfigError(f"encoder must be the configuration of a MedMamba, got {type(self.encoder).__name__}")
        if len(self.encoder.dims) != 4:
            raise ConfigError(f"the encoder needs four stages, it has {len(self.encoder.dims)}")
        if self.encoder.preprocess.crop_mode == "center":
            raise ConfigError(
                'preprocess.crop_mode "center" cuts off the margins of an image, of which nothing would be known; use '
                '"squash" or "pad"'
            )

    @property
    def preprocess(self) -> PreprocessConfig:
        """How pixels become the network's input."""
        return self.encoder.preprocess

    @property
    def in_chans(self) -> int:
        """Channels of the network's input."""
        return self.encoder.in_chans

    # Names by which training asks about any model.

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the encoder."""
        return self.encoder.depths

    @property
    def num_classes(self) -> int:
        """Number of classes, without a background."""
        return len(self.classes)  # type: ignore[attr-defined]

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.classes)  # type: ignore[attr-defined]

    def replace(self: C, **changes: Any) -> C:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "encoder"}
        return {"model_type": self.MODEL_TYPE, "encoder": self.encoder.to_dict(), **fields}

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: another kind of model, an unknown field, or values that contradict each other.
        """
        data = dict(data)
        if (found := data.pop("model_type", None)) != cls.MODEL_TYPE:
            raise ConfigError(f'model_type is {found!r:.80}, expected "{cls.MODEL_TYPE}"')
        if unknown := sorted(set(data) - {f.name for f in dataclasses.fields(cls)}):
            raise ConfigError(
                f"config has unknown fields {unknown}; it was written by a newer version of medmamba (pip install -U "
                "medmamba) or by another project"
            )
        if "encoder" not in data:
            raise ConfigError("config has no 'encoder': it is incomplete, download or save it again")
        return cls(**data)


def class_names(found: Any) -> tuple[str, ...]:
    """Returns the names of classes after the checks of `config_checks.labels`.

    Raises:
        ConfigError: none, a name twice, or one that cannot be shown.
    """
    named: Iterable[Any] = checks.several(found, "classes", checks.MAX_CLASSES)
    named = list(named)
    if not named:
        raise ConfigError("classes names nothing; give at least one, such as ('lesion',)")
    return tuple(checks.labels(dict(enumerate(named)), len(named)).values())
