"""Identity of a run: every input that affects its result, by content rather than by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..data import ImageDataset
from ..data.identity import FileIndex, contents, files_of, reading_code
from ..model import MedMamba
from ..utils.files import write_text
from ..utils.text import json_text
from .recipe import Recipe

FILES = "files.json"  # hashes of the image files, beside decoded images
_EXAMPLES = 3
_NOT_LEARNT_WITH = ("calibration", "training", "medmamba_version")  # fields of a config that do not affect training
_NAMES = {
    "network": "network or preprocessing",
    "init_weights": "model to start from",
    "reader": "version of the code that reads images",
    "teacher": "teacher",
    "parts": "division of a batch (processes times accumulate)",
    "stored": "type of the stored weights",
}


def known_files(cache: Path | None) -> FileIndex:
    """Returns the file hashes that earlier runs stored beside their decoded images in `cache`."""
    index = FileIndex()
    for file in [*sorted(cache.glob("*.npy.json")), cache / FILES] if cache else []:
        try:
            index.add(json.loads(file.read_text(encoding="utf-8")).get("files"))
        except (OSError, ValueError, AttributeError):
            continue  # it will be rewritten
    return index


def remember_files(cache: Path | None, index: ImageDataset, files: FileIndex) -> None:
    """Stores the hashes of the files of a dataset in `cache`, for sets of which no decoded images are kept there."""
    if cache is None or not files.read:
        return
    with contextlib.suppress(OSError):  # the cache itself reports it
        cache.mkdir(parents=True, exist_ok=True)
        write_text(cache / FILES, json_text({"files": files.table(files_of(index))}))


def data_table(index: ImageDataset, files: FileIndex | None = None) -> dict[str, str]:
    """Returns for each image, by source, a digest of its content and one of its label, split and patient.

    Args:
        index: the dataset.
        files: known hashes of its files; others are read.
    """
    found = contents(index, files or FileIndex())
    return {
        str(record.source): f"{content}:{_digest(repr((record.label, record.split, record.patient)))[:16]}"
        for record, content in zip(index.records, found, strict=True)
    }


def fingerprint(index: ImageDataset, table: dict[str, str] | None = None) -> str:
    """Returns a digest of the images, their order, labels, splits and patients, and of the classes.

    Args:
        index: the dataset.
        table: result of `data_table`; None: the files are read.
    """
    table = data_table(index) if table is None else table
    rows = (f"{record.source}\0{table[str(record.source)]}" for record in index.records)
    return _digest(repr((index.classes, index.task)), *rows)


def model_fingerprint(model: MedMamba) -> str:
    """Returns a digest of all weights and buffers, and of the config except calibration and training record."""
    digest = hashlib.sha256(_config_text(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def run_identity(
    recipe: Recipe,
    model: MedMamba,
    source: MedMamba | None,
    data: str,
    *,
    seed: int,
    precision: str,
    parts: int,
    teacher: str = "",
) -> dict[str, Any]:
    """Returns the inputs that a checkpoint and a run that resumes from it must share.

    Args:
        recipe: its settings, apart from name and description.
        model: the model to train, for its classes, network and preprocessing.
        source: the model whose weights it starts from.
        data: fingerprint of the images.
        seed: of the run.
        precision: "no", "bf16" or "fp16".
        parts: parts of a batch over all processes, which batch norm sees separately.
        teacher: digest of the teacher's weights; empty: none.
    """
    return {
        "recipe": _settings(recipe),
        "seed": seed,
        "data": data,
        "model": model.config.architecture,
        "network": _digest(_config_text(model))[:32],
        "classes": list(model.config.labels),
        "init_weights": model_fingerprint(source) if source else "",
        "in_chans": model.config.in_chans,
        "precision": precision,
        "parts": parts,
        "reader": reading_code(),
    } | ({"teacher": teacher} if teacher else {})


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that affect a result; without distillation, as runs recorded them before it existed."""
    unused = ("name", "description") if recipe.distill else ("name", "description", "distill")
    return {key: value for key, value in recipe.to_dict().items() if key not in unused}


def differences(
    current: dict[str, Any],
    stored: dict[str, Any],
    data: dict[str, str] | None = None,
    stored_data: dict[str, str] | None = None,
) -> str:
    """Describes the differences between two identities; empty if there are none.

    Args:
        current: identity of this call.
        stored: identity on disk.
        data: `data_table` of this call, to list the images that have changed.
        stored_data: `data_table` on disk.
    """
    current = json.loads(json_text(current))
    found = []
    for key in sorted({*current, *stored}):
        old, new = stored.get(key), current.get(key)
        if old == new:
            continue
        name = _NAMES.get(key, key)
        if key not in stored:
            detail = "not recorded by the earlier version that wrote it"
        elif isinstance(old, dict) and isinstance(new, dict):
            changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            detail = ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in changed)
        elif key == "data":
            detail = _changed_images(data or {}, stored_data or {}) if stored_data else ""
        elif key in ("network", "init_weights", "reader"):
            detail = ""  # digests, which mean nothing to readers
        else:
            detail = f"was {_short(old)}, now {_short(new)}"
        found.append(f"{name} ({detail})" if detail else name)
    return "; ".join(found)


def _changed_images(current: dict[str, str], stored: dict[str, str]) -> str:
    common = [source for source in current if source in stored]
    kinds = {
        "with other content": [s for s in common if current[s].split(":")[0] != stored[s].split(":")[0]],
        "with another label, split or patient": [
            s for s in common if current[s].split(":")[1] != stored[s].split(":")[1]
        ],
        "added": [source for source in current if source not in stored],
        "missing": [source for source in stored if source not in current],
    }
    parts = [
        f"{len(found)} of {max(len(current), len(stored))} images {kind}, such as {', '.join(found[:_EXAMPLES])}"
        for kind, found in kinds.items()
        if found
    ]
    return ", ".join(parts) or "other classes, or the same images in another order"


def _config_text(model: MedMamba) -> str:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_LEARNT_WITH}
    return json.dumps(config, sort_keys=True, default=str, allow_nan=False)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\1")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
