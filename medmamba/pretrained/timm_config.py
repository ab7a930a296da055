"""The fields of `config.json` that timm reads: how to build the model and how to preprocess its images."""

from typing import Any

from ..config import MedMambaConfig

ENTRY_POINT = "medmamba"  # "architecture" in config.json: any variant, its shape in "model_args"
FILE_FIELDS = ("num_features", "pretrained_cfg", "model_args")  # fields of config.json that only timm reads
_SHAPE = ("depths", "dims", "d_state", "ssm_expand", "patch_size")
CROP_MODES = {"squash": "squash", "center": "center", "pad": "border"}


def timm_fields(config: MedMambaConfig) -> dict[str, Any]:
    """Returns the fields that timm reads: entry point, constructor arguments, preprocessing."""
    return {
        "architecture": ENTRY_POINT,
        "num_features": config.dims[-1],
        "model_args": {name: getattr(config, name) for name in _SHAPE},
        "pretrained_cfg": pretrained_cfg(config),
    }


def pretrained_cfg(config: MedMambaConfig) -> dict[str, Any]:
    """Returns timm's `pretrained_cfg` for a configuration."""
    preprocess = config.preprocess
    repeat = config.in_chans // len(preprocess.mean)
    return {
        "input_size": (config.in_chans, *preprocess.input_size),
        "interpolation": preprocess.interpolation,
        "crop_pct": 1.0,
        "crop_mode": CROP_MODES[preprocess.crop_mode],
        "mean": preprocess.mean * repeat,
        "std": preprocess.std * repeat,
        "num_classes": config.num_classes,
        "label_names": config.labels,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.03849",
    }
