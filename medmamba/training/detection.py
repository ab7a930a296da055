"""Training of detectors: the trainer of classifiers with boxes in the place of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..detection.cached import CachedBoxes
from ..imaging.preprocess import normalise
from ..inference.predict import NotFiniteError
from ..metrics.detection import evaluate_boxes
from ..utils.devices import autocast
from . import augment
from .recipe import Recipe, RecipeError
from .trainer import Trainer

LEAST_VISIBLE = 0.3  # share of a box that must remain in a cropped image for the object to count
Targets = list[dict[str, Tensor]]


class DetectionTrainer(Trainer):
    """Trains a `MedMambaDetector`; geometry moves image and boxes together.

    Args: as those of `Trainer`.

    Raises:
        RecipeError: a recipe that mixes images, balances classes or smooths labels, which has no meaning for boxes, or
            turns them by other than right angles, after which a box no longer fits its object.
    """

    def __init__(self, model: Any, recipe: Recipe, images: Any, *args: Any, **options: Any):
        if recipe.mixup or recipe.cutmix or recipe.label_smoothing or recipe.balance != "none":
            raise RecipeError(
                "mixup, cutmix, label_smoothing and balance are for classifiers; set them to 0 (balance: none) to "
                "train a detector"
            )
        if recipe.augment.rotate > 10 or recipe.augment.shear > 10:
            raise RecipeError(
                "augment.rotate and augment.shear above 10 degrees leave boxes far larger than their objects; use "
                "augment.rot90"
            )
        super().__init__(model, recipe, images, *args, **options)

    def _labels(self, data: Any) -> np.ndarray:
        return np.zeros(len(data), dtype=np.int64)

    def _batch(self, images: Tensor, labels: Any, drawn: augment.Draw, size: tuple[int, int]) -> tuple[Tensor, Any]:
        """Returns images and, for each, its boxes and labels on the device, moved together."""
        images = augment.augment(images, drawn, self.recipe.augment, size)
        theta = augment.affine(drawn, size[0] / size[1], torch.device("cpu"))
        targets: Targets = []
        for (boxes, numbers), matrix in zip(labels, theta, strict=True):
            moved, kept = move_boxes(boxes, matrix, size) if augment.moves(self.recipe.augment) else (boxes, None)
            numbers = numbers if kept is None else numbers[kept]
            targets.append({"boxes": moved.to(images.device), "labels": numbers.to(images.device)})
        return normalise(images, self.config.preprocess).contiguous(memory_format=torch.channels_last), targets

    def _loss(self, images: Tensor, targets: Any) -> Tensor:
        with autocast(self.accelerator):
            losses = self.wrapped(images, targets)
        return torch.stack([value.float() for value in losses.values()]).sum() / self.batches.accumulate

    def _validate(self, model: Any, data: Any, batch_size: int) -> dict[str, float]:
        return validate_boxes(model, data, self.accelerator, min(batch_size, 16))


def move_boxes(boxes: Tensor, matrix: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Moves boxes (N, 4) as `augment` moves their image.

    Args:
        boxes: in pixels of the image.
        matrix: (2, 3) of `augment.affine`, from output to input coordinates in [-1, 1].
        size: height and width of input and output.

    Returns:
        The boxes around the moved corners, cut at the margins, and a mask (N,) of those that are returned: what is
        mostly outside is left out.
    """
    scale = boxes.new_tensor([size[1], size[0]])
    left, top, right, bottom = boxes.unbind(1)
    corners = torch.stack((left, top, right, top, right, bottom, left, bottom), 1).view(-1, 4, 2)
    unit = corners / scale * 2 - 1
    inverse = torch.linalg.inv(matrix[:, :2].double()).float()
    moved = ((unit - matrix[:, 2]) @ inverse.T + 1) / 2 * scale  # (N, 4, 2)
    full = torch.cat((moved.amin(1), moved.amax(1)), 1)
    cut = torch.minimum(full.clamp(min=0), torch.cat((scale, scale)))
    area = (full[:, 2:] - full[:, :2]).prod(1)
    seen = (cut[:, 2:] - cut[:, :2]).clamp(min=0).prod(1)
    large = ((cut[:, 2:] - cut[:, :2]) >= 2).all(1)
    kept = large & (seen >= LEAST_VISIBLE * area)
    return cut[kept], kept


@torch.no_grad()
def validate_boxes(model: Any, data: CachedBoxes, accelerator: Any, batch_size: int) -> dict[str, float]:
    """Returns the mean loss, mAP and mAP50 over the images of a split, at the size of the network's input.

    Every process computes all images, so that all of them select the same epoch.

    Raises:
        NotFiniteError: outputs that are NaN or infinite.
    """
    config, was = model.config, model.training
    losses, found, true = [], [], []
    for rows in torch.arange(len(data)).split(batch_size):
        images, labels = data.batch(rows, accelerator.device)
        images = normalise(images, config.preprocess).contiguous(memory_format=torch.channels_last)
        targets = [{"boxes": boxes, "labels": numbers} for boxes, numbers in labels]
        model.eval()
        with autocast(accelerator):
            raw = model.raw(images)
        detections, parts = raw.detections(), raw.losses(targets)
        losses.append(torch.stack(list(parts.values())).sum() * len(rows))
        for entry in detections:
            found.append(tuple(entry[name].float().cpu().numpy() for name in ("boxes", "scores", "labels")))
        true += [(boxes.numpy(), numbers.numpy()) for boxes, numbers in labels]
    model.train(was)
    loss = float(torch.stack(losses).sum() / len(data))
    if not np.isfinite(loss):
        raise NotFiniteError("the outputs for validation images are NaN or infinite")
    scores = evaluate_boxes(found, true, config.classes, resamples=0).metrics  # type: ignore[arg-type]
    undefined = float("nan")
    return {
        "loss": loss,
        **{name: undefined if (v := scores[name]["value"]) is None else v for name in ("map50", "map")},
    }
