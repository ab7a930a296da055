"""Evaluates a model on a split of a dataset, from files to metrics."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from ..data import DatasetError, ImageDataset, open_dataset
from ..data.metadata import Columns, metadata_file, read_columns
from ..decision import METHODS
from ..inference.fitted import in_force
from ..inference.predict import NotFiniteError, why_not_finite
from ..metrics.calibration import to_probabilities
from ..metrics.group_result import Subgroups
from ..metrics.subgroups import evaluate_subgroups
from ..model import MedMamba
from ..utils.devices import make_accelerator
from ..utils.extras import require
from ..utils.modes import frozen_view, unwrap
from .by_patient import with_patients
from .classes import match_classes
from .corruptions import evaluate_corruptions, published_for
from .logits import dataset_answers
from .results import Scored, score, write_results


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
    batch_size: int | None = None,
    workers: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    tta: str = "none",
    progress: bool = False,
    by: Sequence[str] = (),
    metadata: str | os.PathLike | None = None,
    cuts: Mapping[str, Sequence[float]] | None = None,
    corruptions: str | None = None,
    corruption_images: int | None = None,
    per: str | None = None,
    combine: str | None = None,
) -> Scored:
    """Scores a model on a split, in float32 and with the model's own preprocessing and calibration.

    The model is not changed and may be in any mode.

    Args:
        model: a model, a bundled name, "org/name[@revision]" or a folder.
        data: anything that `medmamba.data.open_dataset` takes. Classes are matched to the model's by name.
        split: "train", "val" or "test"; None: all images.
        out: folder for `results.json`, `results.md` and the figures as PNG.
        dataset: name in the registry, for class names and for patients in file names.
        classes: all class names, where `data` has images of only some.
        patient_pattern: regular expression; group 1 in a file name is the patient.
        frame: frame of multi-frame image files, as in `load_image`; not for an `ImageDataset`.
        window: intensity window of image files, as in `load_image`; not for an `ImageDataset`.
        device: see `make_accelerator`.
        batch_size: images per forward pass; None: found by itself.
        workers: processes that read images, see `iter_predict`.
        resamples: bootstrap resamples; 0 for no intervals.
        seed: of the bootstrap.
        tta: test-time augmentation as in `predict`; recorded with the results.
        progress: shows progress bars.
        by: columns of `metadata` whose groups are scored and compared, such as ("age", "sex"); see
            `metrics.subgroups`.
        metadata: CSV file about the images; default: `data` itself if it is one, else the `metadata.csv` in it.
        cuts: where columns of numbers are divided, by name, see `read_columns`.
        corruptions: measures the errors on corrupted images: "auto", or the dataset of MedMNIST-C whose kinds and
            severities apply; see `evaluation.corruptions`.
        corruption_images: corrupts at most so many images, drawn with `seed`; None: all.
        per: "patient": scores one answer per patient too; patients are those that the data know, else those in the
            headers of DICOM files.
        combine: with per: how the images of a patient are combined, see `medmamba.decision.combine`; None: as chosen
            on validation, else the mean of the logits.

    Raises:
        DatasetError: no data, no such split, classes that the model does not know, or no patients with per.
        NotFiniteError: the model returned NaN or infinity for some images.
        PretrainedError: no such model.
        ValueError: numbers out of range, or options that cannot be combined.
    """
    require("accelerate", "evaluation")
    if out is not None:
        require("matplotlib", "evaluation with figures (out=...)")
    if (batch_size is not None and batch_size < 1) or resamples < 0:
        raise ValueError(f"batch_size must be at least 1 and resamples at least 0, got {batch_size} and {resamples}")
    if per not in (None, "patient") or combine not in (None, *METHODS) or (combine and not per):
        raise ValueError(
            f"per must be 'patient' or None, and combine, which needs it, one of {', '.join(METHODS)}; got {per!r} and "
            f"{combine!r}"
        )
    given = unwrap(model) if isinstance(model, torch.nn.Module) else None
    network = cast(MedMamba, MedMamba.from_pretrained(model) if given is None else given)  # type: ignore[arg-type]
    name = network.config.architecture if given is not None else str(model)
    config = in_force(network).config
    if not config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    if isinstance(data, ImageDataset):
        unused: dict[str, Any] = {"dataset": dataset, "classes": classes, "patient_pattern": patient_pattern}
        unused |= {"frame": frame, "window": window}
        if given_names := [key for key, value in unused.items() if value is not None]:
            raise ValueError(f"{', '.join(given_names)} would have no effect on a dataset that is already open")
        index = data
    else:
        index = open_dataset(data, dataset=dataset, classes=classes, patient_pattern=patient_pattern, single_class=True)
        index = read_as(index, frame, window)
    index = match_classes(index if split is None else index.split(split), config)
    if per:
        index = with_patients(index)
    columns = _columns(index, data, by, metadata, cuts)
    if corruptions is not None:  # fails before the long part
        published_for(str(config.training.get("dataset", "")) if corruptions == "auto" else corruptions)
    accelerator = make_accelerator(device, "fp32")
    logits, unusual = dataset_answers(network, index, accelerator, batch_size, workers, progress, tta)
    undefined = ~logits.isfinite().all(1)
    if undefined.any():
        first = int(undefined.nonzero()[0])
        reason = why_not_finite(network, logits[first])
        raise NotFiniteError(f"no prediction for {int(undefined.sum())} of {len(logits)} images: {reason}")
    context = {
        "model": name,
        "data": index.name,
        "split": split or "all",
        "input_size": list(config.preprocess.input_size),
        **({"tta": tta} if tta != "none" else {}),
    }
    scored = score(
        logits,
        index,
        config,
        unusual=None if unusual is None else unusual.numpy(),
        per_patient=per is not None,
        combine=combine,
        resamples=resamples,
        seed=seed,
        context=context,
    )
    if columns is not None:
        scored = dataclasses.replace(scored, subgroups=score_subgroups(scored, index, columns))
    if corruptions is not None:
        found = evaluate_corruptions(
            frozen_view(network, torch.float32, accelerator.device),
            index,
            accelerator,
            corruptions,
            images=corruption_images,
            seed=seed,
            resamples=resamples,
            batch_size=batch_size or 64,
            context=context,
            progress=progress,
        )
        scored = dataclasses.replace(scored, corruptions=found)
    if out is not None and accelerator.process_index == 0:
        write_results(out, {split or "all": scored})
    return scored


def score_subgroups(scored: Scored, index: ImageDataset, columns: Columns) -> Subgroups:
    """Scores the groups of each column, with the resamples and the seed of the evaluation of all images."""
    evaluation, patients = scored.evaluation, index.patients
    return evaluate_subgroups(
        scored.labels,
        to_probabilities(scored.logits, evaluation.task, evaluation.context["temperature"]),
        evaluation.classes,
        columns.values,
        task=evaluation.task,
        patients=patients if any(patients) else None,
        resamples=evaluation.resamples,
        seed=evaluation.seed,
        notes=columns.notes,
    )


def _columns(
    index: ImageDataset,
    data: str | os.PathLike | ImageDataset,
    by: Sequence[str],
    metadata: str | os.PathLike | None,
    cuts: Mapping[str, Sequence[float]] | None,
) -> Columns | None:
    if not by:
        if metadata is not None or cuts:
            raise ValueError("metadata and cuts have no effect unless columns are named (by=...)")
        return None
    if metadata is None:
        if isinstance(data, ImageDataset):
            raise ValueError("by needs metadata=..., the CSV file about the images of a dataset that is already open")
        metadata = metadata_file(data)
    return read_columns(metadata, index, by, cuts)


def read_as(dataset: ImageDataset, frame: int | None, window: tuple[float, float] | None) -> ImageDataset:
    """Returns the dataset with its image files read as `load_image(frame=frame, window=window)` does.

    Raises:
        DatasetError: the dataset holds arrays, not image files.
    """
    if frame is None and window is None:
        return dataset
    reader = copy.copy(dataset.reader)
    if not hasattr(reader, "frame"):
        raise DatasetError(f"{dataset.name}: frame and window apply to image files, and this dataset holds arrays")
    reader.frame, reader.window = frame, window  # type: ignore[attr-defined]
    found = copy.copy(dataset)
    found.reader = reader
    return found
