"""The configuration of a MedMamba as a dataclass: the content of `config.json`, all that weights need beside them."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .utils import config_checks as checks
from .utils.config_checks import ConfigError
from .utils.decision_checks import decisions as checked_decisions

__all__ = ["VARIANTS", "ConfigError", "MedMambaConfig", "PreprocessConfig", "variant_config"]

MODEL_TYPE = "medmamba"
TASKS = ("multiclass", "multilabel", "ordinal")
ORGANISATION = "medmamba"  # on the Hub; a model name without one means this
BACKBONES = (f"{ORGANISATION}/tiny-medical", f"{ORGANISATION}/nano-medical")  # general starts for fine-tuning
DEFAULT_MODEL = f"{ORGANISATION}/bloodmnist-nano"  # small, quick on a laptop, and the one model in the package
# Upper limits, checked before anything of that size is allocated.
MAX_STAGES, MAX_BLOCKS = 8, 512
MAX_PARAMETERS = 4_000_000_000
MAX_SIDE, MAX_INPUT = 8192, 2**28  # pixels of a side; values of one input image, all channels


@dataclass
class PreprocessConfig:
    """How pixels in [0, 1] become the input the network was trained on (timm's vocabulary).

    The published recipe squashes to 224x224, aspect not kept, and maps [0, 1] to [-1, 1].
    """

    input_size: tuple[int, int] = (224, 224)  # height, width
    interpolation: str = "bilinear"  # "bilinear" or "bicubic", antialiased
    crop_mode: str = "squash"  # "squash": both sides resized; "center": short side resized, then cropped;
    #                            "pad": long side resized, then padded with black
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # one per channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        sides = checks.several(self.input_size, "preprocess.input_size", 2)
        if len(sides) != 2:
            raise ConfigError(f"preprocess.input_size must be (height, width), got {self.input_size}")
        height, width = (checks.integer(side, "a side of preprocess.input_size", 1, MAX_SIDE) for side in sides)
        self.input_size = height, width
        mean, std = (checks.several(getattr(self, name), f"preprocess.{name}", 1024) for name in ("mean", "std"))
        self.mean = tuple(checks.real(value, "preprocess.mean", -1e6, 1e6) for value in mean)
        self.std = tuple(checks.real(value, "preprocess.std, which must be positive,", 1e-6, 1e6) for value in std)
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"preprocess.interpolation must be bilinear or bicubic, got {self.interpolation!r}")
        if self.crop_mode not in ("squash", "center", "pad"):
            raise ConfigError(f"preprocess.crop_mode must be squash, center or pad, got {self.crop_mode!r}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(
                f"preprocess.mean and .std need one value per channel, or one for all; they have {len(self.mean)} and "
                f"{len(self.std)}"
            )


@dataclass
class MedMambaConfig:
    """Architecture, classes, preprocessing and provenance of one model.

    Only the first group shapes the network. `calibration` and `training` record how the weights were made, and
    `decisions` what was decided on validation images (`medmamba.decision`), in plain JSON values; `medmamba_version` is
    the version that wrote the file. Every field is validated on creation, before anything of the given sizes is
    allocated.

    Raises:
        ConfigError: a field of another type, out of range, or in contradiction to another.
    """

    architecture: str = "tiny"  # name of the variant, for display
    depths: tuple[int, ...] = (2, 2, 4, 2)  # blocks in each stage
    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels of each stage
    d_state: int = 16  # N, state size of the scan per channel
    ssm_expand: int = 2  # inner channels of the scan branch over its input channels
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000  # 0: no classifier
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0
    drop_rate: float = 0.0  # dropout before the classifier; 0 in the published model

    task: str = "multiclass"  # "multilabel": independent sigmoids instead of a softmax; "ordinal": ordered classes
    id2label: dict[int, str] = field(default_factory=dict)  # default: class_0, class_1, ...
    preprocess: PreprocessConfig = field(default_factory=dict)  # type: ignore[assignment]  # see __post_init__
    calibration: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # dataset, split, licence, source, recipe, ...
    medmamba_version: str = ""

    def __post_init__(self) -> None:
        self.architecture = checks.text(self.architecture, "architecture", 100)
        self.medmamba_version = checks.text(self.medmamba_version, "medmamba_version", 100)
        self._check_network()
        if self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        self.id2label = checks.labels(self.id2label, self.num_classes)
        self._check_preprocess()
        self.calibration = checks.calibration(self.calibration)
        thresholds = self.calibration.get("thresholds")
        if thresholds is not None and (self.task != "multilabel" or len(thresholds) != self.num_classes):
            raise ConfigError(
                f"calibration.thresholds are one per label of a multilabel model; this one is {self.task} with "
                f"{self.num_classes} classes and has {len(thresholds)}"
            )
        self.decisions = checked_decisions(self.decisions, self.labels, self.task)
        self.training = checks.training(self.training)

    def _check_network(self) -> None:
        depths, dims = (checks.several(getattr(self, name), name, MAX_STAGES) for name in ("depths", "dims"))
        self.depths = tuple(checks.integer(depth, "each of depths", -MAX_BLOCKS, MAX_BLOCKS) for depth in depths)
        self.dims = tuple(checks.integer(dim, "each of dims", -(2**16), 2**16) for dim in dims)
        if len(self.depths) != len(self.dims) or not self.depths or min(self.depths) < 1:
            raise ConfigError(f"depths {self.depths} and dims {self.dims} need one entry of at least 1 per stage")
        if sum(self.depths) > MAX_BLOCKS:
            raise ConfigError(f"depths {self.depths} are {sum(self.depths)} blocks; at most {MAX_BLOCKS} are allowed")
        if any(d % 2 or d < 2 for d in self.dims):
            raise ConfigError(f"dims {self.dims} must be even: each block halves its channels between two branches")
        if any(b != 2 * a for a, b in zip(self.dims, self.dims[1:], strict=False)):
            raise ConfigError(f"dims {self.dims}: each stage must have twice the channels of the one before")
        for name, low, high in (
            ("d_state", 1, 4096),
            ("ssm_expand", 1, 64),
            ("patch_size", 1, 256),
            ("in_chans", 1, 1024),
            ("num_classes", 0, checks.MAX_CLASSES),
        ):
            setattr(self, name, checks.integer(getattr(self, name), name, low, high))
        for name in ("drop_path_rate", "drop_rate"):
            setattr(self, name, checks.real(getattr(self, name), name, 0, 1, open_high=True))
        if self.parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"dims {self.dims} and depths {self.depths} make {self.parameters / 1e9:.1f} billion parameters; at "
                f"most {MAX_PARAMETERS / 1e9:.0f} are allowed"
            )

    def _check_preprocess(self) -> None:
        if isinstance(self.preprocess, Mapping):
            given = dict(self.preprocess)
            if self.in_chans != 3 and not {"mean", "std"} & set(given):
                given |= {"mean": (0.5,), "std": (0.5,)}
            self.preprocess = _from_dict(PreprocessConfig, given, "preprocess")
        if not isinstance(self.preprocess, PreprocessConfig):
            raise ConfigError(f"preprocess must be an object, got {self.preprocess!r:.80}")
        # In case it was changed after it was made.
        self.preprocess = dataclasses.replace(self.preprocess)
        if len(self.preprocess.mean) not in (1, self.in_chans):
            raise ConfigError(
                f"preprocess.mean has {len(self.preprocess.mean)} values for {self.in_chans} channels; give one per "
                "channel, or one for all"
            )
        if min(self.preprocess.input_size) < self.min_size:
            raise ConfigError(
                f"each side of preprocess.input_size must be at least {self.min_size} for patches of {self.patch_size} "
                f"pixels and {len(self.depths)} stages; got {self.preprocess.input_size}"
            )
        if math.prod(self.preprocess.input_size) * self.in_chans > MAX_INPUT:
            raise ConfigError(
                f"preprocess.input_size {self.preprocess.input_size} with {self.in_chans} channels is too large"
            )

    @property
    def min_size(self) -> int:
        """Minimum height and width of an image, in pixels: patches and mergings must leave at least one pixel."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters of the network."""
        p = self.patch_size
        total = self.dims[0] * (self.in_chans * p * p + 3) + self.num_classes * (self.dims[-1] + 1)
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            h, n, r, k = dim // 2, self.d_state, self.dt_rank(stage), 4
            c = self.ssm_expand * h
            conv = 19 * h * h + 9 * h  # two 3x3 and one 1x1 convolution, three batch norms
            scan = 3 * h * c + 12 * c + k * c * (r + 2 * n) + k * c * (r + n + 2)  # projections, depthwise, norm, scan
            total += depth * (conv + 2 * h + scan)
            if stage + 1 < len(self.dims):
                total += 8 * dim + 8 * dim * dim  # merging
        return total

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits."""
        return [self.id2label[i] for i in range(self.num_classes)]

    def dt_rank(self, stage: int) -> int:
        """Returns R, the rank of the step size projection in a stage's scan branch."""
        return math.ceil(self.dims[stage] // 2 / 16)

    def replace(self, **changes: Any) -> "MedMambaConfig":
        """Returns a copy with some fields changed.

        A new `num_classes` without `id2label` resets the labels; other classes reset the decisions.
        A new `in_chans` without `preprocess` keeps mean and std if they are equal for all channels, else takes their
        averages and warns.
        """
        if changes.get("num_classes", self.num_classes) != self.num_classes:
            changes.setdefault("id2label", {})
        if {"id2label", "task"} & set(changes):
            changes.setdefault("decisions", {})  # they name the classes of before
        if changes.get("in_chans", self.in_chans) != self.in_chans and "preprocess" not in changes:
            changes["preprocess"] = self._for_any_channels()
        return dataclasses.replace(self, **changes)

    def _for_any_channels(self) -> PreprocessConfig:
        mean, std = self.preprocess.mean, self.preprocess.std
        averages = sum(mean) / len(mean), sum(std) / len(std)
        if len(set(mean)) == len(set(std)) == 1:
            averages = mean[0], std[0]
        else:
            warnings.warn(
                f"mean {mean} and std {std} are of {self.in_chans} channels; their averages, {averages[0]:.4g} and "
                f"{averages[1]:.4g}, are used for the new ones. Give preprocess=... to set others",
                stacklevel=3,
            )
        return dataclasses.replace(self.preprocess, mean=(averages[0],), std=(averages[1],))

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MedMambaConfig":
        """Reads what `to_dict` wrote.

        Raises:
            ConfigError: not a MedMamba config, an unknown field, or values that contradict each other.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a config must be an object, got {data!r:.80}")
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
    """Returns the configuration of a named variant, with fields overridden.

    Raises:
        ConfigError: unknown name, unknown field or contradicting values.
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant {name!r}; there are: {', '.join(VARIANTS)}")
    fields = {"architecture": name, **VARIANTS[name]}
    if isinstance(overrides.get("preprocess"), Mapping):  # changes what it names, and leaves the rest to the variant
        overrides["preprocess"] = {**fields.get("preprocess", {}), **overrides["preprocess"]}
    return _from_dict(MedMambaConfig, {**fields, **overrides}, f"variant {name!r}")


def _from_dict(cls: Any, data: dict[str, Any], what: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    data = {str(name): value for name, value in data.items()}
    if unknown := sorted(set(data) - known):
        raise ConfigError(
            f"{what} has unknown fields {unknown}; it was written by a newer version of medmamba "
            "(pip install -U medmamba) or by another project"
        )
    return cls(**data)
