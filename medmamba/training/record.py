"""What is recorded of a run: the provenance of its weights, and whether it has finished before."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation import RESULTS_NAME
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from .identity import differences
from .progress import Progress
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_record(
    recipe: Recipe, identity: dict[str, Any], progress: Progress, accelerator: Accelerator
) -> dict[str, Any]:
    """Returns the part of the provenance of weights that is the same for every task, for `config.training`."""
    import accelerate

    from .._version import __version__

    assert progress.best is not None
    return {
        "recipe": recipe.name,
        "settings": recipe.to_dict(),
        "init": "",
        "seed": identity["seed"],
        "epochs": progress.epoch,
        "best_epoch": progress.best["epoch"] + 1,
        "selected_by": list(recipe.select),
        "seconds": round(sum(row["seconds"] for row in progress.history), 1),
        "device": device_name(accelerator),
        "processes": accelerator.num_processes,
        "precision": identity["precision"],
        "versions": {
            "medmamba": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "identity": identity,
    }


def device_name(accelerator: Accelerator) -> str:
    """Returns the name of the GPU, or the type of device with architecture and threads."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"{accelerator.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def finished_before(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns `results.json` of a run that has already finished in this folder; None if there is none.

    Raises:
        FileExistsError: the folder holds the finished model of another run.
    """
    if not (out / CONFIG_NAME).is_file() or not (out / WEIGHTS_NAME).is_file():
        return None
    try:
        results = json.loads((out / RESULTS_NAME).read_text(encoding="utf-8"))
        before, _ = results["training"]["identity"], results["splits"]["val"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    changed = differences(identity, before) if before else "origin: its results.json does not record its inputs"
    if changed:
        raise FileExistsError(
            f"{out} already holds a finished model of another run, with another {changed}. Use another folder, or "
            "restart=True (--restart) to replace it"
        )
    return results
