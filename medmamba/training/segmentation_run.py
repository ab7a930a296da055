"""`medmamba.train_segmenter`: trains on images with masks, and writes a folder that `MedMambaSegmenter` loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..dense.cached import Progressed
from ..dense.split_cache import SplitCache
from ..imaging.preprocess import normalise
from ..metrics.segmentation import SegmentationEvaluation
from ..segmentation import MedMambaSegmenter, create_segmenter
from ..segmentation.cached import CachedPairs, cache_pairs
from ..segmentation.config import SegmenterConfig
from ..segmentation.dataset import SegmentationDataset
from ..segmentation.evaluate import evaluate_segmenter
from ..segmentation.open import open_segmentation
from ..segmentation.predict import probabilities
from ..utils.devices import pick_device
from .dense import DenseTask, run_dense, start_from
from .dense_data import with_splits
from .graphed_step import GRAPHS
from .recipe import Recipe, load_recipe
from .run_log import RunLog
from .segmentation import LOSSES, SegmentationTrainer, binary_planes
from .task import Run, TrainResult
from .teacher import load_mask_teacher

if TYPE_CHECKING:
    from ..model import MedMamba

GRID = np.arange(0.1, 0.91, 0.05)  # thresholds among which validation images choose


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
    finish_early: bool = False,
    checkpoint_seconds: float = 60.0,
    graphs: str = "off",
    teacher: str | os.PathLike | MedMambaSegmenter | None = None,
    restart: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **settings: Any,
) -> TrainResult[MedMambaSegmenter, SegmentationEvaluation]:
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
        loss: "dice+ce", "dice+focal" where the foreground is rare, or "image-dice+ce": the Dice loss of each image, in
            which small objects count as much as large ones, instead of that of the batch.
        split: other fractions for data without splits.
        patient_pattern: regular expression; group 1 in a file name is the patient.
        in_chans: channels of the model; default: those of `init`, or 3.
        device, precision: see `make_accelerator`.
        accumulate: parts in which each process takes its share of a batch, to save memory.
        half: stores the weights in float16.
        max_seconds: stops after about this time; the same call resumes.
        finish_early: makes the best epoch so far the final model when the run is stopped, instead of resuming later.
        checkpoint_seconds: minimum time between two checkpoints.
        graphs: "auto": forward and backward as one CUDA graph on a GPU; "off": never. Not every decoder allows it.
        teacher: distillation: a segmentation model for the same classes, a folder or a model, whose probabilities for
            each augmented batch count by the recipe's `distill`, the masks by the rest.
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
    if graphs not in GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {graphs!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    chosen = load_recipe(recipe, **settings)
    dataset = with_splits(open_segmentation(data, classes, patient_pattern=patient_pattern), split, seed)
    torch.manual_seed(seed)
    model = start_from(init, MedMambaSegmenter, dataset.classes)
    if model is None:
        options: dict[str, Any] = dict(exclusive=dataset.exclusive, decoder=decoder, in_chans=in_chans)
        model = create_segmenter(variant, dataset.classes, start=init, size=chosen.size, **options)  # type: ignore[arg-type]
    adviser = None if teacher is None else load_mask_teacher(teacher, model.config, pick_device(device))
    return run_dense(
        Segmentation(dataset, init, {"loss": loss}),
        model,
        chosen,
        out,
        seed=seed,
        device=device,
        precision=precision,
        accumulate=accumulate,
        half=half,
        max_seconds=max_seconds,
        finish_early=finish_early,
        checkpoint_seconds=checkpoint_seconds,
        graphs=graphs,
        teacher=adviser,
        restart=restart,
        progress=progress,
        tensorboard=tensorboard,
    )


class Segmentation(DenseTask[MedMambaSegmenter, SegmentationEvaluation]):
    """Training of segmentation models."""

    trainer = SegmentationTrainer

    def trainer_options(self) -> dict[str, Any]:
        return self.settings

    def images(self, run: Run, model: MedMambaSegmenter, log: RunLog) -> SplitCache:
        return self.cache(cache_pairs, run, model, log)

    def choose(self, model: MedMambaSegmenter, val: CachedPairs, device: torch.device) -> SegmenterConfig:
        return model.config.replace(thresholds=choose_thresholds(model, val, device))

    def evaluate(
        self, model: MedMambaSegmenter, dataset: SegmentationDataset, progress: Progressed
    ) -> SegmentationEvaluation:
        return evaluate_segmenter(model, dataset, progress=progress)

    def restore_one(self, data: dict[str, Any]) -> SegmentationEvaluation:
        return SegmentationEvaluation.from_dict(data)


def choose_thresholds(model: MedMambaSegmenter, data: Any, device: torch.device) -> tuple[float, ...]:
    """Returns for each class the threshold with the highest mean Dice over the images of a validation split.

    Of equal ones the nearest to 0.5. Exclusive classes have no thresholds; theirs stay as they are.

    Args:
        data: `CachedPairs`.
    """
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
