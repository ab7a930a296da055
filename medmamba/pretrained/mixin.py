"""Loading and saving: a folder with one `config.json` and one `model.safetensors`, local, bundled or on the Hub.

Loading is strict: every tensor must be there, in its shape, and nothing else. Pickles are never read.
"""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ORGANISATION, ConfigError, MedMambaConfig
from ..inference.fingerprint import fingerprint
from ..inference.fitted import FINGERPRINT, FittedMixin, bind_loaded, body, in_force
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, PretrainedError, file_hash
from ..utils.files import staged
from ..utils.strict_json import StrictJsonError, read_json
from .archives import MAX_CONFIG
from .sources import bundled_models, fetch
from .timm_config import FILE_FIELDS, timm_fields
from .weights_file import check_header, differences, listed, not_finite, read_header, shapes

__all__ = [
    "CONFIG_NAME",
    "ORGANISATION",
    "WEIGHTS_NAME",
    "PretrainedError",
    "PretrainedMixin",
    "bundled_models",
    "fetch",
    "load_strict",
    "read_config",
    "read_weights",
]


def read_config(folder: Path) -> MedMambaConfig:
    """Reads `config.json`.

    Raises:
        ConfigError: not JSON, foreign, or stale.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        data = read_json(path, MAX_CONFIG)
    except StrictJsonError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
    if isinstance(data.get("model_type"), str | None) and data.get("model_type") != "medmamba" and "depths" not in data:
        other = f"of the type {data['model_type']!r}" if data.get("model_type") else "of another library"
        raise ConfigError(
            f"{path} is not a MedMamba config, but {other}; this package reads what save_pretrained wrote, and "
            "published MedMamba checkpoints (.pth) by medmamba.load_upstream"
        )
    # The file also holds what timm and a checksum need, all derived from the rest; see `_file_config`.
    data["architecture"] = data.pop("variant", data.get("architecture", "custom"))
    data = {key: value for key, value in data.items() if key not in (CHECKSUM_KEY, *FILE_FIELDS)}
    try:
        return MedMambaConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads `model.safetensors`, half precision widened to float32.

    Raises:
        PretrainedError: cut short or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise PretrainedError(f"{path} is damaged or cut short ({error}); download or save it again") from error
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Gives the model these tensors; the model may be on the meta device.

    Raises:
        PretrainedError: a tensor is missing, unknown or of another shape.
    """
    if problems := differences(shapes(model.state_dict()), shapes(tensors)):
        raise PretrainedError(f"{source} does not fit its configuration: {listed(problems)}")
    model.load_state_dict(tensors, assign=True)


class PretrainedMixin(FittedMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a module built from a `MedMambaConfig`."""

    @classmethod
    def _from_config(cls, config: MedMambaConfig) -> Any:
        """A new model; a subclass with another constructor says here how it is built."""
        return cls(config)  # type: ignore[call-arg]

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
    ):
        """A model in eval mode, in float32 on the CPU, with its warning for unusual images where the folder has one.

        Args:
            name: "medmamba/bloodmnist", "org/name@revision", or a folder written by `save_pretrained`.
            revision: branch, tag or commit on the Hub; a commit that is cached needs no network.
            token: for private models; default: the one stored by `hf auth login`.

        Raises:
            PretrainedError: not found, unreachable, damaged, or weights that do not fit.
            ConfigError: a stale or foreign configuration.
            UnusualError: an `unusual.json` that cannot be read.
        """
        from ..inference.ood import NAME, UnusualError, load_unusual

        folder = fetch(name, revision, cache_dir, token, local_files_only, force_download, sidecars=[NAME])
        config, header = read_config(folder), read_header(folder / WEIGHTS_NAME)
        check_header(header, config, str(folder))
        with torch.device("meta"):  # no time spent on initialising what is about to be replaced
            model = cls._from_config(config)
        # Compared before anything of the size of the tensors is allocated.
        if problems := differences(shapes(model.state_dict()), shapes(header)):
            raise PretrainedError(f"{folder} does not fit its configuration: {listed(problems)}")
        tensors = read_weights(folder)
        if broken := not_finite(tensors):
            which = f"{len(broken)} of {len(tensors)} tensors ({listed(broken, 3)})"
            raise PretrainedError(
                f"{folder}: {which} have NaN or infinity in them, so every answer would be NaN: the training diverged, "
                "or the file was damaged before it was saved. Take an earlier checkpoint; "
                "medmamba.pretrained.mixin.read_weights(folder) reads the tensors as they are"
            )
        load_strict(model, tensors, str(folder))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        unusual = load_unusual(folder)
        if unusual is None and (folder / NAME).is_file():
            warnings.warn(f"{folder / NAME} belongs to other weights, and is not used; delete it", stacklevel=2)
        if unusual is not None and unusual.means.shape[1] != config.dims[-1]:
            width = unusual.means.shape[1]
            raise UnusualError(f"{folder / NAME} is of {width} features, the model has {config.dims[-1]}; delete it")
        bind_loaded(model, unusual, tensors)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Writes `model.safetensors`, `config.json` and, where there is a warning for unusual images, `unusual.json`.

        An existing model there is replaced only once all are written, the weights last. What could not be loaded
        again is not written; a calibration or a warning that was learnt with other weights is left out, and said.

        Args:
            dtype: store matrices in this type, e.g. torch.float16 for half the size. Vectors and the scan's parameters
                stay float32: they are small, and A is an exponent.

        Raises:
            PretrainedError: a classifier, layers or values that `from_pretrained` would refuse.
            ConfigError: a configuration that it would refuse.
            DiskFullError: no space; what was there before is unchanged.
        """
        from safetensors.torch import save_file

        from ..inference.ood import NAME

        folder = Path(folder)
        tensors = {}
        for key, tensor in self.state_dict().items():  # type: ignore[attr-defined]
            shrink = dtype is not None and tensor.ndim > 1 and not key.endswith(("A_log", "D", "dt_bias"))
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype if shrink else None).contiguous().clone()
        _check_loadable(self, tensors, dtype)
        config, unusual, _ = in_force(self)
        weights = fingerprint(tensors) if config.calibration or unusual else {}
        if config.calibration:
            config = config.replace(calibration={**config.calibration, FINGERPRINT: weights})
        with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as staging:
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            data = _file_config(config, staging / WEIGHTS_NAME)
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            (staging / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            read_config(staging)
            if unusual:
                unusual.write(staging / NAME, data[CHECKSUM_KEY], fingerprint(body(tensors)))
        if not unusual:
            (folder / NAME).unlink(missing_ok=True)  # of the weights that were there before
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload MedMamba model",
        dtype: torch.dtype | None = None,
        card: str | os.PathLike | None = None,
    ) -> str:
        """Uploads the model in one commit and returns the address of that commit.

        Args:
            card: a model card (README.md) to upload beside it.
        """
        from huggingface_hub import HfApi

        from .._version import __version__

        api = HfApi(token=token, library_name="medmamba", library_version=__version__)
        with tempfile.TemporaryDirectory() as staging:
            self.save_pretrained(staging, dtype=dtype)
            if card is not None:
                shutil.copyfile(card, Path(staging) / "README.md")
            api.create_repo(repo_id, private=private, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo_id, folder_path=staging, revision=revision, commit_message=commit_message
            )
        return str(info.commit_url)


def _check_loadable(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Compares what is about to be written with what `from_pretrained` will build from the same configuration.

    Raises:
        PretrainedError: other tensors, or values that are not finite.
    """
    problems: list[str] | None = None
    for cls in type(model).__mro__:
        if not hasattr(cls, "_from_config"):
            break
        try:
            with torch.device("meta"):
                blank = cls._from_config(model.config)
        except (TypeError, AttributeError):
            continue  # its constructor takes something else; it may still be loaded as the class it extends
        found = differences(shapes(blank.state_dict()), shapes(tensors))
        problems = found if problems is None or not found else problems
        if not found:
            break
    if problems is None:
        problems = ["no constructor takes its configuration alone"]
    if problems:
        raise PretrainedError(f"this model could not be loaded again, so it was not saved: {_why(problems)}")
    if broken := not_finite(tensors):
        fits = dtype is not None and not not_finite({name: model.state_dict()[name] for name in broken})
        how = f"save it without dtype={dtype}, in which they overflow" if fits else "its training diverged"
        raise PretrainedError(
            f"{len(broken)} of {len(tensors)} tensors have NaN or infinity in them ({listed(broken, 3)}), so the model "
            f"was not saved: {how}"
        )


def _why(problems: list[str]) -> str:
    names = " ".join(problems)
    if "head." in problems[0] and all("head." in problem for problem in problems):
        return (
            f"its classifier is not the one of its configuration ({listed(problems)}). Use "
            "model.reset_classifier(num_classes, id2label=...) instead of replacing model.head"
        )
    if "parametrizations" in names:
        return (
            f"it has parametrizations ({listed(problems, 2)}); torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if any(word in names for word in ("lora_", "base_layer", "modules_to_save", "adapter")):
        return f"it has adapters ({listed(problems, 2)}); merge them first (in PEFT: model.merge_and_unload())"
    if ".scale" in names and ".shift" in names:
        return "it is a fused copy for inference; save the model that it was made of"
    return f"its layers are not those of its configuration ({listed(problems)})"


def _file_config(config: MedMambaConfig, weights: Path) -> dict[str, Any]:
    """What `config.json` holds: the configuration, who wrote it, which weights it goes with, and what timm reads."""
    from .._version import __version__

    return {
        **config.to_dict(),
        "medmamba_version": __version__,
        CHECKSUM_KEY: file_hash(weights),
        **timm_fields(config),
        "variant": config.architecture,  # timm looks its entry point up by "architecture"
    }
