"""Loads, saves and publishes models: a folder with one `config.json` and one `model.safetensors`.

Loading is strict: every tensor must be present in its expected shape, and no other. Pickles are never read.
"""

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..config import MedMambaConfig
from ..inference.fingerprint import fingerprint
from ..inference.fitted import FINGERPRINT, FittedMixin, bind_loaded, body, in_force
from ..inference.ood import NAME as OOD_NAME
from ..inference.ood import UnusualError, load_unusual
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME, PretrainedError, file_hash
from ..utils.files import staged
from ..utils.weights import read_weights
from .config_file import read_config, write_config
from .sources import fetch
from .weights_file import check_header, differences, listed, load_strict, not_finite, read_header, shapes


class PretrainedMixin(FittedMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a module built from a `MedMambaConfig`."""

    @classmethod
    def _from_config(cls, config: MedMambaConfig) -> Any:
        """Builds a new model; override it in a subclass whose constructor takes other arguments."""
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
        """Loads a model in eval mode, in float32 on the CPU, with its OOD detector where the folder has one.

        Args:
            name: "medmamba/bloodmnist", "org/name@revision", a folder written by `save_pretrained`, a zip of one, or an
                fsspec address.
            revision: branch, tag or commit on the Hub; a cached commit needs no network.
            cache_dir: where downloads are kept; default: the Hub's cache.
            token: for private models; default: the one stored by `hf auth login`.
            local_files_only: do not access the network.
            force_download: download again what is cached.

        Raises:
            PretrainedError: not found, unreachable or damaged, or the weights do not match the configuration.
            ConfigError: an outdated configuration, or one of another library.
            UnusualError: an `unusual.json` that cannot be read.
        """
        folder = fetch(name, revision, cache_dir, token, local_files_only, force_download, sidecars=[OOD_NAME])
        config, header = read_config(folder), read_header(folder / WEIGHTS_NAME)
        check_header(header, config, str(folder))
        with torch.device("meta"):  # skips the initialisation of weights that are replaced below
            model = cls._from_config(config)
        # Compared before memory for the tensors is allocated.
        if problems := differences(shapes(model.state_dict()), shapes(header)):
            raise PretrainedError(f"{folder} does not match its configuration: {listed(problems)}")
        tensors = read_weights(folder)
        if broken := not_finite(tensors):
            which = f"{len(broken)} of {len(tensors)} tensors ({listed(broken, 3)})"
            raise PretrainedError(
                f"{folder}: {which} contain NaN or infinity, so every output would be NaN: training diverged, or the "
                "weights were corrupted before they were saved. Use an earlier checkpoint; "
                "medmamba.pretrained.read_weights(folder) reads the tensors as they are"
            )
        load_strict(model, tensors, str(folder))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        unusual = load_unusual(folder)
        if unusual is None and (folder / OOD_NAME).is_file():
            warnings.warn(f"{folder / OOD_NAME} was fitted with other weights and is ignored; delete it", stacklevel=2)
        if unusual is not None and (width := unusual.means.shape[1]) != config.dims[-1]:
            raise UnusualError(f"{folder / OOD_NAME} has {width} features, the model {config.dims[-1]}; delete it")
        bind_loaded(model, unusual, tensors)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Saves `model.safetensors`, `config.json` and, where the model has an OOD detector, `unusual.json`.

        An existing model in the folder is replaced only after all files are written, the weights last. A model that
        could not be loaded again is not saved. A calibration, decisions or an OOD detector fitted with other weights
        are left out with a warning.

        Args:
            dtype: type in which matrices are stored, e.g. torch.float16 for half the size. Vectors and the parameters
                of the scan stay float32: they are small, and A is an exponent.

        Raises:
            PretrainedError: a classifier, layers or values that `from_pretrained` would reject.
            ConfigError: a configuration that `from_pretrained` would reject.
            DiskFullError: no space; existing files are unchanged.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {}
        for key, tensor in self.state_dict().items():  # type: ignore[attr-defined]
            shrink = dtype is not None and tensor.ndim > 1 and not key.endswith(("A_log", "D", "dt_bias"))
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype if shrink else None).contiguous().clone()
        _check_loadable(self, tensors, dtype)
        config, unusual, _ = in_force(self)
        weights = fingerprint(tensors) if config.calibration or config.decisions or unusual else {}
        if config.calibration:
            config = config.replace(calibration={**config.calibration, FINGERPRINT: weights})
        if config.decisions:
            config = config.replace(decisions={**config.decisions, FINGERPRINT: weights})
        with staged(folder, last=(CONFIG_NAME, WEIGHTS_NAME)) as staging:
            save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            sha256 = file_hash(staging / WEIGHTS_NAME)
            write_config(config, staging, sha256)
            if unusual:
                unusual.write(staging / OOD_NAME, sha256, fingerprint(body(tensors)))
        if not unusual:
            (folder / OOD_NAME).unlink(missing_ok=True)  # of the previous weights
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
        """Uploads the model to the Hub in one commit and returns the URL of that commit.

        Args:
            dtype: see `save_pretrained`.
            card: a model card (README.md) to upload with it.
        """
        from huggingface_hub import HfApi

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
    """Checks that `from_pretrained` could load these tensors with the configuration of the model.

    Raises:
        PretrainedError: missing, unexpected or misshapen tensors, or values that are not finite.
    """
    problems: list[str] | None = None
    for cls in type(model).__mro__:
        if not hasattr(cls, "_from_config"):
            break
        try:
            with torch.device("meta"):
                blank = cls._from_config(model.config)
        except (TypeError, AttributeError):
            continue  # another constructor; the model may still be loaded as its base class
        found = differences(shapes(blank.state_dict()), shapes(tensors))
        problems = found if problems is None or not found else problems
        if not found:
            break
    if problems is None:
        problems = ["no class can be built from its configuration alone"]
    if problems:
        raise PretrainedError(f"the model was not saved, because it could not be loaded again: {_why(problems)}")
    if broken := not_finite(tensors):
        fits = dtype is not None and not not_finite({name: model.state_dict()[name] for name in broken})
        how = f"save it without dtype={dtype}, in which they overflow" if fits else "training diverged"
        raise PretrainedError(
            f"the model was not saved: {len(broken)} of {len(tensors)} tensors contain NaN or infinity "
            f"({listed(broken, 3)}): {how}"
        )


def _why(problems: list[str]) -> str:
    """Explains differences between the tensors of a model and those of its configuration, and how to resolve them."""
    names = " ".join(problems)
    if "head." in problems[0] and all("head." in problem for problem in problems):
        return (
            f"its classifier does not match its configuration ({listed(problems)}). Use "
            "model.reset_classifier(num_classes, id2label=...) instead of replacing model.head"
        )
    if "parametrizations" in names:
        return (
            f"it has parametrizations ({listed(problems, 2)}); call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if any(word in names for word in ("lora_", "base_layer", "modules_to_save", "adapter")):
        return f"it has adapters ({listed(problems, 2)}); merge them first (in PEFT: model.merge_and_unload())"
    if ".scale" in names and ".shift" in names:
        return "it is a fused copy for inference; save the model it was made from"
    return f"its layers do not match its configuration ({listed(problems)})"
