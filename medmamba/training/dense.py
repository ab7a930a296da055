"""One training run of a model other than a classifier: locks, resuming, selection, evaluation, and the model folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..data import DatasetError
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from ..utils.devices import make_accelerator, wait_for_everyone
from ..utils.files import LockedError, write_text
from .checkpoint import CheckpointStore, check_same_run
from .dense_data import check_readable, data_digest, data_table
from .finalise import finished_before
from .identity import model_fingerprint, run_identity
from .recipe import Recipe
from .run import CHECKPOINTS, alone
from .run_log import HISTORY, RunLog
from .trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

RESULTS_NAME = "results.json"
RESULT_FILES = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, "results.md")


class DenseDataset(Protocol):
    """Images with masks or boxes. An example has `image`, `label_file`, `split` and `patient`."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def examples(self) -> Sequence[Any]: ...

    @property
    def split_sizes(self) -> dict[str | None, int]: ...

    def split(self, name: str) -> Any: ...


class Task(Protocol):
    """What differs between segmentation and detection."""

    settings: dict[str, Any]
    """Choices beside the recipe that affect the result, such as the loss."""

    def images(self, dataset: Any, model: Any, accelerator: Accelerator, progress: bool, say: Any) -> Any:
        """Returns a function of (split, size) that decodes images and labels once."""

    def trainer(self, *args: Any, **options: Any) -> Trainer:
        """Returns the trainer."""

    def choose(self, model: Any, val: Any, device: torch.device) -> Any:
        """Returns the configuration with what validation images choose, such as thresholds."""

    def evaluate(self, model: Any, dataset: Any, progress: bool) -> Any:
        """Returns the evaluation of one split, which has `table()`, `to_dict()` and `from_dict()`."""

    def restore(self, data: dict[str, Any]) -> Any:
        """Returns the evaluation that `to_dict` wrote."""


@dataclass(frozen=True)
class DenseResult:
    """Result of `train_segmenter` and `train_detector`.

    Attributes:
        out: the folder; it holds a model once the run has finished.
        model_class: what loads it.
        finished: False if the run was stopped by `max_seconds` or SIGTERM; the same call resumes it.
        epoch: epochs completed.
        best_epoch: the selected epoch, counted from 1; None before the first validation.
        history: one row per epoch, as in `history.csv`.
        val, test: evaluation at the size of the images; None unless finished, or without such a split.
    """

    out: Path
    model_class: Any
    finished: bool
    epoch: int
    best_epoch: int | None
    history: list[dict[str, Any]]
    val: Any = None
    test: Any = None

    def load(self) -> Any:
        """Loads the trained model."""
        return self.model_class.from_pretrained(self.out)


def run_dense(
    task: Task,
    dataset: DenseDataset,
    model: Any,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    init: Any,
    seed: int,
    device: str,
    precision: str,
    accumulate: int,
    half: bool,
    max_seconds: float | None,
    checkpoint_seconds: float,
    restart: bool,
    progress: bool,
    tensorboard: bool,
) -> DenseResult:
    """Trains a model, selects on val, evaluates once on test, and writes the folder; see `train_segmenter`.

    Args:
        task: segmentation or detection.
        dataset: with splits train and val.
        model: built for its classes, with initial weights.
        recipe: with the size of the images.
        init: what the weights are from, for the record; None: they are random.
    """
    started, out = time.monotonic(), Path(out)
    accelerator = make_accelerator(device, precision)
    table = data_table(dataset)
    identity = {
        **run_identity(
            recipe,
            model,
            None,
            data_digest(dataset, table),
            seed=seed,
            precision=accelerator.mixed_precision,
            parts=accelerator.num_processes * accumulate,
        ),
        "init_weights": model_fingerprint(model) if init is not None else "",
        "stored": "float16" if half else "float32",
        **task.settings,
    }
    if not restart and (done := _already_done(task, type(model), out, identity)) is not None:
        return done
    store = CheckpointStore(out / CHECKPOINTS)
    if restart or not store:
        check_readable(dataset, "test")  # training reads the other splits; test images only when it has ended
    with nothing_left(out, store, accelerator), alone(out, accelerator):
        if restart and accelerator.process_index == 0:
            store.clear()
            for name in RESULT_FILES:
                (out / name).unlink(missing_ok=True)
        wait_for_everyone(accelerator)
        if accelerator.process_index == 0:
            check_same_run(store, identity, table)
            store.note_run(identity, table)
        log = RunLog(out, progress, tensorboard, accelerator.process_index == 0)
        images = task.images(dataset, model, accelerator, progress, log.warn)
        trainer = task.trainer(
            model,
            recipe,
            images,
            accelerator,
            store,
            log,
            seed=seed,
            accumulate=accumulate,
            identity=identity,
            deadline=None if max_seconds is None else started + max_seconds,
            checkpoint_seconds=checkpoint_seconds,
            graphs="off",  # decoders and losses of other packages are not known to be safe to capture
        )
        try:
            state = trainer.fit()
        finally:
            log.close()
        best = state.best["epoch"] if state.best else None
        finished = state.finished(recipe) and best is not None
        shown = None if best is None else best + 1
        result = DenseResult(out, type(model), finished, state.epoch, shown, state.history)
        if not finished or best is None:
            return result
        record = _record(task, dataset, recipe, identity, state, accelerator, init)
        found = _finish(task, out, model, dataset, images, store, accelerator, record, best, half, progress)
        return dataclasses.replace(result, val=found["val"], test=found.get("test"))


@contextlib.contextmanager
def nothing_left(out: Path, store: CheckpointStore, accelerator: Accelerator) -> Iterator[None]:
    """Removes what a run has noted if it fails before its first checkpoint, when there is nothing to resume."""
    new = not out.exists()
    try:
        yield
    except LockedError:  # the notes are those of the other run
        raise
    except BaseException:
        if accelerator.process_index == 0 and not store:
            store.clear()
            if new:
                with contextlib.suppress(OSError):
                    out.rmdir()
        raise


def start_from(init: Any, kind: Any, classes: tuple[str, ...]) -> Any:
    """Returns a copy of `init` in train mode if it is a model of this kind; None if it is a classifier, or None.

    Raises:
        DatasetError: a model of this kind for other classes.
    """
    if init is None or not (isinstance(init, kind) or _kind_of(init) == kind.config_class.MODEL_TYPE):
        return None
    model = copy.deepcopy(init) if isinstance(init, kind) else kind.from_pretrained(init)
    if tuple(model.config.classes) != classes:
        raise DatasetError(
            f"init knows {', '.join(model.config.classes)}, and the data have {', '.join(classes)}; start from a "
            "MedMamba, whose encoder is taken, or name the same classes in the same order"
        )
    return model.train()


def _kind_of(name: Any) -> str | None:
    try:
        found = json.loads((Path(name) / CONFIG_NAME).read_text(encoding="utf-8"))
        return found.get("model_type") if isinstance(found, dict) else None
    except (OSError, ValueError, TypeError):
        return None


def _record(
    task: Task,
    dataset: DenseDataset,
    recipe: Recipe,
    identity: dict[str, Any],
    state: Any,
    accelerator: Accelerator,
    init: Any,
) -> dict[str, Any]:
    """Returns the provenance of the weights, for `config.training`."""
    import accelerate

    from .._version import __version__

    gpu = accelerator.device.type == "cuda"
    return {
        "dataset": dataset.name,
        "split_sizes": {str(name): count for name, count in dataset.split_sizes.items()},
        "recipe": recipe.name,
        "settings": recipe.to_dict(),
        **task.settings,
        "epochs": state.epoch,
        "best_epoch": state.best["epoch"] + 1,
        "seed": identity["seed"],
        "identity": identity,
        "init": str(init) if isinstance(init, str | os.PathLike) else "" if init is None else "a model",
        "device": torch.cuda.get_device_name(accelerator.device) if gpu else f"cpu ({platform.machine()})",
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "seconds": round(sum(row["seconds"] for row in state.history), 1),
        "versions": {
            "medmamba": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
    }


def _finish(
    task: Task,
    out: Path,
    model: Any,
    dataset: DenseDataset,
    images: Any,
    store: CheckpointStore,
    accelerator: Accelerator,
    record: dict[str, Any],
    best: int,
    half: bool,
    progress: bool,
) -> dict[str, Any]:
    """Writes the model folder; test images are used here for the first time, with the weights as stored."""
    wait_for_everyone(accelerator)
    kind, dtype = type(model), torch.float16 if half else None
    final = kind(model.config)
    final.load_state_dict(store.load_best(best))
    with tempfile.TemporaryDirectory() as folder:
        final = kind.from_pretrained(final.save_pretrained(folder, dtype=dtype))
    final.to(accelerator.device)
    val = images("val", final.config.preprocess.input_size[0])
    final.config = task.choose(final, val, accelerator.device).replace(training=record)
    found = {
        split: task.evaluate(final, dataset.split(split), progress)
        for split in ("val", "test")
        if dataset.split_sizes.get(split)
    }
    if accelerator.process_index == 0:
        write_text(out / "results.md", "\n".join(f"## {split}\n\n{e.table()}\n" for split, e in found.items()))
        data = {"training": record, "splits": {split: e.to_dict() for split, e in found.items()}}
        write_text(out / RESULTS_NAME, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        final.to("cpu").save_pretrained(out, dtype=dtype)
        store.clear()
    wait_for_everyone(accelerator)
    return found


def _already_done(task: Task, kind: Any, out: Path, identity: dict[str, Any]) -> DenseResult | None:
    """Returns the result of the same run if it has finished in this folder, else None."""
    results = finished_before(out, identity)
    if results is None:
        return None
    lines = (out / HISTORY).read_text(encoding="utf-8").splitlines() if (out / HISTORY).is_file() else []
    found = {split: task.restore(data) for split, data in results["splits"].items()}
    record, history = results["training"], [json.loads(line) for line in lines]
    val, test = found["val"], found.get("test")
    return DenseResult(out, kind, True, record["epochs"], record["best_epoch"], history, val, test)
