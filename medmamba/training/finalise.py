"""Finishes a run: calibrates the best weights on validation, scores them and writes the model folder."""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import ImageDataset
from ..data.registry import DatasetEntry
from ..evaluation import RESULTS_NAME, Scored, predict_logits, score, write_results
from ..imaging.preprocess import normalise
from ..inference.ood import NAME as UNUSUAL_NAME
from ..inference.ood import Unusual, UnusualError, fit_signatures
from ..inference.ood_fit import learn_unusual, sample
from ..inference.predict import predict_signatures
from ..metrics import Evaluation
from ..metrics.calibration import fit_calibration
from ..model import MedMamba
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from ..utils.devices import wait_for_everyone
from .checkpoint import CheckpointStore
from .identity import differences
from .progress import Progress
from .recipe import Recipe
from .setup import ImageCache
from .validation import validation_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

PICTURES = ("roc.png", "reliability.png", "confusion.png")
RESULT_FILES = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, "results.md", UNUSUAL_NAME, *PICTURES)
UNUSUAL_IMAGES = 600  # of train and val each, for fitting the out-of-distribution detector


def finish(
    out: Path,
    model: MedMamba,
    images: ImageCache,
    store: CheckpointStore,
    accelerator: Accelerator,
    record: dict[str, Any],
    best: int,
    half: bool,
) -> dict[str, Evaluation]:
    """Writes the model folder; returns the evaluation of "val" and, where the split exists, of "test".

    Test images are used here for the first time. The weights are scored as stored: in float16 if `half`. `config.json`
    and then the weights are written last, so a folder that loads is complete.

    Args:
        out: the model folder.
        model: whose configuration is kept; its weights are replaced by the stored ones.
        images: decoded images by split and size.
        store: holds the weights of epoch `best`; cleared at the end.
        accelerator: device, precision and processes.
        record: for `config.training`; warnings of the image readers are added.
        best: the selected epoch, counted from 0.
        half: stores the weights in float16.
    """
    wait_for_everyone(accelerator)  # rank 0 may still be writing
    dtype = torch.float16 if half else None
    model = MedMamba(model.config)
    model.load_state_dict(store.load_best(best))
    with tempfile.TemporaryDirectory() as folder:
        model = MedMamba.from_pretrained(model.save_pretrained(folder, dtype=dtype))
    model.to(accelerator.device)
    size = model.config.preprocess.input_size[0]
    scored = score_splits(model, images, accelerator, record["dataset"])
    model.config = model.config.replace(training=record)
    if images.warnings:  # complete only now
        record |= {"image_warnings": images.warnings}
        model.config = model.config.replace(training=record)
    if accelerator.process_index == 0:
        write_results(out, scored, training=record, calibration=model.config.calibration)
        model.unusual = _learn_unusual(model, images, size, accelerator.device)
        model.to("cpu").save_pretrained(out, dtype=dtype)
        store.clear()
    wait_for_everyone(accelerator)
    return {split: result.evaluation for split, result in scored.items()}


def score_splits(model: MedMamba, images: ImageCache, accelerator: Accelerator, dataset: str) -> dict[str, Scored]:
    """Calibrates a model on "val", then scores it there and, where there are test images, on "test".

    The calibration is stored in `model.config`. All processes call this together.
    """
    size = model.config.preprocess.input_size[0]
    scored: dict[str, Scored] = {}
    for split in ("val", "test"):
        if not images.index.split_sizes.get(split):
            continue
        data = images(split, size)
        batch_size = validation_batch(64, accelerator.device)
        logits = predict_logits(model, data, batch_size, accelerator, full_precision=True)
        if split == "val":
            calibration = fit_calibration(logits.numpy(), data.index.labels, model.config.task)
            model.config = model.config.replace(calibration=calibration.to_dict())
        context = {"data": dataset, "split": split, "input_size": [size, size]}
        scored[split] = score(logits, data.index, model.config, context=context)
    return scored


def _learn_unusual(model: MedMamba, images: ImageCache, size: int, device: torch.device) -> Unusual | None:
    """Fits the out-of-distribution detector; returns None if there are too few images."""
    if not images.holds("train", size):  # trained at another size, at which decoding all images again takes too long
        with contextlib.suppress(UnusualError):
            return learn_unusual(model, images.index, UNUSUAL_IMAGES)
        return None
    seen, labels = {}, {}
    for split in ("train", "val"):
        data = images(split, size)
        rows = torch.from_numpy(sample(len(data), UNUSUAL_IMAGES))
        batches = (normalise(data.batch(part, device)[0], model.config.preprocess) for part in rows.split(32))
        seen[split] = torch.cat([predict_signatures(model, batch)[0] for batch in batches]).numpy()
        labels[split] = np.asarray(data.index.labels)[rows]
    with contextlib.suppress(UnusualError):
        return fit_signatures(seen["train"], labels["train"], seen["val"], model.config)
    return None


def training_record(
    index: ImageDataset,
    entry: DatasetEntry | None,
    recipe: Recipe,
    identity: dict[str, Any],
    progress: Progress,
    accelerator: Accelerator,
    split_rule: str,
) -> dict[str, Any]:
    """Returns the provenance of the weights, for `config.training`."""
    import accelerate

    from .._version import __version__

    assert progress.best is not None
    return {
        "dataset": entry.name if entry else index.name,
        "source": entry.source.url if entry else None,
        "licence": entry.licence.id if entry else None,
        "split": split_rule,
        "split_sizes": {str(name): n for name, n in index.split_sizes.items()},
        "data_fingerprint": identity["data"],
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
