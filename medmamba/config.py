"""What a MedMamba is, in one dataclass: what `config.json` holds, and all that a checkpoint needs beside weights."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

MODEL_TYPE = "medmamba"


class ConfigError(ValueError):
    """A configuration that is foreign, incomplete or contradicts itself."""


@dataclass
class PreprocessConfig:
    """From an image with pixels in [0, 1] to the tensor the network was trained on (timm's vocabulary).

    The published recipe squashes to 224x224, aspect not kept, and maps [0, 1] to [-1, 1].
    """

    input_size: tuple[int, int] = (224, 224)  # height, width
    interpolation: str = "bilinear"  # "bilinear" or "bicubic", antialiased
    crop_mode: str = "squash"  # "squash": both sides resized; "center": short side resized, then cropped;
    #                            "pad": long side resized, then padded with black
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one per channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        self.input_size = _tuple(self.input_size, int)  # type: ignore[assignment]
        self.mean, self.std = _tuple(self.mean, float), _tuple(self.std, float)
        if len(self.input_size) != 2 or min(self.input_size) < 32:
            raise ConfigError(f"preprocess.input_size must be (height, width), each at least 32; got {self.input_size}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"preprocess.interpolation must be bilinear or bicubic, got {self.interpolation!r}")
        if self.crop_mode not in ("squash", "center", "pad"):
            raise ConfigError(f"preprocess.crop_mode must be squash, center or pad, got {self.crop_mode!r}")
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ConfigError("preprocess.mean and .std need one value per channel, and std must be positive")


@dataclass
class MedMambaConfig:
    """Architecture, classes, preprocessing and provenance of one model.

    Only the first group shapes the network. `calibration` and `training` are free-form records of how the weights came
    to be; `medmamba_version` is the version that wrote the file.
    """

    architecture: str = "tiny"  # the name of the variant, for people
    depths: tuple[int, ...] = (2, 2, 4, 2)  # blocks in each stage
    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage
    d_state: int = 16  # N, state size of the scan per channel
    ssm_expand: int = 2  # inner channels of the scan branch over its input channels
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000  # 0: no classifier
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0
    drop_rate: float = 0.0  # dropout before the classifier; 0 in the published model

    task: str = "multiclass"  # or "multilabel": independent sigmoids instead of a softmax
    id2label: dict[int, str] = field(default_factory=dict)  # default: class_0, class_1, ...
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    calibration: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # dataset, split, licence, source, recipe, ...
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        self.depths, self.dims = _tuple(self.depths, int), _tuple(self.dims, int)
        if isinstance(self.preprocess, dict):
            self.preprocess = _from_dict(PreprocessConfig, self.preprocess, "preprocess")
        # JSON turns integer keys into strings.
        self.id2label = {int(k): str(v) for k, v in self.id2label.items()}
        if not self.id2label:
            self.id2label = {i: f"class_{i}" for i in range(self.num_classes)}
        self._check()

    def _check(self) -> None:
        if len(self.depths) != len(self.dims) or not self.depths or min(self.depths) < 1:
            raise ConfigError(f"depths {self.depths} and dims {self.dims} need one entry of at least 1 per stage")
        if any(d % 2 or d < 2 for d in self.dims):
            raise ConfigError(f"dims {self.dims} must be even: each block halves its channels between two branches")
        if any(b != 2 * a for a, b in zip(self.dims, self.dims[1:], strict=False)):
            raise ConfigError(f"dims {self.dims}: each stage must have twice the channels of the one before")
        if min(self.d_state, self.ssm_expand, self.patch_size, self.in_chans) < 1 or self.num_classes < 0:
            raise ConfigError("d_state, ssm_expand, patch_size and in_chans must be at least 1, num_classes at least 0")
        if self.task not in ("multiclass", "multilabel"):
            raise ConfigError(f"task must be multiclass or multilabel, got {self.task!r}")
        if sorted(self.id2label) != list(range(self.num_classes)):
            raise ConfigError(
                f"id2label must name classes 0 to {self.num_classes - 1}; it names {sorted(self.id2label)}"
            )
        if len(self.preprocess.mean) not in (1, self.in_chans):
            raise ConfigError(f"preprocess.mean has {len(self.preprocess.mean)} values for {self.in_chans} channels")

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.id2label[i] for i in range(self.num_classes)]

    def dt_rank(self, stage: int) -> int:
        """R, the rank of the step size projection in a stage's scan branch."""
        return math.ceil(self.dims[stage] // 2 / 16)

    def replace(self, **changes: Any) -> "MedMambaConfig":
        """A copy with some fields changed. A new `num_classes` without `id2label` resets the labels."""
        if changes.get("num_classes", self.num_classes) != self.num_classes:
            changes.setdefault("id2label", {})
        if changes.get("in_chans", self.in_chans) != self.in_chans and "preprocess" not in changes:
            changes["preprocess"] = dataclasses.replace(self.preprocess, mean=(0.5,), std=(0.5,))
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MedMambaConfig":
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: not a MedMamba config, an unknown field, or values that contradict each other.
        """
        data = dict(data)
        if (found := data.pop("model_type", None)) != MODEL_TYPE:
            raise ConfigError(f'not a MedMamba config: model_type is {found!r}, expected "{MODEL_TYPE}"')
        for required in ("depths", "dims", "num_classes"):
            if required not in data:
                raise ConfigError(f"config has no {required!r}: it is incomplete, download or save it again")
        return _from_dict(cls, data, "config")


# Depths of the third stage: 4, 8, 12 in the published code; the sizes in the paper's tables (22.8M, 47.1M parameters)
# are those of 12 and 16. `nano` is this project's own, for CPUs; `test` is for tests.
VARIANTS: dict[str, dict[str, Any]] = {
    "nano": dict(depths=(2, 2, 4, 2), dims=(32, 64, 128, 256)),
    "tiny": dict(depths=(2, 2, 4, 2), dims=(96, 192, 384, 768)),
    "small": dict(depths=(2, 2, 8, 2), dims=(96, 192, 384, 768)),
    "base": dict(depths=(2, 2, 12, 2), dims=(128, 256, 512, 1024)),
    "small-paper": dict(depths=(2, 2, 12, 2), dims=(96, 192, 384, 768)),
    "base-paper": dict(depths=(2, 2, 16, 2), dims=(128, 256, 512, 1024)),
    "test": dict(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), preprocess=dict(input_size=(32, 32))),
}


def variant_config(name: str, **overrides: Any) -> MedMambaConfig:
    """The configuration of a named variant, with fields overridden.

    Raises:
        ConfigError: unknown name, unknown field or contradicting values.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant {name!r}; there are: {', '.join(VARIANTS)}")
    fields = {"architecture": name, **VARIANTS[name]}
    if overrides.get("in_chans", 3) != 3 and "preprocess" not in overrides:
        fields["preprocess"] = {**fields.get("preprocess", {}), "mean": (0.5,), "std": (0.5,)}
    return _from_dict(MedMambaConfig, {**fields, **overrides}, f"variant {name!r}")


def _tuple(values: Any, kind: type) -> tuple:
    return tuple(kind(v) for v in values)


def _from_dict(cls: Any, data: dict[str, Any], what: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"{what} has unknown fields {unknown}; it was written by a newer version of medmamba "
            "(pip install -U medmamba) or by another project"
        )
    return cls(**data)
