"""Folders of models other than classifiers: `config.json` and `model.safetensors`, loaded as strictly as a MedMamba."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from .._version import __version__
from ..config import ConfigError
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, PretrainedError, file_hash
from ..utils.files import staged
from ..utils.strict_json import StrictJsonError, read_json
from ..utils.weights import read_weights
from .config_file import MAX_CONFIG
from .sources import fetch
from .weights_file import check_header, differences, listed, load_strict, not_finite, read_header, shapes

LOADERS = {
    "medmamba": "MedMamba",
    "medmamba-segmenter": "MedMambaSegmenter",
    "medmamba-detector": "MedMambaDetector",
}
"""Kinds of models, as `config.json` names them, and the class of `medmamba` that loads each."""
COMMANDS = {"medmamba": "predict", "medmamba-segmenter": "segment", "medmamba-detector": "detect"}
"""The same, and the subcommand that takes each."""


class FolderMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a module built from a configuration with an `encoder`.

    Attributes:
        config_class: has `from_dict`, `to_dict` and `encoder`, a `MedMambaConfig`.
    """

    config_class: ClassVar[Any]
    config: Any

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Any:
        """Loads a model in eval mode, in float32 on the CPU.

        Args: as those of `MedMamba.from_pretrained`.

        Raises:
            PretrainedError: not found, unreachable or damaged, or the weights do not match the configuration.
            ConfigError: the configuration of another kind of model, or an invalid one.
        """
        folder = fetch(name, revision, cache_dir, token, local_files_only, force_download)
        config, header = read_folder_config(folder, cls.config_class), read_header(folder / WEIGHTS_NAME)
        check_header(header, config.encoder, str(folder))
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        if problems := differences(shapes(model.state_dict()), shapes(header)):
            raise PretrainedError(f"{folder} does not match its configuration: {listed(problems)}")
        tensors = read_weights(folder)
        if broken := not_finite(tensors):
            raise PretrainedError(
                f"{folder}: {len(broken)} of {len(tensors)} tensors contain NaN or infinity ({listed(broken, 3)}): "
                "training diverged; use an earlier checkpoint"
            )
        load_strict(model, tensors, str(folder))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Saves `model.safetensors` and `config.json`; an existing model is replaced only when both are written.

        Args:
            dtype: type in which matrices are stored, e.g. torch.float16 for half the size. Vectors and the parameters
                of the scan stay float32.

        Raises:
            PretrainedError: weights that are not finite, or of a fused copy.
        """
        from safetensors.torch import save_file

        tensors = {}
        for key, tensor in self.state_dict().items():  # type: ignore[attr-defined]
            shrink = dtype is not None and tensor.ndim > 1 and not key.endswith(("A_log", "D", "dt_bias"))
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype if shrink else None).contiguous().clone()
        with torch.device("meta"):
            blank: Any = type(self)(self.config)  # type: ignore[call-arg]
        if problems := differences(shapes(blank.state_dict()), shapes(tensors)):
            raise PretrainedError(f"the model was not saved, because it could not be loaded again: {listed(problems)}")
        if broken := not_finite(tensors):
            raise PretrainedError(f"the model was not saved: NaN or infinity in {listed(broken, 3)}")
        folder = Path(folder)
        with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as staging:
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            data = {**self.config.to_dict(), "medmamba_version": __version__}
            data[CHECKSUM_KEY] = file_hash(staging / WEIGHTS_NAME)
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            read_folder_config(staging, self.config_class)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the model to the Hub in one commit and returns the URL of that commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="medmamba", library_version=__version__)
        with tempfile.TemporaryDirectory() as staging:
            self.save_pretrained(staging)
            api.create_repo(repo_id, private=private, exist_ok=True)
            info = api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Upload MedMamba model")
        return str(info.commit_url)


def read_folder_config(folder: str | os.PathLike, config_class: Any) -> Any:
    """Reads `config.json` of a model folder as a `config_class`.

    Raises:
        ConfigError: not valid JSON, another kind of model, or unknown or invalid fields.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        data = read_json(path, MAX_CONFIG)
    except StrictJsonError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
    kind = data.get("model_type")
    if isinstance(kind, str) and kind != config_class.MODEL_TYPE and kind in LOADERS:
        raise ConfigError(
            f"{path} is of another kind of model; load it with medmamba.{LOADERS[kind]}.from_pretrained, or use it "
            f"with the command medmamba {COMMANDS[kind]}"
        )
    data.pop(CHECKSUM_KEY, None)
    try:
        return config_class.from_dict(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
