"""The configuration of a detector: the content of its `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..dense.config import EncoderModelConfig, class_names
from ..utils import config_checks as checks
from ..utils.config_checks import ConfigError


@dataclass
class DetectorConfig(EncoderModelConfig):
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

    MODEL_TYPE: ClassVar[str] = "medmamba-detector"

    classes: tuple[str, ...] = ("object",)
    channels: int = 96
    first_stage: int = 1
    score: float = 0.3
    overlap: float = 0.5
    most: int = 300
    training: dict[str, Any] = field(default_factory=dict)
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classes = class_names(self.classes)
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
    def task(self) -> str:
        """ "detection"."""
        return "detection"

    @property
    def architecture(self) -> str:
        """Detector and variant of the encoder, for display."""
        return f"fcos-{self.encoder.architecture}"
