"""Reads and writes `config.json`: the configuration, the checksum of the weights, and the fields that timm reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .._version import __version__
from ..config import ConfigError, MedMambaConfig
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME
from ..utils.strict_json import StrictJsonError, read_json
from .timm_config import FILE_FIELDS, timm_fields

MAX_CONFIG = 8 * 2**20  # bytes


def read_config(folder: str | os.PathLike) -> MedMambaConfig:
    """Reads `config.json` of a model folder.

    Raises:
        ConfigError: not valid JSON, written by another library, or with unknown or invalid fields.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        data = read_json(path, MAX_CONFIG)
    except StrictJsonError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
    if isinstance(data.get("model_type"), str | None) and data.get("model_type") != "medmamba" and "depths" not in data:
        if (kind := data.get("model_type")) in ("medmamba-segmenter", "medmamba-detector"):
            loader, command = {
                "medmamba-segmenter": ("MedMambaSegmenter", "segment"),
                "medmamba-detector": ("MedMambaDetector", "detect"),
            }[kind]
            raise ConfigError(
                f"{path} is of another kind of model; load it with medmamba.{loader}.from_pretrained, or use it with "
                f"the command medmamba {command}"
            )
        other = f"of type {data['model_type']!r}" if data.get("model_type") else "of another library"
        raise ConfigError(
            f"{path} is not a MedMamba config, but one {other}; this package loads models written by save_pretrained, "
            "and published MedMamba checkpoints (.pth) with medmamba.load_upstream"
        )
    data["architecture"] = data.pop("variant", data.get("architecture", "custom"))
    data = {key: value for key, value in data.items() if key not in (CHECKSUM_KEY, *FILE_FIELDS)}  # derived fields
    try:
        return MedMambaConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def write_config(config: MedMambaConfig, folder: Path, weights_sha256: str) -> None:
    """Writes `config.json`, and reads it back as a check.

    Args:
        weights_sha256: of the `model.safetensors` that it belongs to.

    Raises:
        ConfigError: `read_config` would reject what was written.
    """
    data = {
        **config.to_dict(),
        "medmamba_version": __version__,
        CHECKSUM_KEY: weights_sha256,
        **timm_fields(config),
        "variant": config.architecture,  # timm looks up its entry point by "architecture"
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    read_config(folder)
