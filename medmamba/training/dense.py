"""Training of models other than classifiers, with masks or boxes: checks of the data, evaluation, the model folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import DatasetError
from ..dense.cached import Progressed
from ..dense.split_cache import SplitCache
from ..evaluation import RESULTS_NAME
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from ..utils.devices import make_accelerator
from ..utils.files import write_text
from .dense_data import check_readable, data_digest, data_table
from .identity import model_fingerprint, run_identity
from .progress import Progress
from .recipe import Recipe
from .record import run_record
from .run_log import RunLog
from .task import E, M, Run, Task, TrainResult, run_task
from .teacher import weights_digest


class DenseTask(Task[M, E]):
    """Training of models for segmentation or detection.

    Args:
        dataset: with splits train and val.
        init: what the weights are from, for the record; None: they are random.
        settings: choices beside the recipe that affect the result, such as the loss.
    """

    result_files = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, "results.md")

    def __init__(self, dataset: Any, init: Any, settings: dict[str, Any]):
        self.dataset, self.settings = dataset, settings
        self.init = str(init) if isinstance(init, str | os.PathLike) else "" if init is None else "a model"

    def check(self, run: Run, resumed: bool) -> None:
        if not resumed:
            check_readable(self.dataset, "test")  # training reads the other splits; test images only when it has ended

    def cache(self, decode: Callable[..., Any], run: Run, model: M, log: RunLog) -> SplitCache:
        """Returns the images of a run; `decode` is `cache_pairs` or `cache_boxes`."""
        config = model.config
        return SplitCache(
            decode, self.dataset, config.preprocess, config.in_chans, run.accelerator, run.progress, log.warn
        )

    @abstractmethod
    def choose(self, model: M, val: Any, device: torch.device) -> Any:
        """Returns the configuration with what validation images choose, such as thresholds."""

    @abstractmethod
    def evaluate(self, model: M, dataset: Any, progress: Progressed) -> E:
        """Returns the evaluation of one split, which has `table()` and `to_dict()`."""

    @abstractmethod
    def restore_one(self, data: dict[str, Any]) -> E:
        """Returns the evaluation that `to_dict` wrote."""

    def finish(self, run: Run, model: M, images: Any, state: Progress) -> dict[str, E]:
        from tqdm import tqdm

        sizes = self.dataset.split_sizes
        record = {
            "dataset": self.dataset.name,
            "split_sizes": {str(name): count for name, count in sizes.items()},
            **run_record(run.recipe, run.final_identity, state, run.accelerator),
            **self.settings,
            "init": self.init,
        }
        val = images("val", model.config.preprocess.input_size[0])
        model.config = self.choose(model, val, run.accelerator.device).replace(training=record)

        def bar(rows: Iterable[int]) -> Iterable[int]:
            return tqdm(rows, unit="img", disable=not run.progress)

        # Test images are used here for the first time.
        splits = [split for split in ("val", "test") if sizes.get(split)]
        found: dict[str, Any] = {split: self.evaluate(model, self.dataset.split(split), bar) for split in splits}
        if run.first:
            write_text(run.out / "results.md", "\n".join(f"## {s}\n\n{e.table()}\n" for s, e in found.items()))
            data = {"training": record, "splits": {split: e.to_dict() for split, e in found.items()}}
            text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
            write_text(run.out / RESULTS_NAME, text + "\n")
            model.to("cpu").save_pretrained(run.out, dtype=run.dtype)
        return found

    def restore(self, results: dict[str, Any]) -> dict[str, E]:
        return {split: self.restore_one(data) for split, data in results["splits"].items()}


def run_dense(
    task: DenseTask[M, E],
    model: M,
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    seed: int,
    device: str,
    precision: str,
    accumulate: int,
    half: bool,
    max_seconds: float | None,
    teacher: nn.Module | None = None,
    **options: Any,
) -> TrainResult[M, E]:
    """Trains a model, selects on val, evaluates once on test, and writes the folder; see `train_segmenter`.

    Args:
        task: segmentation or detection.
        model: built for its classes, with initial weights.
        recipe: the size is that of the model where it has none.
        out: folder of the run.
        seed, device, precision, accumulate, half, max_seconds: see `train_segmenter`.
        teacher: see `train_segmenter`.
        options: further fields of `Run`.
    """
    started = time.monotonic()
    recipe = recipe if recipe.size else recipe.replace(size=model.config.preprocess.input_size[0])
    _resize_input(model, recipe.evaluated_at)
    accelerator = make_accelerator(device, precision)
    table = data_table(task.dataset)
    parts, precision = accelerator.num_processes * accumulate, accelerator.mixed_precision
    digest = data_digest(task.dataset, table)
    identity = {
        **run_identity(
            recipe,
            model,
            None,
            digest,
            seed=seed,
            precision=precision,
            parts=parts,
            teacher="" if teacher is None else weights_digest(teacher),
        ),
        "init_weights": model_fingerprint(model) if task.init else "",
        "stored": "float16" if half else "float32",
        **task.settings,
    }
    deadline = None if max_seconds is None else started + max_seconds
    chosen = dict(seed=seed, accumulate=accumulate, half=half, deadline=deadline, teacher=teacher)
    return run_task(task, Run(Path(out), recipe, identity, accelerator, **chosen, **options), model, table)  # type: ignore[arg-type]


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


def _resize_input(model: Any, side: int) -> None:
    """Sets the size of the network's input in the configuration of a model with an encoder."""
    encoder = model.config.encoder
    if encoder.preprocess.input_size != (side, side):
        preprocess = dataclasses.replace(encoder.preprocess, input_size=(side, side))
        model.config = model.config.replace(encoder=encoder.replace(preprocess=preprocess))
