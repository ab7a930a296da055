"""What makes a run this run: every input that decides its result, by content and not by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..data import ImageDataset
from ..data.identity import FileIndex, contents, reading_code
from ..model import MedMamba
from .recipe import Recipe

_EXAMPLES = 3
_NOT_LEARNT_WITH = ("calibration", "training", "medmamba_version")  # of a configuration
_NAMES = {
    "network": "network or preprocessing",
    "init_weights": "model to start from",
    "reader": "version of the code that reads images",
    "parts": "division of a batch (processes times accumulate)",
    "stored": "type of the stored weights",
}


def known_files(cache: Path | None) -> FileIndex:
    """What earlier runs noted of the files of their images, beside the decoded ones in `cache`."""
    index = FileIndex()
    for file in sorted(cache.glob("*.npy.json")) if cache else []:
        try:
            index.add(json.loads(file.read_text(encoding="utf-8")).get("files"))
        except (OSError, ValueError, AttributeError):
            continue  # it will be made again
    return index


def data_table(index: ImageDataset, files: FileIndex | None = None) -> dict[str, str]:
    """For each image, by source: digests of its content, and of its label, split and patient."""
    found = contents(index, files or FileIndex())
    return {
        str(record.source): f"{content}:{_digest(repr((record.label, record.split, record.patient)))[:16]}"
        for record, content in zip(index.records, found, strict=True)
    }


def fingerprint(index: ImageDataset, table: dict[str, str] | None = None) -> str:
    """A digest of the images, their order, labels, splits and patients, and of the classes.

    Args:
        table: of `data_table`, where it is at hand; else the files are read.
    """
    table = data_table(index) if table is None else table
    rows = (f"{record.source}\0{table[str(record.source)]}" for record in index.records)
    return _digest(repr((index.classes, index.task)), *rows)


def model_fingerprint(model: MedMamba) -> str:
    """A digest of all weights and buffers, and of the configuration apart from calibration and training record."""
    digest = hashlib.sha256(_config_text(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def run_identity(
    recipe: Recipe, model: MedMamba, source: MedMamba | None, data: str, *, seed: int, precision: str, parts: int
) -> dict[str, Any]:
    """What a checkpoint must have in common with a run that goes on from it.

    Args:
        model: the one to be trained, for its classes, network and preprocessing.
        source: whose weights it starts from.
        data: fingerprint of the images.
        parts: parts in which a batch is taken, over all processes: batch norm sees them one by one.
    """
    return {
        "recipe": {key: value for key, value in recipe.to_dict().items() if key not in ("name", "description")},
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
    }


def differences(
    mine: dict[str, Any],
    theirs: dict[str, Any],
    my_data: dict[str, str] | None = None,
    their_data: dict[str, str] | None = None,
) -> str:
    """What two identities do not have in common, in words; empty where they are the same.

    Args:
        mine: identity of this call.
        theirs: of what is on the disk.
        my_data, their_data: of `data_table`, to say which images have changed.
    """
    mine = json.loads(json.dumps(mine))
    found = []
    for key in sorted({*mine, *theirs}):
        old, new = theirs.get(key), mine.get(key)
        if old == new:
            continue
        name = _NAMES.get(key, key)
        if key not in theirs:
            detail = "not noted by the earlier version that made it"
        elif isinstance(old, dict) and isinstance(new, dict):
            changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            detail = ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in changed)
        elif key == "data":
            detail = _changed_images(my_data or {}, their_data or {}) if their_data else ""
        elif key in ("network", "init_weights", "reader"):
            detail = ""  # digests, which say nothing to anybody
        else:
            detail = f"was {_short(old)}, now {_short(new)}"
        found.append(f"{name} ({detail})" if detail else name)
    return "; ".join(found)


def _changed_images(mine: dict[str, str], theirs: dict[str, str]) -> str:
    common = [source for source in mine if source in theirs]
    kinds = {
        "with other content": [s for s in common if mine[s].split(":")[0] != theirs[s].split(":")[0]],
        "with another label, split or patient": [s for s in common if mine[s].split(":")[1] != theirs[s].split(":")[1]],
        "added": [source for source in mine if source not in theirs],
        "gone": [source for source in theirs if source not in mine],
    }
    parts = [
        f"{len(found)} of {max(len(mine), len(theirs))} images {kind}, such as {', '.join(found[:_EXAMPLES])}"
        for kind, found in kinds.items()
        if found
    ]
    return ", ".join(parts) or "other classes, or the same images in another order"


def _config_text(model: MedMamba) -> str:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_LEARNT_WITH}
    return json.dumps(config, sort_keys=True, default=str)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\1")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
