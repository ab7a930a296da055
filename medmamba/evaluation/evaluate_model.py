"""A model on a labelled set of images: every score with its interval, and figures, as JSON, Markdown and PNG."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..config import MedMambaConfig
from ..data import CachedDataset, DatasetError, ImageDataset, cache_images, open_dataset, registry
from ..inference.fitted import in_force
from ..inference.predict import NotFiniteError, why_not_finite
from ..metrics import Evaluation, evaluate
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from ..utils.extras import require
from ..utils.modes import frozen_view, unwrap
from ..utils.names import AmbiguousNameError, find_name, shown

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
        notes: what was passed over, merged or guessed when the images were listed (`ImageDataset.notes`).
    """

    evaluation: Evaluation
    uncalibrated: Evaluation | None
    labels: np.ndarray
    logits: np.ndarray
    notes: tuple[str, ...] = ()

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
    raw = logits.numpy()
    context = {**(context or {}), "temperature": temperature}
    found = evaluate(
        dataset.labels,
        to_probabilities(raw, config.task, temperature),
        config.labels,
        resamples=resamples,
        context=context,
        **options,
    )
    before = None
    if config.calibration:
        before = evaluate(dataset.labels, to_probabilities(raw, config.task), config.labels, resamples=0, **options)
    return Scored(found, before, dataset.labels, logits.numpy(), dataset.notes)


def evaluate_model(
    model: MedMamba | str | os.PathLike,
    data: str | os.PathLike | ImageDataset,
    split: str | None = "test",
    *,
    out: str | os.PathLike | None = None,
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    frame: int | None = None,
    window: tuple[float, float] | None = None,
    device: str = "auto",
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Scored:
    """Scores a model on a split, in float32 and with the model's own preprocessing and calibration.

    The model is not changed and may be in any mode.

    Args:
        model: a model, a bundled name, "org/name[@revision]" or a folder.
        data: whatever `medmamba.data.open_dataset` takes. Classes are matched to the model's by name.
        split: "train", "val", "test"; None: all images.
        out: folder for `results.json`, `results.md` and the figures as PNG.
        dataset: name in the registry, for names of classes and patients in file names.
        classes: all names of classes, where `data` has images of some alone.
        frame, window: how image files are read, as in `load_image`; not for an `ImageDataset`.
        resamples: of the bootstrap; 0 for no intervals.

    Raises:
        DatasetError: nothing there, no such split, or classes that the model does not know.
        NotFiniteError: the model gave NaN or infinity for some images.
        PretrainedError: no such model.
        ValueError: numbers out of range, or options that do not go together.
    """
    require("accelerate", "evaluation")
    if out is not None:
        require("matplotlib", "evaluation with figures (out=...)")
    from accelerate import Accelerator
    from tqdm import tqdm

    from ..training.setup import make_accelerator
    from ..training.validation import predict_logits

    if batch_size < 1 or resamples < 0:
        raise ValueError(f"batch_size must be at least 1 and resamples at least 0, got {batch_size} and {resamples}")
    given = unwrap(model) if isinstance(model, torch.nn.Module) else None
    network = cast(MedMamba, MedMamba.from_pretrained(model) if given is None else given)  # type: ignore[arg-type]
    name = network.config.architecture if given is not None else str(model)
    config = in_force(network).config
    if not config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    if isinstance(data, ImageDataset):
        idle: dict[str, Any] = {"dataset": dataset, "classes": classes, "patient_pattern": patient_pattern}
        idle |= {"frame": frame, "window": window}
        if said := [key for key, value in idle.items() if value is not None]:
            raise ValueError(f"{', '.join(said)} would have no effect on a dataset that has been opened already")
        index = data
    else:
        index = open_dataset(data, dataset=dataset, classes=classes, patient_pattern=patient_pattern, single_class=True)
        index = read_as(index, frame, window)
    index = match_classes(index if split is None else index.split(split), config)
    accelerator: Accelerator = make_accelerator(device, "fp32")

    def bar(items: Iterable[int]) -> Iterable[int]:
        return tqdm(items, "reading", len(index), unit="img", disable=not progress)

    images = decode(index, config, progress=bar)
    view = frozen_view(network, torch.float32, accelerator.device)
    logits = predict_logits(view, images, batch_size, accelerator, full_precision=True, progress=progress)
    undefined = ~logits.isfinite().all(1)
    if undefined.any():
        first = int(undefined.nonzero()[0])
        reason = why_not_finite(network, logits[first])
        raise NotFiniteError(f"{int(undefined.sum())} of {len(logits)} images got no answer: {reason}")
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


def read_as(dataset: ImageDataset, frame: int | None, window: tuple[float, float] | None) -> ImageDataset:
    """Returns the dataset with its image files read as `load_image(frame=frame, window=window)` does."""
    if frame is None and window is None:
        return dataset
    reader = copy.copy(dataset.reader)
    if not hasattr(reader, "frame"):
        raise DatasetError(f"{dataset.name}: frame and window are for image files, and this holds arrays")
    reader.frame, reader.window = frame, window  # type: ignore[attr-defined]
    found = copy.copy(dataset)
    found.reader = reader
    return found


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
            "classes, name the dataset (dataset=...), or train a model for these"
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
    return ImageDataset(records, wanted, dataset.reader, dataset.task, dataset.transform, dataset.name, dataset.notes)


def write_results(folder: str | os.PathLike, splits: dict[str, Scored], **record: Any) -> Path:
    """Writes `results.json`, `results.md` and, for the last split, the figures; JSON last, when all else is there."""
    from ..training.checkpoint import write_text

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
    from ..metrics.plots import confusion_matrix_figure, reliability_figure, roc_figure

    task = scored.evaluation.task
    raw = scored.logits
    curves = {"as trained": to_probabilities(raw, task)}
    if scored.uncalibrated:
        curves["calibrated"] = to_probabilities(raw, task, scored.evaluation.context["temperature"])
    found = {
        "roc": roc_figure(scored.labels, curves["as trained"], scored.evaluation.classes, title=title),
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
