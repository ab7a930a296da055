"""The configuration of a segmentation model: the content of its `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import MedMambaConfig, PreprocessConfig
from ..utils import config_checks as checks
from ..utils.config_checks import ConfigError

MODEL_TYPE = "medmamba-segmenter"
DECODERS = ("unet", "unetplusplus", "manet", "linknet", "fpn", "upernet", "segformer")  # those without dilated encoders
_FIXED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")


@dataclass
class SegmenterConfig:
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

    MODEL_TYPE: ClassVar[str] = MODEL_TYPE

    encoder: MedMambaConfig
    decoder: str = "unet"
    decoder_options: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ("object",)
    exclusive: bool = False
    thresholds: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.encoder, Mapping):
            self.encoder = MedMambaConfig.from_dict(dict(self.encoder))
        if not isinstance(self.encoder, MedMambaConfig):
            raise ConfigError(f"encoder must be the configuration of a MedMamba, got {type(self.encoder).__name__}")
        if len(self.encoder.dims) != 4:
            raise ConfigError(f"the encoder needs four stages for the decoders, it has {len(self.encoder.dims)}")
        if self.encoder.preprocess.crop_mode == "center":
            raise ConfigError(
                'preprocess.crop_mode "center" cuts off the margins of an image, of which a segmentation would know '
                'nothing; use "squash" or "pad"'
            )
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        self.decoder_options = _options(self.decoder_options)
        named = checks.several(self.classes, "classes", checks.MAX_CLASSES)
        if not named:
            raise ConfigError("classes names nothing to segment; give at least one, such as ('lesion',)")
        self.classes = tuple(checks.labels(dict(enumerate(named)), len(named)).values())
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
        """ "segmentation"."""
        return "segmentation"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the encoder."""
        return self.encoder.depths

    @property
    def num_classes(self) -> int:
        """Number of classes, without the background."""
        return len(self.classes)

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.classes)

    @property
    def architecture(self) -> str:
        """Decoder and variant of the encoder, for display."""
        return f"{self.decoder}-{self.encoder.architecture}"

    @property
    def outputs(self) -> int:
        """Channels of the network's output: the classes, after the background if they are exclusive."""
        return len(self.classes) + self.exclusive

    def replace(self, **changes: Any) -> SegmenterConfig:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "encoder"}
        return {"model_type": MODEL_TYPE, "encoder": self.encoder.to_dict(), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegmenterConfig:
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: another kind of model, an unknown field, or values that contradict each other.
        """
        data = dict(data)
        if (found := data.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError(f'not a segmentation model: model_type is {found!r:.80}, expected "{MODEL_TYPE}"')
        if unknown := sorted(set(data) - {f.name for f in dataclasses.fields(cls)}):
            raise ConfigError(
                f"config has unknown fields {unknown}; it was written by a newer version of medmamba (pip install -U "
                "medmamba) or by another project"
            )
        if "encoder" not in data:
            raise ConfigError("config has no 'encoder': it is incomplete, download or save it again")
        return cls(**data)


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
