"""The configuration of a segmentation model: the content of its `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..dense.config import EncoderModelConfig, class_names
from ..utils import config_checks as checks
from ..utils.config_checks import ConfigError

DECODERS = ("unet", "unetplusplus", "manet", "linknet", "fpn", "upernet", "segformer")  # those without dilated encoders
_FIXED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")


@dataclass
class SegmenterConfig(EncoderModelConfig):
    """Encoder, decoder, classes, preprocessing and provenance of one segmentation model.

    Attributes:
        encoder: the MedMamba; its classifier is not used, and its `preprocess` is that of the segmenter.
        decoder: an architecture of segmentation_models_pytorch, one of `DECODERS`.
        decoder_options: its keyword arguments, such as {"decoder_channels": [128, 64, 32, 16, 16]}.
        classes: names of what is segmented, without the background.
        exclusive: each pixel belongs to one class or to the background (softmax, and one output more for the
            background). Otherwise classes may overlap (a sigmoid each); always so for a single class.
        thresholds: probability from which a pixel belongs to a class; one for each class. Not used if `exclusive`.
        training: provenance: dataset, split, licence, recipe, ...
        medmamba_version: version that wrote the file.

    Raises:
        ConfigError: a field of another type, out of range, or in contradiction to another.
    """

    MODEL_TYPE: ClassVar[str] = "medmamba-segmenter"

    decoder: str = "unet"
    decoder_options: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ("object",)
    exclusive: bool = False
    thresholds: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        self.decoder_options = _options(self.decoder_options)
        self.classes = class_names(self.classes)
        if not isinstance(self.exclusive, bool):
            raise ConfigError(f"exclusive must be true or false, got {self.exclusive!r:.80}")
        if self.exclusive and len(self.classes) == 1:
            self.exclusive = False  # the same thing with one output fewer
        given = checks.several(self.thresholds, "thresholds", checks.MAX_CLASSES) or [0.5] * len(self.classes)
        if len(given) != len(self.classes):
            raise ConfigError(f"thresholds must have one value per class: {len(self.classes)}, got {len(given)}")
        self.thresholds = tuple(checks.real(value, "each of thresholds", 0, 1) for value in given)
        self.training = checks.training(self.training)
        self.medmamba_version = checks.text(self.medmamba_version, "medmamba_version", 100)

    @property
    def task(self) -> str:
        """ "segmentation"."""
        return "segmentation"

    @property
    def architecture(self) -> str:
        """Decoder and variant of the encoder, for display."""
        return f"{self.decoder}-{self.encoder.architecture}"

    @property
    def outputs(self) -> int:
        """Channels of the network's output: the classes, after the background if they are exclusive."""
        return len(self.classes) + self.exclusive


def _options(found: Any) -> dict[str, Any]:
    """Checks arguments of a decoder: plain values, and none that the rest of the configuration decides."""
    options = checks.plain(found, "decoder_options")
    if clash := sorted(set(options) & set(_FIXED)):
        raise ConfigError(f"decoder_options may not set {', '.join(clash)}, which the other fields decide")
    for name, value in options.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            # A bound for what a downloaded file can make a constructor allocate.
            if isinstance(number, int | float) and not -4096 <= number <= 4096:
                raise ConfigError(f"decoder_options.{name} is out of range: {number}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
