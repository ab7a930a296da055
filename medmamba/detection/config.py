"""The configuration of a detector: the content of its `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import MedMambaConfig, PreprocessConfig
from ..utils import config_checks as checks
from ..utils.config_checks import ConfigError

MODEL_TYPE = "medmamba-detector"


@dataclass
class DetectorConfig:
    """Backbone, pyramid, classes, preprocessing and provenance of one detector.

    Attributes:
        encoder: the MedMamba; its classifier is not used, and its `preprocess` is that of the detector.
        classes: names of what is detected.
        channels: of the feature pyramid and the detection head.
        first_stage: the finest stage the pyramid uses: 0 (stride 4) for small objects, 1 (stride 8) otherwise.
        score: probability from which a box is reported.
        overlap: IoU from which of two boxes of a class only the more probable is kept.
        most: boxes reported per image.
        training: provenance: dataset, split, licence, recipe, ...
        medmamba_version: version that wrote the file.

    Raises:
        ConfigError: a field of another type, out of range, or in contradiction to another.
    """

    MODEL_TYPE: ClassVar[str] = MODEL_TYPE

    encoder: MedMambaConfig
    classes: tuple[str, ...] = ("object",)
    channels: int = 96
    first_stage: int = 1
    score: float = 0.3
    overlap: float = 0.5
    most: int = 300
    training: dict[str, Any] = field(default_factory=dict)
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.encoder, Mapping):
            self.encoder = MedMambaConfig.from_dict(dict(self.encoder))
        if not isinstance(self.encoder, MedMambaConfig):
            raise ConfigError(f"encoder must be the configuration of a MedMamba, got {type(self.encoder).__name__}")
        if len(self.encoder.dims) != 4:
            raise ConfigError(f"the encoder needs four stages for the pyramid, it has {len(self.encoder.dims)}")
        if self.encoder.preprocess.crop_mode == "center":
            raise ConfigError(
                'preprocess.crop_mode "center" cuts off the margins of an image, where nothing could be detected; use '
                '"squash" or "pad"'
            )
        named = checks.several(self.classes, "classes", checks.MAX_CLASSES)
        if not named:
            raise ConfigError("classes names nothing to detect; give at least one, such as ('cell',)")
        self.classes = tuple(checks.labels(dict(enumerate(named)), len(named)).values())
        self.channels = checks.integer(self.channels, "channels", 64, 1024)
        if self.channels % 32:
            raise ConfigError(f"channels must be a multiple of 32, the groups of the head, got {self.channels}")
        self.first_stage = checks.integer(self.first_stage, "first_stage", 0, 2)
        self.score = checks.real(self.score, "score", 0, 1)
        self.overlap = checks.real(self.overlap, "overlap", 0, 1)
        self.most = checks.integer(self.most, "most", 1, 10_000)
        self.training = checks.training(self.training)
        self.medmamba_version = checks.text(self.medmamba_version, "medmamba_version", 100)

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
    def task(self) -> str:
        """ "detection"."""
        return "detection"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the encoder."""
        return self.encoder.depths

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.classes)

    @property
    def architecture(self) -> str:
        """Detector and variant of the encoder, for display."""
        return f"fcos-{self.encoder.architecture}"

    def replace(self, **changes: Any) -> DetectorConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "encoder"}
        return {"model_type": MODEL_TYPE, "encoder": self.encoder.to_dict(), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DetectorConfig:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: another kind of model, an unknown field, or values that contradict each other.
        """
        data = dict(data)
        if (found := data.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError(f'not a detector: model_type is {found!r:.80}, expected "{MODEL_TYPE}"')
        if unknown := sorted(set(data) - {f.name for f in dataclasses.fields(cls)}):
            raise ConfigError(
                f"config has unknown fields {unknown}; it was written by a newer version of medmamba (pip install -U "
                "medmamba) or by another project"
            )
        if "encoder" not in data:
            raise ConfigError("config has no 'encoder': it is incomplete, download or save it again")
        return cls(**data)
