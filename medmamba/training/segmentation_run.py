"""`medmamba.train_segmenter`: trains on images with masks, and writes a folder that `MedMambaSegmenter` loads."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import DatasetError
from ..metrics.segmentation import SegmentationEvaluation
from ..segmentation import MedMambaSegmenter
from ..segmentation.cached import PairCache
from ..segmentation.dataset import SegmentationDataset
from ..segmentation.evaluate import evaluate_segmenter
from ..segmentation.open import check_patients, make_segmentation_splits, open_segmentation
from ..segmentation.predict import probabilities
from ..utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from ..utils.devices import make_accelerator, wait_for_everyone
from ..utils.files import write_text
from .checkpoint import CheckpointStore, check_same_run
from .finalise import finished_before
from .identity import model_fingerprint, run_identity
from .recipe import Recipe, load_recipe
from .run import CHECKPOINTS, alone
from .run_log import HISTORY, RunLog
from .segmentation import LOSSES, SegmentationTrainer, binary_planes
from .segmentation_setup import build, data_table, hash_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..model import MedMamba

RESULTS_NAME = "results.json"
RESULT_FILES = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME, "results.md")
GRID = np.arange(0.1, 0.91, 0.05)  # thresholds among which validation images choose


@dataclass(frozen=True)
class SegmenterResult:
    """Result of `train_segmenter`.

    Attributes:
        out: the folder; it holds a model once the run has finished.
        finished: False if the run was stopped by `max_seconds` or SIGTERM; the same call resumes it.
        epoch: epochs completed.
        best_epoch: the selected epoch, counted from 1; None before the first validation.
        history: one row per epoch, as in `history.csv`.
        val, test: evaluation at the size of the images; None unless finished, or without such a split.
    """

    out: Path
    finished: bool
    epoch: int
    best_epoch: int | None
    history: list[dict[str, Any]]
    val: SegmentationEvaluation | None = None
    test: SegmentationEvaluation | None = None

    def load(self) -> MedMambaSegmenter:
        """Loads the trained model."""
        return MedMambaSegmenter.from_pretrained(self.out)


def train_segmenter(
    data: str | os.PathLike | SegmentationDataset,
    out: str | os.PathLike,
    classes: Sequence[str] = ("object",),
    recipe: str | os.PathLike | Recipe = "segment",
    variant: str = "nano",
    init: str | os.PathLike | MedMamba | MedMambaSegmenter | None = None,
    *,
    seed: int = 0,
    decoder: str = "unet",
    loss: str = "dice+ce",
    split: Sequence[float] | None = None,
    patient_pattern: str | None = None,
    in_chans: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    accumulate: int = 1,
    half: bool = True,
    max_seconds: float | None = None,
    checkpoint_seconds: float = 60.0,
    restart: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **settings: Any,
) -> SegmenterResult:
    """Trains, selects the best epoch and the thresholds on validation, then evaluates on test, once.

    After an interruption of any kind, the same call resumes from the last checkpoint.

    Args:
        data: anything that `medmamba.segmentation.open_segmentation` takes. Needs splits train and val; test is used
            if present. Data without splits are divided 0.7, 0.1, 0.2, by patient where known.
        out: folder for the model, `results.json`, `history.csv`, and checkpoints during the run.
        classes: what is segmented, in the order of the values 1, 2, ... in the masks; COCO has its own.
        recipe: name, `.json` file or `Recipe`.
        variant: size of a new encoder; ignored with `init`.
        init: what to start from: a MedMamba for the encoder, or a segmentation model of the same classes.
        seed: of initial weights, splits, order, augmentation and dropout.
        decoder: see `create_segmenter`.
        loss: "dice+ce", or "dice+focal" where the foreground is rare.
        split: other fractions for data without splits.
        patient_pattern: regular expression; group 1 in a file name is the patient.
        in_chans: channels of the model; default: those of `init`, or 3.
        device, precision: see `make_accelerator`.
        accumulate: parts in which each process takes its share of a batch, to save memory.
        half: stores the weights in float16.
        max_seconds: stops after about this time; the same call resumes.
        checkpoint_seconds: minimum time between two checkpoints.
        restart: deletes the run in `out` first.
        progress: shows progress bars.
        tensorboard: writes TensorBoard logs.
        settings: of the recipe, by name (`epochs=10`, `size=256`).

    Raises:
        RecipeError, DatasetError, PretrainedError, ConfigError: a problem to fix before training.
        ResumeError: `out` holds another run.
        LockedError: another process is training into `out`.
        TrainingError: the loss or the weights are NaN or infinite.
    """
    started = time.monotonic()
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    chosen = load_recipe(recipe, **settings)
    dataset = _open(data, classes, split, patient_pattern, seed)
    torch.manual_seed(seed)
    model = build(dataset, variant, init, decoder, in_chans, chosen.size)
    chosen = chosen if chosen.size else chosen.replace(size=model.config.preprocess.input_size[0])
    if chosen.evaluated_at != model.config.preprocess.input_size[0]:
        size = (chosen.evaluated_at, chosen.evaluated_at)
        encoder = model.config.encoder
        encoder = encoder.replace(preprocess=dataclasses.replace(encoder.preprocess, input_size=size))
        model.config = model.config.replace(encoder=encoder)
    accelerator = make_accelerator(device, precision)
    table = data_table(dataset)
    parts = accelerator.num_processes * accumulate
    source = model if init is not None else None
    identity = {
        **run_identity(
            chosen,
            model,  # type: ignore[arg-type]
            None,
            hash_rows(dataset, table),
            seed=seed,
            precision=accelerator.mixed_precision,
            parts=parts,
        ),
        "init_weights": model_fingerprint(source) if source else "",  # type: ignore[arg-type]
        "loss": loss,
        "stored": "float16" if half else "float32",
    }
    out = Path(out)
    if not restart and (done := _already_done(out, identity)) is not None:
        return done
    store = CheckpointStore(out / CHECKPOINTS)
    with alone(out, accelerator):
        if restart and accelerator.process_index == 0:
            store.clear()
            for name in RESULT_FILES:
                (out / name).unlink(missing_ok=True)
        wait_for_everyone(accelerator)
        if accelerator.process_index == 0:
            check_same_run(store, identity, table)
            store.note_run(identity, table)
        log = RunLog(out, progress, tensorboard, accelerator.process_index == 0)
        images = PairCache(dataset, model.config.preprocess, model.config.in_chans, accelerator, progress, log.warn)
        trainer = SegmentationTrainer(
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
            graphs="off",  # decoders and losses of other packages are not known to be safe to capture
            loss=loss,
        )
        try:
            state = trainer.fit()
        finally:
            log.close()
        best = state.best["epoch"] if state.best else None
        finished = state.finished(chosen) and best is not None
        result = SegmenterResult(out, finished, state.epoch, None if best is None else best + 1, state.history)
        if not finished or best is None:
            return result
        record = _record(dataset, chosen, identity, state, accelerator, init, loss)
        found = _finish(out, model, images, store, accelerator, record, best, half, progress)
        return dataclasses.replace(result, val=found["val"], test=found.get("test"))


def choose_thresholds(model: MedMambaSegmenter, data: Any, device: torch.device) -> tuple[float, ...]:
    """Returns for each class the threshold with the highest mean Dice over the images of a validation split.

    Of equal ones the nearest to 0.5. Exclusive classes have no thresholds; theirs stay as they are.

    Args:
        data: `CachedPairs`.
    """
    from ..imaging.preprocess import normalise

    config = model.config
    if config.exclusive:
        return config.thresholds
    grid = sorted(GRID.tolist(), key=lambda value: abs(value - 0.5))
    sums = torch.zeros(len(grid), len(config.classes), dtype=torch.float64)
    with torch.inference_mode():
        for rows in torch.arange(len(data)).split(8):
            images, masks = data.batch(rows, device)
            found = probabilities(model(normalise(images, config.preprocess)), False)
            for i, value in enumerate(grid):
                at = torch.full((len(config.classes), 1, 1), value, device=device)
                predicted, true, counted = binary_planes(found, masks, config, at)
                both = (predicted & true & counted).sum((2, 3)).double()
                total = (predicted & counted).sum((2, 3)) + (true & counted).sum((2, 3))
                sums[i] += torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0).sum(0).cpu()
    return tuple(round(grid[i], 2) for i in sums.argmax(0).tolist())


def _open(
    data: Any, classes: Sequence[str], split: Sequence[float] | None, pattern: str | None, seed: int
) -> SegmentationDataset:
    dataset = open_segmentation(data, classes, patient_pattern=pattern)
    if not any(pair.split for pair in dataset.pairs):
        dataset = make_segmentation_splits(dataset, split or (0.7, 0.1, 0.2), seed)
    elif split is not None:
        raise DatasetError(f"{dataset.name} has splits already ({dataset.split_sizes}); leave split= out")
    if missing := [name for name in ("train", "val") if not dataset.split_sizes.get(name)]:
        raise DatasetError(
            f"{dataset.name} has no images in {' and '.join(missing)}; it has {dataset.split_sizes}. Provide folders "
            "train and val, or data without splits, which are then divided"
        )
    check_patients(dataset)
    return dataset


def _record(
    dataset: SegmentationDataset,
    recipe: Recipe,
    identity: dict,
    state: Any,
    accelerator: Accelerator,
    init: Any,
    loss: str,
) -> dict[str, Any]:
    import accelerate

    from .._version import __version__

    return {
        "dataset": dataset.name,
        "split_sizes": {str(name): count for name, count in dataset.split_sizes.items()},
        "recipe": recipe.name,
        "settings": recipe.to_dict(),
        "loss": loss,
        "epochs": state.epoch,
        "best_epoch": state.best["epoch"] + 1,
        "seed": identity["seed"],
        "identity": identity,
        "init": str(init) if isinstance(init, str | os.PathLike) else "" if init is None else "a model",
        "device": torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu",
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
    out: Path,
    model: MedMambaSegmenter,
    images: PairCache,
    store: CheckpointStore,
    accelerator: Accelerator,
    record: dict[str, Any],
    best: int,
    half: bool,
    progress: bool,
) -> dict[str, SegmentationEvaluation]:
    """Writes the model folder; test images are used here for the first time, with the weights as stored."""
    from tqdm import tqdm

    wait_for_everyone(accelerator)
    dtype = torch.float16 if half else None
    kind = type(model)  # a peer in the same trainer is a class of its own
    final = kind(model.config)
    final.load_state_dict(store.load_best(best))
    with tempfile.TemporaryDirectory() as folder:
        final = kind.from_pretrained(final.save_pretrained(folder, dtype=dtype))
    final.to(accelerator.device)
    val = images("val", final.config.preprocess.input_size[0])
    final.config = final.config.replace(thresholds=choose_thresholds(final, val, accelerator.device), training=record)
    found = {}
    for split in ("val", "test"):
        if images.dataset.split_sizes.get(split):

            def bar(items, split=split):
                return tqdm(items, f"evaluating {split}", unit="img", disable=not progress)

            found[split] = evaluate_segmenter(final, images.dataset.split(split), progress=bar)
    if accelerator.process_index == 0:
        write_segmentation_results(out, found, record, final.config.thresholds)
        final.to("cpu").save_pretrained(out, dtype=dtype)
        store.clear()
    wait_for_everyone(accelerator)
    return found


def write_segmentation_results(
    out: Path, found: dict[str, SegmentationEvaluation], record: dict[str, Any], thresholds: Sequence[float]
) -> None:
    """Writes `results.md` and `results.json`."""
    sections = [f"## {split}\n\n{result.table()}\n" for split, result in found.items()]
    write_text(out / "results.md", "\n".join(sections))
    data = {
        "training": record,
        "thresholds": list(thresholds),
        "splits": {split: result.to_dict() for split, result in found.items()},
    }
    write_text(out / RESULTS_NAME, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _already_done(out: Path, identity: dict[str, Any]) -> SegmenterResult | None:
    """Returns the result of the same run if it has finished in this folder, else None."""
    results = finished_before(out, identity)
    if results is None:
        return None
    lines = (out / HISTORY).read_text(encoding="utf-8").splitlines() if (out / HISTORY).is_file() else []
    fields = [f.name for f in dataclasses.fields(SegmentationEvaluation)]
    found = {
        split: SegmentationEvaluation(**{name: data[name] for name in fields})
        for split, data in results["splits"].items()
    }
    record = results["training"]
    history = [json.loads(line) for line in lines]
    return SegmenterResult(out, True, record["epochs"], record["best_epoch"], history, found["val"], found.get("test"))
