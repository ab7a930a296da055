"""Evaluates a segmentation model on a split, at the size of the images, as a user predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..imaging.spacing import pixel_spacing
from ..metrics.segmentation import ImageScores, SegmentationEvaluation, score_mask, summarise
from .dataset import IGNORED, SegmentationDataset
from .model import MedMambaSegmenter


def evaluate_segmenter(
    model: MedMambaSegmenter,
    dataset: SegmentationDataset,
    *,
    resamples: int = 1000,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    **options: Any,
) -> SegmentationEvaluation:
    """Predicts every image of a dataset and compares the masks with the true ones.

    Args:
        model: whose classes are those of the dataset, in order.
        dataset: the images of one split.
        resamples: of the bootstrap.
        progress: wraps the iteration, such as `tqdm`.
        options: of `model.predict`: `tile`, `overlap`, `flips`.

    Raises:
        ValueError: other classes.
        ImageError, DatasetError: an image or mask that cannot be read.
    """
    check_classes(model, dataset)
    spacings = [pixel_spacing(pair.image) for pair in dataset.examples]
    in_mm = None not in spacings  # one unit for all images
    scores = []
    rows: Iterable[int] = range(len(dataset))
    for row in progress(rows) if progress else rows:
        image, mask = dataset.load(row)
        found = model.predict(image, **options)
        scores.append(score_image(found.masks, mask, dataset.exclusive, spacings[row] if in_mm else None))
    patients = [pair.patient for pair in dataset.examples]
    return summarise(dataset.classes, scores, patients, in_mm=in_mm, resamples=resamples)


def check_classes(model: MedMambaSegmenter, dataset: SegmentationDataset) -> None:
    """Checks that a model has the classes of a dataset.

    Raises:
        ValueError: it has others, or another order.
    """
    if tuple(model.config.classes) != tuple(dataset.classes):
        raise ValueError(
            f"the model segments {', '.join(model.config.classes)}, and {dataset.name} has "
            f"{', '.join(dataset.classes)}; name the classes of the data as those of the model, in its order"
        )


def score_image(
    masks: np.ndarray, mask: np.ndarray, exclusive: bool, spacing: tuple[float, float] | None = None
) -> list[ImageScores]:
    """Returns the scores of each class of one image.

    Args:
        masks: (K, H, W) bool, predicted.
        mask: (M, H, W) as in `SegmentationDataset`.
        exclusive: the mask holds class numbers.
        spacing: (row, column) distance of pixels in mm, for HD95 in mm.
    """
    scores = []
    for k, predicted in enumerate(masks):
        plane = mask[0] if len(mask) == 1 else mask[k]
        true = plane == (k + 1 if exclusive else 1)
        scores.append(score_mask(predicted, true, plane == IGNORED, spacing))
    return scores
