"""`medmamba.train`: from a folder of images to a folder that `MedMamba.from_pretrained` loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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
from ..metrics import Evaluation
from ..model import MedMamba
from ..pretrained import hub_name
from ..utils.devices import wait_for_everyone
from ..utils.files import LockedError, locked
from .checkpoint import LOCK, CheckpointStore, check_same_run
from .cuda_graphs import GRAPHS
from .finalise import RESULT_FILES, evaluations, finish, finished_before, training_record
from .identity import data_table, fingerprint, known_files, run_identity
from .recipe import Recipe, load_recipe
from .run_log import HISTORY, RunLog
from .setup import ImageCache, build_model, check_splits, make_accelerator
from .trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoint"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: the folder; it holds a model once the run is finished.
        finished: False if it was stopped by `max_seconds` or SIGTERM; the same call goes on from there.
        epoch: epochs done.
        best_epoch: the one that was kept, counted from 1; None before the first validation.
        history: one row per epoch, as in `history.csv`.
        val, test: scores of the kept weights; None unless finished (test also where there is no such split).
    """

    out: Path
    finished: bool
    epoch: int
    best_epoch: int | None
    history: list[dict[str, Any]]
    val: Evaluation | None = None
    test: Evaluation | None = None

    def load(self) -> MedMamba:
        """The trained model."""
        return MedMamba.from_pretrained(self.out)


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
    graphs: str = "auto",
    init_name: str | None = None,
    notes: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **settings: Any,
) -> TrainResult:
    """Trains, chooses the best epoch on validation, calibrates on validation, then evaluates on test, once.

    Run it again after an interruption of any kind: it goes on from the last checkpoint, and the result is the one that
    an uninterrupted run would have had (bit for bit on a CPU).

    Args:
        data: whatever `medmamba.data.open_dataset` takes: folder, CSV, `.npz`, zip; or an `ImageDataset`. Needs splits
            train and val, or `split`; test is used if there is one. Where there are train and test alone, val is taken
            from train (an eighth, by patient where known).
        out: folder for the model, `results.json`, `history.csv`, figures, and checkpoints while it runs; with several
            nodes, on storage that they share.
        recipe: name, `.json` file or `Recipe`.
        variant: size of a new model ("nano", "tiny", ...); ignored with `init`.
        init: pretrained model to start from: bundled name, "org/name", folder, or a model.
        dataset: name in the registry: order and names of classes, patients, licence, all noted with the weights.
        split: how to make splits where `data` has none: three fractions, or "published" for the registry's rule.
        patient_pattern: regular expression; group 1 in a file name is the patient.
        allow_leakage: "patients", "duplicates": go on although they are in more than one split. "conflicts": although
            the same picture has several labels within one split.
        check_duplicates: False where an earlier run has found none: it decodes every image. Noted with the weights.
        in_chans: channels of the model; default: those of `init`, or 3.
        device, precision: see `make_accelerator`.
        accumulate: parts in which each process takes its share of a batch, for less memory.
        half: store the weights in float16.
        max_seconds: stop after about this long, to be continued by the same call.
        finish_early: a run that is stopped is not continued later: the best epoch so far is the model.
        cache: folder for the decoded images, which makes the next start faster.
        graphs: "auto": forward and backward as one CUDA graph where a single GPU trains, which is faster for small
            batches; "off": never.
        init_name: what the model's record says of `init`, where its name or path would tell others nothing.
        notes: more entries for the model's record, such as {"pretraining": ["dermamnist"]}.
        restart: forget what is in `out`.
        settings: of the recipe, by name (`epochs=10`, `size=128`, `**{"augment.hflip": 0}`).

    Raises:
        RecipeError, DatasetError, LeakageError, PretrainedError: something to put right before training.
        ResumeError: `out` holds another run, or data have changed since it began.
        LockedError: another process is training into `out`.
        DiskFullError: no space; what was there before is unchanged.
        TrainingError: the loss is no longer a number.
    """
    started = time.monotonic()
    chosen = load_recipe(recipe, **settings)
    if graphs not in GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {graphs!r}")
    source = init if isinstance(init, MedMamba) or init is None else MedMamba.from_pretrained(init)
    if chosen.size is None:
        chosen = chosen.replace(size=source.config.preprocess.input_size[0] if source else 224)
    accelerator = make_accelerator(device, precision)
    out, folder = Path(out), Path(cache) if cache else None
    index, entry, rule = _open(data, dataset, split, patient_pattern, seed)
    check_splits(index)
    torch.manual_seed(seed)
    labels = entry.id2label if entry else dict(enumerate(index.classes))
    model = build_model(chosen, index, variant, source, in_chans, labels)
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
    )
    stored = {"stored": "float16" if half else "float32"}  # decides the files, not what is learnt
    if not restart and (done := _already_done(out, identity | stored)) is not None:
        return done
    store = CheckpointStore(out / CHECKPOINTS)
    with _alone(out, accelerator):
        if restart and accelerator.process_index == 0:
            store.clear()
            for name in RESULT_FILES:
                (out / name).unlink(missing_ok=True)
        wait_for_everyone(accelerator)
        if (done := _already_done(out, identity | stored)) is not None:  # by the run that held the folder till now
            return done
        checked_before = bool(store)
        if accelerator.process_index == 0:
            check_same_run(store, identity, table)
            if not checked_before:
                check_leakage(index, allow=allow_leakage, duplicates=check_duplicates)
            store.note_run(identity, table)
        log = RunLog(out, progress, tensorboard, accelerator.process_index == 0)
        for note in index.notes:
            log.note(f"{index.name}: {note}")
        images = ImageCache(index, model.config, accelerator, folder, progress, files=files, say=log.warn)
        trainer = Trainer(
            model,
            chosen,
            images,
            accelerator,
            store,
            log,
            seed=seed,
            accumulate=accumulate,
            identity=identity,
            deadline=None if max_seconds is None else started + max_seconds,
            checkpoint_seconds=checkpoint_seconds,
            graphs=graphs,
        )
        try:
            state = trainer.fit()
        finally:
            log.close()
        best = state.best["epoch"] if state.best else None
        finished = state.finished(chosen) or (finish_early and best is not None)
        result = TrainResult(out, finished, state.epoch, None if best is None else best + 1, state.history)
        if not result.finished or best is None:
            return result
        record = training_record(index, entry, chosen, identity | stored, state, accelerator, rule)
        record["init"] = init_name or ("" if init is None else "a model" if isinstance(init, MedMamba) else str(init))
        if init is not None and not isinstance(init, MedMamba) and (base := hub_name(init)):
            record["base_model"] = base  # of the card; a local folder may be called like somebody's model
        record |= {"allowed_leakage": sorted(allow_leakage)} if allow_leakage else {}
        record |= {} if check_duplicates else {"duplicates_checked": False}
        record |= notes or {}
        found = finish(out, model, images, store, accelerator, record, best, half)
        return dataclasses.replace(result, val=found["val"], test=found.get("test"))


@contextlib.contextmanager
def _alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Holds the folder of a run, so that a second run into it is refused. The first of several processes holds it."""
    if accelerator.process_index != 0:
        yield
        return
    lock = out / CHECKPOINTS / LOCK
    try:
        with locked(lock, f"{out} is being trained", timeout=0, remove=True):
            yield
    except LockedError as error:
        raise LockedError(f"{error}; wait until it ends, or give this run another folder (out=, --out)") from None
    finally:
        with contextlib.suppress(OSError):
            lock.parent.rmdir()  # if the run is finished, and nothing is left in it


def _open(
    data: str | os.PathLike | ImageDataset,
    dataset: str | None,
    split: str | Sequence[float] | None,
    patient_pattern: str | None,
    seed: int,
) -> tuple[ImageDataset, registry.DatasetEntry | None, str]:
    """The images with their splits, what the registry knows of them, and how the splits came about."""
    entry = registry.get(dataset) if dataset else None
    index = (
        data if isinstance(data, ImageDataset) else open_dataset(data, dataset=entry, patient_pattern=patient_pattern)
    )
    if isinstance(data, ImageDataset) and patient_pattern is not None:
        raise DatasetError("patient_pattern would have no effect on an ImageDataset; give it to open_dataset")
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


def _already_done(out: Path, identity: dict[str, Any]) -> TrainResult | None:
    results = finished_before(out, identity)
    if results is None:
        return None
    lines = (out / HISTORY).read_text(encoding="utf-8").splitlines() if (out / HISTORY).is_file() else []
    history = [json.loads(line) for line in lines]
    found, record = evaluations(results), results["training"]
    return TrainResult(out, True, record["epochs"], record["best_epoch"], history, found["val"], found.get("test"))
