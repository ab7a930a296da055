"""Finishes a run: calibrates the best weights on validation, scores them and writes the model folder."""

from __future__ import annotations

import contextlib
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
from ..inference.ood_fit import learn_unusual, look_altered, sample
from ..inference.predict import predict_signatures
from ..metrics import Evaluation
from ..metrics.calibration import fit_calibration
from ..model import MedMamba
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from .progress import Progress
from .recipe import Recipe
from .record import run_record
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
    accelerator: Accelerator,
    record: dict[str, Any],
    dtype: torch.dtype | None,
) -> dict[str, Evaluation]:
    """Writes the model folder; returns the evaluation of "val" and, where the split exists, of "test".

    Test images are used here for the first time. `config.json` and then the weights are written last, so a folder that
    loads is complete.

    Args:
        out: the model folder.
        model: with its final weights, as stored.
        images: decoded images by split and size.
        accelerator: device, precision and processes.
        record: for `config.training`; warnings of the image readers are added.
        dtype: in which the weights are stored.
    """
    scored = score_splits(model, images, accelerator, record["dataset"])
    if images.warnings:  # complete only now
        record |= {"image_warnings": images.warnings}
    model.config = model.config.replace(training=record)
    if accelerator.process_index == 0:
        write_results(out, scored, training=record, calibration=model.config.calibration)
        size = model.config.preprocess.input_size[0]
        model.unusual = _learn_unusual(model, images, size, accelerator.device)
        model.to("cpu").save_pretrained(out, dtype=dtype)
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
        slightly = look_altered(model, images.index)
        return fit_signatures(seen["train"], labels["train"], seen["val"], model.config, altered=slightly)
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
    """Returns the provenance of a classifier's weights, for `config.training`."""
    return {
        "dataset": entry.name if entry else index.name,
        "source": entry.source.url if entry else None,
        "licence": entry.licence.id if entry else None,
        "split": split_rule,
        "split_sizes": {str(name): n for name, n in index.split_sizes.items()},
        "data_fingerprint": identity["data"],
        **run_record(recipe, identity, progress, accelerator),
    }
