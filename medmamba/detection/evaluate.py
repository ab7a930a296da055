"""Evaluates a detector on a split, at the size of the images, as a user predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..metrics.detection import DetectionEvaluation, evaluate_boxes
from .dataset import DetectionDataset
from .model import MedMambaDetector
from .predict import detect


def evaluate_detector(
    model: MedMambaDetector,
    dataset: DetectionDataset,
    *,
    resamples: int = 200,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
) -> DetectionEvaluation:
    """Detects in every image of a dataset and compares with the true boxes, at all scores as COCO does.

    Args:
        model: whose classes are those of the dataset, in order.
        dataset: the images of one split.
        resamples: of the bootstrap.
        progress: wraps the iteration, such as `tqdm`.
        tile, overlap: as in `predict`.

    Raises:
        ValueError: other classes.
        ImageError, DatasetError: an image that cannot be read, or a box outside of it.
    """
    if tuple(model.config.classes) != tuple(dataset.classes):
        raise ValueError(
            f"the model detects {', '.join(model.config.classes)}, and {dataset.name} has "
            f"{', '.join(dataset.classes)}; name the classes of the data as those of the model, in its order"
        )
    found, true = [], []
    rows: Iterable[int] = range(len(dataset))
    for row in progress(rows) if progress else rows:
        image, boxes, labels = dataset.load(row)
        pixels = torch.from_numpy(np.ascontiguousarray(image.pixels)).permute(2, 0, 1)
        found.append(tuple(part.numpy() for part in detect(model, pixels, tile, overlap)))
        true.append((boxes, labels))
    patients = [example.patient for example in dataset.examples]
    return evaluate_boxes(found, true, dataset.classes, patients, resamples=resamples)  # type: ignore[arg-type]
