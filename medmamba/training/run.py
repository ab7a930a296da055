"""`medmamba.train`: trains on a dataset and writes a folder that `MedMamba.from_pretrained` loads."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import (
    DatasetError,
    ImageDataset,
    check_leakage,
    make_splits,
    open_dataset,
    published_split,
    registry,
    val_from_train,
)
from ..evaluation import evaluations
from ..metrics import Evaluation
from ..model import MedMamba
from ..pretrained import hub_name
from ..utils.devices import make_accelerator
from .checked import Checked
from .finalise import RESULT_FILES, finish, training_record
from .graphed_step import GRAPHS
from .identity import data_table, fingerprint, known_files, remember_files, run_identity
from .live_plot import LivePlot
from .progress import Progress
from .recipe import Recipe, load_recipe
from .run_log import RunLog
from .setup import KEEP, ImageCache, build_model, check_splits
from .task import Run, Task, TrainResult, run_task
from .teacher import load_teacher, weights_digest


def train(
    data: str | os.PathLike | ImageDataset,
    out: str | os.PathLike,
    recipe: str | os.PathLike | Recipe = "default",
    variant: str = "tiny",
    init: str | os.PathLike | MedMamba | None = None,
    *,
    seed: int = 0,
    dataset: str | None = None,
    split: str | Sequence[float] | None = None,
    patient_pattern: str | None = None,
    patients: str | None = None,
    classes: Sequence[str] | None = None,
    task: str | None = None,
    allow_leakage: Collection[str] = (),
    check_duplicates: bool = True,
    in_chans: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    accumulate: int = 1,
    half: bool = True,
    max_seconds: float | None = None,
    finish_early: bool = False,
    checkpoint_seconds: float = 60.0,
    cache: str | os.PathLike | None = None,
    keep: str = "auto",
    workers: int | None = None,
    graphs: str = "auto",
    init_name: str | None = None,
    notes: Mapping[str, Any] | None = None,
    teacher: str | os.PathLike | nn.Module | None = None,
    restart: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    live_plot: bool = False,
    **settings: Any,
) -> TrainResult[MedMamba, Evaluation]:
    """Trains, selects the best epoch and calibrates on validation, then evaluates on test, once.

    After an interruption of any kind, the same call resumes from the last checkpoint, and the result is that of an
    uninterrupted run (bit for bit on a CPU).

    Args:
        data: anything that `medmamba.data.open_dataset` takes (folder, CSV, `.npz`, zip), or an `ImageDataset`. Needs
            splits train and val, or `split`; test is used if present. With only train and test, val is taken from
            train (an eighth, by patient where known).
        out: folder for the model, `results.json`, `history.csv`, figures, and checkpoints during the run; with several
            nodes, on shared storage.
        recipe: name, `.json` file or `Recipe`.
        variant: size of a new model ("nano", "tiny", ...); ignored with `init`.
        init: pretrained model to start from: bundled name, "org/name", folder, or a model.
        seed: of initial weights, splits, order, augmentation and dropout.
        dataset: name in the registry, for order and names of classes, patients and licence, recorded with the weights.
        split: how to split `data` that has no splits: three fractions, or "published" for the registry's rule.
        patient_pattern: regular expression; group 1 in a file name is the patient.
        patients: another rule for patients, "folder" or "FILE.csv:COLUMN", see `medmamba.data.with_patients`.
        classes: names of all classes in the order of the labels, for an ordinal task from the lowest grade to the
            highest; default: the names found, sorted.
        task: "ordinal" where the classes are grades in order: the loss then counts how far off a grade is, and
            quadratic-weighted kappa is measured (recipes select by it with `select=["quadratic_kappa"]`). Default: as
            in the registry, else from the data ("multiclass", or "multilabel" where images have several labels).
        allow_leakage: "patients", "duplicates": accept those in more than one split. "conflicts": accept identical
            images with different labels within one split.
        check_duplicates: False skips the search for duplicates, which decodes every image, for instance because an
            earlier run found none. Recorded with the weights.
        in_chans: channels of the model; default: those of `init`, or 3.
        device: see `make_accelerator`.
        precision: see `make_accelerator`.
        accumulate: parts in which each process takes its share of a batch, to save memory.
        half: stores the weights in float16.
        max_seconds: stops after about this time; the same call resumes.
        finish_early: makes the best epoch so far the final model when the run is stopped, instead of resuming later.
        cache: folder for the decoded images, which makes the next start faster.
        keep: where decoded images stay: "memory"; "disk", in files in `cache` from which each batch is read shortly
            before it is needed; "nowhere", decoded anew in every epoch; or "auto", the first of these that has the
            space. The result is the same.
        workers: processes that decode images which are kept nowhere; None: one per core.
        checkpoint_seconds: minimum time between two checkpoints.
        graphs: "auto": forward and backward as one CUDA graph on a GPU, which is faster for small batches; "off":
            never.
        init_name: how to record `init` with the model, where its name or path would mean nothing to others.
        notes: more entries for the model's record, such as {"pretraining": ["dermamnist"]}.
        teacher: distillation: a trained model for the same classes (bundled name, "org/name", folder, `MedMamba`), or
            any module that maps images (B, C, H, W) in [0, 1] to probabilities (B, K). It answers each augmented
            batch; the recipe's `distill` is the weight of its answers, the rest that of the labels.
        restart: deletes the run in `out` first.
        progress: shows progress bars.
        tensorboard: writes TensorBoard logs to `out`/tensorboard.
        live_plot: draws losses and the score on val after each epoch, in the output of a notebook cell.
        settings: of the recipe, by name (`epochs=10`, `size=128`, `**{"augment.hflip": 0}`).

    Raises:
        RecipeError, DatasetError, LeakageError, PretrainedError: a problem to fix before training.
        ResumeError: `out` holds another run, or the data have changed since it began.
        LockedError: another process is training into `out`.
        DiskFullError: no space; existing files are unchanged.
        TrainingError: the loss or the weights are NaN or infinite.
    """
    started = time.monotonic()
    chosen = load_recipe(recipe, **settings)
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    if graphs not in GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {graphs!r}")
    plot = LivePlot(chosen.epochs, chosen.select[0]) if live_plot else None
    source = init if isinstance(init, MedMamba) or init is None else MedMamba.from_pretrained(init)
    if chosen.size is None:
        chosen = chosen.replace(size=source.config.preprocess.input_size[0] if source else 224)
    accelerator = make_accelerator(device, precision)
    out, folder = Path(out), Path(cache) if cache else None
    index, entry, rule = _open(data, dataset, split, patient_pattern, patients, classes, seed)
    index = _as_task(index, task, ordered=entry is not None or classes is not None or isinstance(data, ImageDataset))
    check_splits(index)
    torch.manual_seed(seed)
    labels = entry.id2label if entry else dict(enumerate(index.classes))
    model = build_model(chosen, index, variant, source, in_chans, labels)
    adviser = None if teacher is None else load_teacher(teacher, model.config, accelerator.device)
    files = known_files(folder)
    table = data_table(index, files)
    identity = run_identity(
        chosen,
        model,
        source,
        fingerprint(index, table),
        seed=seed,
        precision=accelerator.mixed_precision,
        parts=accelerator.num_processes * accumulate,
        teacher="" if adviser is None else weights_digest(adviser),
    )
    provenance: dict[str, Any] = {
        "init": init_name or ("" if init is None else "a model" if isinstance(init, MedMamba) else str(init))
    }
    if init is not None and not isinstance(init, MedMamba) and (base := hub_name(init)):
        provenance["base_model"] = base  # for the card; a local folder may have the name of a model on the Hub
    provenance |= {"allowed_leakage": sorted(allow_leakage)} if allow_leakage else {}
    provenance |= {} if check_duplicates else {"duplicates_checked": False}
    run = Run(
        out,
        chosen,
        identity,
        accelerator,
        seed=seed,
        accumulate=accumulate,
        half=half,
        deadline=None if max_seconds is None else started + max_seconds,
        checkpoint_seconds=checkpoint_seconds,
        restart=restart,
        progress=progress,
        tensorboard=tensorboard,
        plot=plot,
        finish_early=finish_early,
        graphs=graphs,
        teacher=adviser,
    )
    cache_ = ImageCache(index, model.config, accelerator, folder, progress, files=files, keep=keep, workers=workers)
    job = Classification(cache_, entry, rule, provenance | dict(notes or {}), allow_leakage, check_duplicates)
    return run_task(job, run, model, table)


@dataclass
class Classification(Task[MedMamba, Evaluation]):
    """Training of classifiers.

    Attributes:
        cache: the images.
        entry: what the registry knows of them.
        split_rule: how their splits were made.
        provenance: more entries for the record of the weights.
        allow_leakage, check_duplicates: see `train`.
    """

    result_files = RESULT_FILES

    cache: ImageCache
    entry: registry.DatasetEntry | None
    split_rule: str
    provenance: dict[str, Any]
    allow_leakage: Collection[str] = ()
    check_duplicates: bool = True

    def check(self, run: Run, resumed: bool) -> None:
        index, folder = self.cache.index, self.cache.folder
        if not resumed:
            checked = Checked(folder, run.identity, self.allow_leakage, self.check_duplicates)
            if not checked:
                check_leakage(index, allow=self.allow_leakage, duplicates=self.check_duplicates)
                checked.note()
        remember_files(folder, index, self.cache.files)

    def images(self, run: Run, model: MedMamba, log: RunLog) -> ImageCache:
        for note in self.cache.index.notes:
            log.note(f"{self.cache.index.name}: {note}")
        self.cache.say, self.cache.tell = log.warn, log.note
        return self.cache

    def finish(self, run: Run, model: MedMamba, images: ImageCache, state: Progress) -> dict[str, Evaluation]:
        index, identity = images.index, run.final_identity
        record = training_record(index, self.entry, run.recipe, identity, state, run.accelerator, self.split_rule)
        return finish(run.out, model, images, run.accelerator, record | self.provenance, run.dtype)

    def restore(self, results: dict[str, Any]) -> dict[str, Evaluation]:
        return evaluations(results)


def _open(
    data: str | os.PathLike | ImageDataset,
    dataset: str | None,
    split: str | Sequence[float] | None,
    patient_pattern: str | None,
    patients: str | None,
    classes: Sequence[str] | None,
    seed: int,
) -> tuple[ImageDataset, registry.DatasetEntry | None, str]:
    """Returns the images with their splits, their registry entry, and a description of how the splits were made."""
    entry = registry.get(dataset) if dataset else None
    if isinstance(data, ImageDataset):
        for name, value in (("patient_pattern", patient_pattern), ("patients", patients), ("classes", classes)):
            if value is not None:
                raise DatasetError(f"{name} would have no effect on an ImageDataset; give it to open_dataset")
        index = data
    else:
        index = open_dataset(data, dataset=entry, patient_pattern=patient_pattern, patients=patients, classes=classes)
    if len(index) == 0:
        raise DatasetError(f"{index.name} has no images")
    found = index.split_sizes
    if split is None:
        if "train" in found and "test" in found and "val" not in found:
            return val_from_train(index, seed=seed), entry, "val taken from train by val_from_train, test as arranged"
        return index, entry, "as the data are arranged"
    if isinstance(split, str):
        if split != "published" or entry is None:
            raise DatasetError("split is three fractions, or 'published' together with dataset=NAME")
        return published_split(index, entry), entry, "published"
    if any(index.splits):
        rest = ": val is then taken from train" if "val" not in found and "train" in found else ""
        raise DatasetError(f"{index.name} has splits already ({index!r}); leave split= (--split) out{rest}")
    return make_splits(index, split, seed=seed), entry, f"made by make_splits: {', '.join(map(str, split))}"


def _as_task(index: ImageDataset, task: str | None, ordered: bool) -> ImageDataset:
    """Returns the images for the task that is asked for.

    Args:
        ordered: the order of the classes was given, not guessed by sorting their names.

    Raises:
        DatasetError: labels that do not fit the task, or grades whose order is unknown.
    """
    if task is None or task == index.task:
        return index
    if task == "ordinal" and not ordered and not all(name.isdecimal() for name in index.classes):
        raise DatasetError(
            f"{index.name}: an ordinal task needs its grades in order, from the lowest to the highest, and "
            f"{', '.join(index.classes)} are only sorted by name; give them with classes=[...] (--classes ...)"
        )
    return index.with_task(task)
