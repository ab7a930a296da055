"""A model on a labelled set of images: every score with its interval, and figures, as JSON, Markdown and PNG."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import registry
from .calibrate import to_probabilities
from .config import MedMambaConfig
from .data import CachedDataset, DatasetError, ImageDataset, cache_images, open_dataset
from .evaluation import Evaluation, evaluate
from .model import MedMamba
from .utils.names import AmbiguousNameError, find_name, shown

if TYPE_CHECKING:
    import matplotlib.figure

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Scored:
    """A model's answers to a labelled set.

    Attributes:
        evaluation: scores of the calibrated probabilities.
        uncalibrated: the same without the model's temperature; None where it has none.
        labels: (N,) or (N, K) as in the dataset.
        logits: (N, K) float32.
    """

    evaluation: Evaluation
    uncalibrated: Evaluation | None
    labels: np.ndarray
    logits: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The evaluation, and under "uncalibrated" what calibration changed."""
        data = self.evaluation.to_dict()
        if self.uncalibrated:
            data["uncalibrated"] = {name: self.uncalibrated[name] for name in ("ece", "brier", "nll")}
        return data


def decode(
    dataset: ImageDataset,
    config: MedMambaConfig,
    file: str | os.PathLike | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CachedDataset:
    """All images decoded and resized as `config.preprocess` says, in memory; normalisation is left for later.

    Args:
        file: keep the decoded images in this file for the next time, see `cache_images`.
    """
    in_unit_range = dataclasses.replace(config.preprocess, mean=(0.0,), std=(1.0,))
    return cache_images(dataset, in_unit_range, config.in_chans, file=file, progress=progress)


def score(
    logits: torch.Tensor,
    dataset: ImageDataset,
    config: MedMambaConfig,
    *,
    resamples: int = 1000,
    seed: int = 0,
    context: dict[str, Any] | None = None,
) -> Scored:
    """Scores of logits (N, K), with the temperature in `config.calibration`."""
    patients = dataset.patients
    options: dict[str, Any] = dict(task=config.task, patients=patients if any(patients) else None, seed=seed)
    temperature = float(config.calibration.get("temperature", 1.0))
    raw = logits.double().numpy()
    context = {**(context or {}), "temperature": temperature}
    found = evaluate(
        dataset.labels,
        to_probabilities(raw / temperature, config.task),
        config.labels,
        resamples=resamples,
        context=context,
        **options,
    )
    before = None
    if config.calibration:
        before = evaluate(dataset.labels, to_probabilities(raw, config.task), config.labels, resamples=0, **options)
    return Scored(found, before, dataset.labels, logits.numpy())


def evaluate_model(
    model: MedMamba | str | os.PathLike,
    data: str | os.PathLike | ImageDataset,
    split: str | None = "test",
    *,
    out: str | os.PathLike | None = None,
    dataset: str | None = None,
    patient_pattern: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Scored:
    """Scores a model on a split, in float32 and with the model's own preprocessing and calibration.

    Args:
        model: a model, a bundled name, "org/name[@revision]" or a folder.
        data: whatever `medmamba.data.open_dataset` takes. Classes are matched to the model's by name.
        split: "train", "val", "test"; None: all images.
        out: folder for `results.json`, `results.md` and the figures as PNG.
        dataset: name in the registry, for names of classes and patients in file names.
        resamples: of the bootstrap; 0 for no intervals.

    Raises:
        DatasetError: nothing there, no such split, or classes that the model does not know.
        PretrainedError: no such model.
    """
    from accelerate import Accelerator
    from tqdm import tqdm

    from .training.setup import make_accelerator
    from .training.validation import predict_logits

    name = model.config.architecture if isinstance(model, MedMamba) else str(model)
    network = model if isinstance(model, MedMamba) else MedMamba.from_pretrained(model)
    config = network.config
    if isinstance(data, ImageDataset):
        index = data
    else:
        index = open_dataset(data, dataset=dataset, patient_pattern=patient_pattern)
    index = match_classes(index if split is None else index.split(split), config)
    accelerator: Accelerator = make_accelerator(device, "fp32")

    def bar(items: Iterable[int]) -> Iterable[int]:
        return tqdm(items, "reading", len(index), unit="img", disable=not progress)

    images = decode(index, config, progress=bar)
    original = next(network.parameters()).device
    try:
        logits = predict_logits(
            network.to(accelerator.device), images, batch_size, accelerator, full_precision=True, progress=progress
        )
    finally:
        network.to(original)
    context = {
        "model": name,
        "data": index.name,
        "split": split or "all",
        "input_size": list(config.preprocess.input_size),
    }
    scored = score(logits, index, config, resamples=resamples, seed=seed, context=context)
    if out is not None and accelerator.process_index == 0:
        write_results(out, {split or "all": scored})
    return scored


def match_classes(dataset: ImageDataset, config: MedMambaConfig) -> ImageDataset:
    """The dataset with its labels numbered as the model's; a dataset may lack some of the model's classes.

    Raises:
        DatasetError: a class that the model does not know, or another task.
    """
    wanted = config.labels
    if dataset.task != config.task:
        raise DatasetError(f"{dataset.name} is a {dataset.task} task and the model is {config.task}")
    if list(dataset.classes) == wanted:
        return dataset
    entry = _entry_of(config)
    try:
        numbers = [find_name(name, wanted) for name in dataset.classes]
        if entry and None in numbers:  # the data may have the short names, "NORM", of "normal colon mucosa"
            numbers = [entry.class_index(name) for name in dataset.classes]
    except AmbiguousNameError as error:
        raise DatasetError(f"{dataset.name}: class {error}; the model has both") from error
    unknown = [name for name, number in zip(dataset.classes, numbers, strict=True) if number is None]
    if unknown:
        raise DatasetError(
            f"{dataset.name}: the model does not know {', '.join(unknown)}; it knows {', '.join(wanted)}. Rename the "
            "classes, name the dataset (dataset=... or --dataset NAME), or train a model for these"
        )
    for number in set(numbers):
        same = [name for name, other in zip(dataset.classes, numbers, strict=True) if other == number]
        if len(same) > 1 and number is not None:
            raise DatasetError(
                f"{dataset.name}: classes {shown(*same)} would all be the model's {wanted[number]!r}; merge them where "
                "they are the same, or rename them"
            )
    place = [number for number in numbers if number is not None]

    def renumbered(label: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(label, int):
            return place[label]
        shown = {place[i] for i, present in enumerate(label) if present}
        return tuple(int(i in shown) for i in range(len(wanted)))

    records = [dataclasses.replace(record, label=renumbered(record.label)) for record in dataset.records]
    return ImageDataset(records, wanted, dataset.reader, dataset.task, dataset.transform, dataset.name)


def write_results(folder: str | os.PathLike, splits: dict[str, Scored], **record: Any) -> Path:
    """Writes `results.json`, `results.md` and, for the last split, the figures; JSON last, when all else is there."""
    from .training.checkpoint import write_text

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    *_, (last, scored) = splits.items()
    for name, figure in figures(scored, last).items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    sections = [f"## {name}\n\n{result.evaluation.to_markdown()}" for name, result in splits.items()]
    write_text(folder / "results.md", "\n".join(sections))
    data = {**record, "splits": {name: result.to_dict() for name, result in splits.items()}}
    write_text(folder / RESULTS_NAME, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / RESULTS_NAME


def figures(scored: Scored, title: str = "") -> dict[str, matplotlib.figure.Figure]:
    """Confusion matrix (not for several labels at once), ROC curves and reliability diagram, by name."""
    from .plots import confusion_matrix_figure, reliability_figure, roc_figure

    task = scored.evaluation.task
    raw = scored.logits.astype(np.float64)
    curves = {"as trained": to_probabilities(raw, task)}
    if scored.uncalibrated:
        curves["calibrated"] = to_probabilities(raw / scored.evaluation.context["temperature"], task)
    found = {
        "roc": roc_figure(scored.labels, to_probabilities(raw, task), scored.evaluation.classes, title=title),
        "reliability": reliability_figure(scored.labels, curves, title=title),
    }
    if task == "multiclass":
        found["confusion"] = confusion_matrix_figure(scored.evaluation, title=title)
    return found


def _entry_of(config: MedMambaConfig) -> registry.DatasetEntry | None:
    """The registry entry of the data the model was trained on, if its classes are the model's."""
    name = config.training.get("dataset")
    if not name or str(name) not in registry.names():
        return None
    entry = registry.get(str(name))
    return entry if list(entry.id2label.values()) == config.labels else None
