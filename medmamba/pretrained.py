"""Loading and saving: a folder with one `config.json` and one `model.safetensors`, local, bundled or on the Hub.

Loading is strict: every tensor must be there, in its shape, and nothing else. Pickles are never read.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, MedMambaConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ORGANISATION = "medmamba"


class PretrainedError(OSError):
    """A pretrained model that cannot be found, read or saved; the message says what to do."""


def bundled_models() -> dict[str, Path]:
    """Models that come with this copy of medmamba, by name (`medmamba/<folder>`); they load without a network."""
    package = Path(__file__).parent
    found: dict[str, Path] = {}
    for root in (package / "weights", package.parent / "hub" / "models"):  # an installed wheel; a clone
        for config in sorted(root.glob(f"*/{CONFIG_NAME}")):
            if (config.parent / WEIGHTS_NAME).is_file():
                found.setdefault(f"{ORGANISATION}/{config.parent.name}", config.parent)
    return found


def fetch(
    name: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder that holds a model: `name` itself, a bundled one, or a download.

    Args:
        name: a folder; "org/name" or "org/name@revision"; or the short name of a bundled model.

    Raises:
        PretrainedError: nothing by that name, no network, no permission, or an incomplete folder.
    """
    if Path(name).is_dir():
        return _complete(Path(name))
    repo, _, at = str(name).partition("@")
    revision = revision or at or None
    bundled = bundled_models()
    if "/" not in repo:
        repo = f"{ORGANISATION}/{repo}"
    if repo in bundled and revision is None and not force_download:
        return bundled[repo]
    if isinstance(name, os.PathLike) or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise PretrainedError(f"no such folder: {name}. {_what_exists(bundled)}")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    download: dict[str, Any] = dict(
        revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only, force_download=force_download
    )
    try:
        # The configuration first: the Hub counts a download by it, and it is small where the name is wrong.
        folder = Path(hf_hub_download(repo, CONFIG_NAME, **download)).parent
        hf_hub_download(repo, WEIGHTS_NAME, **download)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise PretrainedError(
            f"there is no model {repo!r} on the Hub that you may read (private and gated ones need "
            f"`hf auth login` or token=...). {_what_exists(bundled)}"
        ) from error
    except RevisionNotFoundError as error:
        raise PretrainedError(f"{repo!r} has no revision {revision!r}; leave it out for the newest") from error
    except LocalEntryNotFoundError as error:
        raise PretrainedError(
            f"{repo!r} is not in the local cache and the Hub cannot be reached (or was not to be asked). "
            f"Connect once, or point HF_ENDPOINT at a mirror. {_what_exists(bundled)}"
        ) from error
    except EntryNotFoundError as error:
        raise PretrainedError(
            f"{repo!r} is on the Hub but has no {CONFIG_NAME} or no {WEIGHTS_NAME}, so it is not a medmamba model; "
            "a published .pth is read by medmamba.load_upstream"
        ) from error
    except HFValidationError as error:
        raise PretrainedError(f"{str(name)!r} is neither a folder nor a model name like org/name. {_what_exists(bundled)}") from error
    except OSError as error:  # connection cut, disk full, HTTP 5xx
        raise PretrainedError(f"downloading {repo!r} failed: {error}. Run it again: finished files are kept") from error
    return folder


def read_config(folder: Path) -> MedMambaConfig:
    """Reads `config.json`.

    Raises:
        ConfigError: not JSON, foreign, or stale.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected an object")
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
    expected = model.state_dict()
    problems = [f"missing {k}" for k in expected if k not in tensors]
    problems += [f"unknown {k}" for k in tensors if k not in expected]
    problems += [
        f"{k} is {tuple(t.shape)}, expected {tuple(expected[k].shape)}"
        for k, t in tensors.items()
        if k in expected and t.shape != expected[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise PretrainedError(f"{source} does not fit its configuration: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(tensors, assign=True)


class PretrainedMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a module built from a `MedMambaConfig`."""

    config: MedMambaConfig

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
        """A model in eval mode, in float32 on the CPU.

        Args:
            name: "medmamba/bloodmnist", "org/name@revision", or a folder written by `save_pretrained`.
            revision: branch, tag or commit on the Hub; a commit that is cached needs no network.
            token: for private models; default: the one stored by `hf auth login`.

        Raises:
            PretrainedError: not found, unreachable, damaged, or weights that do not fit.
            ConfigError: a stale or foreign configuration.
        """
        folder = fetch(name, revision, cache_dir, token, local_files_only, force_download)
        config, tensors = read_config(folder), read_weights(folder)
        with torch.device("meta"):  # no time spent on initialising what is about to be replaced
            model = cls(config)  # type: ignore[call-arg]
        load_strict(model, tensors, str(folder))  # type: ignore[arg-type]
        for parameter in model.parameters():  # type: ignore[attr-defined]
            parameter.requires_grad_(True)
        return model.eval()  # type: ignore[attr-defined]

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
        """Writes `config.json` and `model.safetensors`; an existing model there is replaced only once both are written.

        Args:
            dtype: store matrices in this type, e.g. torch.float16 for half the size. Vectors and the scan's parameters
                stay float32: they are small, and A is an exponent.
        """
        from safetensors.torch import save_file

        from . import __version__

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "medmamba_version": __version__}
        tensors = {}
        for key, tensor in self.state_dict().items():  # type: ignore[attr-defined]
            shrink = dtype is not None and tensor.ndim > 1 and not key.endswith(("A_log", "D", "dt_bias"))
            tensors[key] = tensor.detach().to(device="cpu", dtype=dtype if shrink else None).contiguous().clone()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
            save_file(tensors, Path(staging) / WEIGHTS_NAME, metadata={"format": "pt"})
            Path(staging, CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for file in (WEIGHTS_NAME, CONFIG_NAME):
                os.chmod(Path(staging) / file, 0o644)
                os.replace(Path(staging) / file, folder / file)
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

        from . import __version__

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


def _complete(folder: Path) -> Path:
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / file).is_file():
            hint = ""
            if any(folder.glob("*.pth")) or any(folder.glob("*.bin")):
                hint = "; a published .pth is read by medmamba.load_upstream, which never unpickles code"
            raise PretrainedError(f"{folder} has no {file}, so it is not a model saved by save_pretrained{hint}")
    return folder


def _what_exists(bundled: dict[str, Path]) -> str:
    names = ", ".join(bundled) or "none"
    return (
        f"Models that come with medmamba: {names}. A model of your own: `medmamba train --data FOLDER --out DIR`, then "
        "MedMamba.from_pretrained(DIR); a new one without weights: medmamba.create_model('tiny', num_classes=...)"
    )
