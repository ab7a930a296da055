"""One training run in its folder, the same for every task: lock, resume, train, select, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from ..utils.devices import wait_for_everyone
from ..utils.files import LockedError, locked
from .checkpoint import LOCK, CheckpointStore, check_same_run
from .live_plot import LivePlot
from .progress import Progress
from .recipe import Recipe
from .record import finished_before
from .run_log import HISTORY, RunLog
from .teacher import Teacher
from .trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS = "checkpoint"

M = TypeVar("M", bound=Any)  # the model
E = TypeVar("E")  # an evaluation of it


@dataclass(frozen=True)
class TrainResult(Generic[M, E]):
    """Result of `train`, `train_segmenter` and `train_detector`.

    Attributes:
        out: the folder; it holds a model once the run has finished.
        model_class: the class that loads it.
        finished: False if the run was stopped by `max_seconds` or SIGTERM; the same call resumes it.
        epoch: epochs completed.
        best_epoch: the selected epoch, counted from 1; None before the first validation.
        history: one row per epoch, as in `history.csv`.
        val: evaluation of the selected weights on validation; None unless finished.
        test: evaluation on test; None unless finished, or without such a split.
    """

    out: Path
    model_class: type[M]
    finished: bool
    epoch: int
    best_epoch: int | None
    history: list[dict[str, Any]]
    val: E | None = None
    test: E | None = None

    def load(self) -> M:
        """Loads the trained model."""
        return self.model_class.from_pretrained(self.out)


@dataclass(frozen=True)
class Run:
    """Everything about a run but its task, its data and its model.

    Fields that are not listed are the arguments of `train` by the same name.

    Attributes:
        recipe: with the size of the images.
        identity: inputs of the run (`run_identity`).
        accelerator: device, precision and processes.
        deadline: `time.monotonic()` after which to stop; None: never.
        plot: draws the history after each epoch.
        graphs: off by default: decoders and losses of other packages may not be safe to capture.
    """

    out: Path
    recipe: Recipe
    identity: dict[str, Any]
    accelerator: Accelerator
    seed: int
    accumulate: int
    half: bool
    deadline: float | None
    checkpoint_seconds: float
    restart: bool
    progress: bool
    tensorboard: bool
    plot: LivePlot | None = None
    finish_early: bool = False
    graphs: str = "off"
    teacher: Teacher | None = None

    @property
    def first(self) -> bool:
        """Whether this process, of rank 0, writes the files."""
        return self.accelerator.process_index == 0

    @property
    def dtype(self) -> torch.dtype | None:
        """Type in which the weights are stored; None: as they are."""
        return torch.float16 if self.half else None

    @property
    def final_identity(self) -> dict[str, Any]:
        """By what a finished run is recognised: the type of the weights too, which does not affect the training."""
        return self.identity | {"stored": "float16" if self.half else "float32"}


class Task(ABC, Generic[M, E]):
    """What differs between tasks."""

    result_files: ClassVar[tuple[str, ...]]
    """What a finished run leaves, beside its history."""

    trainer: ClassVar[type[Trainer]] = Trainer

    def trainer_options(self) -> dict[str, Any]:
        """Returns further arguments of the trainer."""
        return {}

    def check(self, run: Run, resumed: bool) -> None:
        """Checks the data before training, in the process of rank 0.

        Args:
            run: the run.
            resumed: whether a checkpoint exists, so that they were checked before.
        """

    @abstractmethod
    def images(self, run: Run, model: M, log: RunLog) -> Any:
        """Returns a function of (split, size) that decodes images and labels once."""

    @abstractmethod
    def finish(self, run: Run, model: M, images: Any, state: Progress) -> dict[str, E]:
        """Writes the model folder; returns the evaluation of "val" and, where the split exists, of "test".

        Args:
            run: the run.
            model: with the weights of the best epoch, as the folder will hold them; on the device of the run.
            images: of `images()`.
            state: the end of the training.
        """

    @abstractmethod
    def restore(self, results: dict[str, Any]) -> dict[str, E]:
        """Returns the evaluations by split that `results.json` holds."""


def run_task(task: Task[M, E], run: Run, model: M, table: dict[str, str]) -> TrainResult[M, E]:
    """Trains or resumes, selects on val, and evaluates once on test; returns the result, also of a finished run.

    Args:
        task: what is trained.
        run: how, and where to.
        model: with initial weights.
        table: a digest of each image, to tell which ones changed; emptied once compared, as it may be large.

    Raises:
        ResumeError, LockedError, FileExistsError, TrainingError: see `train`.
    """
    kind: type[M] = type(model)
    if not run.restart and (done := _already_done(task, run, kind)) is not None:
        return done
    store = CheckpointStore(run.out / CHECKPOINTS)
    with nothing_left(run, store), alone(run.out, run.accelerator):
        if run.restart and run.first:
            store.clear()
            for name in task.result_files:
                (run.out / name).unlink(missing_ok=True)
        wait_for_everyone(run.accelerator)
        if (done := _already_done(task, run, kind)) is not None:  # by the run that just released the folder
            return done
        if run.first:
            resumed = bool(store)
            check_same_run(store, run.identity, table)
            task.check(run, resumed)
            store.note_run(run.identity, table)
        table.clear()
        log = RunLog(run.out, run.progress, run.tensorboard, run.first, run.plot)
        images = task.images(run, model, log)
        trainer = task.trainer(
            model,
            run.recipe,
            images,
            run.accelerator,
            store,
            log,
            seed=run.seed,
            accumulate=run.accumulate,
            identity=run.identity,
            deadline=run.deadline,
            checkpoint_seconds=run.checkpoint_seconds,
            graphs=run.graphs,
            teacher=run.teacher,
            **task.trainer_options(),
        )
        try:
            state = trainer.fit()
        finally:
            log.close()
        best = state.best["epoch"] if state.best else None
        finished = best is not None and (state.finished(run.recipe) or run.finish_early)
        shown = None if best is None else best + 1
        result = TrainResult[M, E](run.out, kind, finished, state.epoch, shown, state.history)
        if not finished or best is None:
            return result
        found = task.finish(run, _as_stored(run, model, store, best), images, state)
        if run.first:
            store.clear()
        wait_for_everyone(run.accelerator)
        return dataclasses.replace(result, val=found["val"], test=found.get("test"))


def _as_stored(run: Run, model: M, store: CheckpointStore, best: int) -> M:
    """Returns the model of epoch `best`, counted from 0, as its folder will hold it."""
    wait_for_everyone(run.accelerator)  # rank 0 may still be writing
    kind = type(model)
    final = kind(model.config)
    final.load_state_dict(store.load_best(best))
    with tempfile.TemporaryDirectory() as folder:
        final = kind.from_pretrained(final.save_pretrained(folder, dtype=run.dtype))
    return final.to(run.accelerator.device)


def _already_done(task: Task[M, E], run: Run, kind: type[M]) -> TrainResult[M, E] | None:
    """Returns the result of the same run if it has finished in its folder, else None."""
    results = finished_before(run.out, run.final_identity)
    if results is None:
        return None
    file = run.out / HISTORY
    history = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if run.plot is not None:
        run.plot.show(history)
    found, record = task.restore(results), results["training"]
    epoch, best = record["epochs"], record["best_epoch"]
    return TrainResult[M, E](run.out, kind, True, epoch, best, history, found["val"], found.get("test"))


@contextlib.contextmanager
def nothing_left(run: Run, store: CheckpointStore) -> Iterator[None]:
    """Removes what a run has noted if it fails before its first checkpoint, when there is nothing to resume."""
    new = not run.out.exists()
    try:
        yield
    except LockedError:  # the notes are those of the other run
        raise
    except BaseException:
        if run.first and not store:
            store.clear()
            if new:
                with contextlib.suppress(OSError):
                    run.out.rmdir()
        raise


@contextlib.contextmanager
def alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Locks the folder of a run in the process of rank 0, so that a second run into it is rejected."""
    if accelerator.process_index != 0:
        yield
        return
    lock = out / CHECKPOINTS / LOCK
    try:
        with locked(lock, f"{out} is being trained", timeout=0, remove=True):
            yield
    except LockedError as error:
        raise LockedError(f"{error}; wait until it ends, or choose another folder (out=, --out)") from None
    finally:
        with contextlib.suppress(OSError):
            lock.parent.rmdir()  # empty once the run has finished
