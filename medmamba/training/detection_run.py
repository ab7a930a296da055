"""`medmamba.train_detector`: trains on images with boxes, and writes a folder that `MedMambaDetector` loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..dense.cached import Progressed
from ..dense.split_cache import SplitCache
from ..detection import MedMambaDetector, create_detector
from ..detection.cached import CachedBoxes, cache_boxes
from ..detection.config import DetectorConfig
from ..detection.dataset import DetectionDataset, open_detection
from ..detection.evaluate import evaluate_detector
from ..imaging.preprocess import normalise
from ..metrics.detection import DetectionEvaluation
from .dense import DenseTask, run_dense, start_from
from .dense_data import with_splits
from .detection import DetectionTrainer
from .recipe import Recipe, load_recipe
from .run_log import RunLog
from .task import Run, TrainResult

if TYPE_CHECKING:
    from ..model import MedMamba

GRID = np.arange(0.1, 0.91, 0.05)  # scores among which validation images choose


def train_detector(
    data: str | os.PathLike | DetectionDataset,
    out: str | os.PathLike,
    classes: Sequence[str] | None = None,
    recipe: str | os.PathLike | Recipe = "detect",
    variant: str = "nano",
    init: str | os.PathLike | MedMamba | MedMambaDetector | None = None,
    *,
    seed: int = 0,
    small_objects: bool = False,
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
    restart: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    **settings: Any,
) -> TrainResult[MedMambaDetector, DetectionEvaluation]:
    """Trains, selects the best epoch and the reported score on validation, then evaluates on test, once.

    After an interruption of any kind, the same call resumes from the last checkpoint.

    Args:
        data: anything that `medmamba.detection.dataset.open_detection` takes. Needs splits train and val; test is used
            if present. Data without splits are divided 0.7, 0.1, 0.2, by patient where known.
        out: folder for the model, `results.json`, `history.csv`, and checkpoints during the run.
        classes: names in the order of their numbers; None: those found.
        recipe, variant, seed: as in `train_segmenter`.
        init: what to start from: a MedMamba for the encoder, or a detector of the same classes.
        small_objects: see `create_detector`.
        split, patient_pattern, in_chans, device, precision, accumulate, half: as in `train_segmenter`.
        max_seconds, finish_early, checkpoint_seconds, restart, progress, tensorboard, settings: as in
            `train_segmenter`.

    Raises:
        RecipeError, DatasetError, PretrainedError, ConfigError: a problem to fix before training.
        ResumeError, LockedError, TrainingError: as in `train`.
    """
    chosen = load_recipe(recipe, **settings)
    dataset = with_splits(open_detection(data, classes, patient_pattern=patient_pattern), split, seed)
    torch.manual_seed(seed)
    model = start_from(init, MedMambaDetector, dataset.classes)
    if model is None:
        options: dict[str, Any] = dict(small_objects=small_objects, in_chans=in_chans, size=chosen.size)
        model = create_detector(variant, dataset.classes, start=init, **options)  # type: ignore[arg-type]
    return run_dense(
        Detection(dataset, init, {}),
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
        restart=restart,
        progress=progress,
        tensorboard=tensorboard,
    )


class Detection(DenseTask[MedMambaDetector, DetectionEvaluation]):
    """Training of detectors."""

    trainer = DetectionTrainer

    def images(self, run: Run, model: MedMambaDetector, log: RunLog) -> SplitCache:
        for note in self.dataset.notes:
            log.warn(f"{self.dataset.name}: {note}")
        return self.cache(cache_boxes, run, model, log)

    def choose(self, model: MedMambaDetector, val: CachedBoxes, device: torch.device) -> DetectorConfig:
        return model.config.replace(score=choose_score(model, val, device))

    def evaluate(self, model: MedMambaDetector, dataset: DetectionDataset, progress: Progressed) -> DetectionEvaluation:
        return evaluate_detector(model, dataset, progress=progress)

    def restore_one(self, data: dict[str, Any]) -> DetectionEvaluation:
        return DetectionEvaluation.from_dict(data)


def choose_score(model: MedMambaDetector, data: Any, device: torch.device) -> float:
    """Returns the score from which boxes are reported: that with the highest F1 at IoU .50 on validation images.

    Args:
        data: `CachedBoxes`.
    """
    from torchvision.ops import box_iou

    hits = np.zeros((len(GRID), 2))  # true positives, reported boxes
    total = 0
    with torch.inference_mode():
        for rows in torch.arange(len(data)).split(8):
            images, labels = data.batch(rows, device)
            for entry, (boxes, numbers) in zip(model(normalise(images, model.config.preprocess)), labels, strict=True):
                total += len(numbers)
                found = {name: entry[name].cpu() for name in ("boxes", "scores", "labels")}
                same = found["labels"][:, None] == numbers[None]
                overlaps = box_iou(found["boxes"].float(), boxes) * same
                for i, least in enumerate(GRID):
                    chosen = (found["scores"] >= least).nonzero()[:, 0]
                    free = torch.ones(len(numbers), dtype=torch.bool)
                    for j in chosen[found["scores"][chosen].argsort(descending=True)].tolist():
                        best = torch.where(free, overlaps[j], 0.0)
                        if len(best) and best.max() >= 0.5:
                            free[best.argmax()] = False
                            hits[i, 0] += 1
                    hits[i, 1] += len(chosen)
    f1 = 2 * hits[:, 0] / np.maximum(hits[:, 1] + total, 1)
    return round(float(GRID[int(f1.argmax())]), 2)
