"""Training of segmentation models: the trainer of classifiers with masks in the place of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..imaging.preprocess import normalise
from ..inference.predict import NotFiniteError
from ..segmentation.cached import CachedPairs
from ..segmentation.dataset import IGNORED
from ..segmentation.encoder import require_smp
from ..segmentation.predict import probabilities
from ..utils.devices import autocast
from . import augment
from .recipe import Recipe, RecipeError
from .trainer import Trainer

if TYPE_CHECKING:
    from ..segmentation.config import SegmenterConfig

LOSSES = ("dice+ce", "dice+focal", "image-dice+ce")


class SegmentationLoss(nn.Module):
    """Dice loss plus cross entropy, or plus focal loss (arXiv 1708.02002) where foreground is rare.

    The first is that of segmentation_models_pytorch, the last torchvision's; pixels of value 255 count for none. The
    Dice loss is that of all pixels of a batch, or with "image-dice+ce" the mean over its images, in which small objects
    count as much as large ones; a class that an image lacks does not count there.

    Args:
        config: whether classes are exclusive.
        kind: one of `LOSSES`.
    """

    def __init__(self, config: SegmenterConfig, kind: str = "dice+ce"):
        super().__init__()
        if kind not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {kind!r}")
        smp, self.exclusive = require_smp(), config.exclusive
        mode = "multiclass" if config.exclusive else "multilabel"
        classes = list(range(1, config.outputs)) if config.exclusive else None  # the background is the rest
        self.overlap = smp.losses.DiceLoss(mode, classes=classes, smooth=1.0, ignore_index=IGNORED)
        self.kind = kind
        # Takes the images of a batch for its classes.
        self.overlap_of_images = smp.losses.DiceLoss("multilabel", from_logits=False, smooth=1.0)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Returns the loss of logits (B, K, H, W) and masks (B, M, H, W), in float32.

        Masks hold numbers of classes if these are exclusive, else 0, 1 or a probability; 255 is ignored.
        """
        logits = logits.float()
        targets = masks[:, 0].long() if self.exclusive else masks.float()
        if self.exclusive and self.kind == "dice+ce":
            return self.overlap(logits, targets) + F.cross_entropy(logits, targets, ignore_index=IGNORED)
        counted = (masks != IGNORED).float()
        if self.exclusive:
            planes = F.one_hot(targets.where(targets != IGNORED, 0), logits.shape[1]).permute(0, 3, 1, 2).float()
        else:
            planes = targets.where(masks != IGNORED, 0)
        if self.kind == "dice+focal":
            from torchvision.ops import sigmoid_focal_loss

            each = sigmoid_focal_loss(logits, planes, alpha=-1)
        elif self.exclusive:
            each = F.cross_entropy(logits, planes, reduction="none")[:, None]
        else:
            each = F.binary_cross_entropy_with_logits(logits, planes, reduction="none")
        if self.kind == "image-dice+ce":
            found = (logits.softmax(1) if self.exclusive else logits.sigmoid()) * counted
            first = int(self.exclusive)  # of the exclusive ones the background is left out
            flat = [x[:, first:].flatten(0, 1)[None] for x in (found, planes * counted)]
            overlap = self.overlap_of_images(*flat)
        else:
            overlap = self.overlap(logits, targets)
        return overlap + (each * counted).sum() / counted.expand_as(each).sum().clamp(min=1)


class SegmentationTrainer(Trainer):
    """Trains a `MedMambaSegmenter`; geometry moves image and mask together.

    Args: as those of `Trainer`, and
        loss: one of `LOSSES`.

    Raises:
        RecipeError: a recipe that mixes images, balances classes or smooths labels, which has no meaning for masks.
    """

    def __init__(self, model: Any, recipe: Recipe, images: Any, *args: Any, loss: str = "dice+ce", **options: Any):
        if recipe.mixup or recipe.cutmix or recipe.label_smoothing or recipe.balance != "none":
            raise RecipeError(
                "mixup, cutmix, label_smoothing and balance are for classifiers; set them to 0 (balance: none) to "
                "train a segmentation model"
            )
        self.criterion = SegmentationLoss(model.config, loss)
        super().__init__(model, recipe, images, *args, **options)

    def _labels(self, data: Any) -> np.ndarray:
        return np.zeros(len(data), dtype=np.int64)

    def _batch(
        self, images: Tensor, labels: Tensor, drawn: augment.Draw, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Returns images and masks (B, M, H, W), moved together; with a teacher the masks are probabilities."""
        images = augment.augment(images, drawn, self.recipe.augment, size)
        masks = augment.augment_masks(labels, drawn, self.recipe.augment, size)
        if self.teacher is not None:
            with torch.no_grad(), autocast(self.accelerator):
                answers = self.teacher(images)
            mixed = masks.float().lerp(answers.float(), self.recipe.distill)
            masks = mixed.where(masks != IGNORED, IGNORED)
        return normalise(images, self.config.preprocess).contiguous(memory_format=torch.channels_last), masks

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.accelerator):
            logits = self.wrapped(images)
        return self.criterion(logits, targets) / self.batches.accumulate

    def _validate(self, model: Any, data: CachedPairs, batch_size: int) -> dict[str, float]:  # type: ignore[override]
        return validate_masks(model, data, self.accelerator, min(batch_size, 32), self.criterion)


@torch.no_grad()
def validate_masks(model: Any, data: CachedPairs, accelerator: Any, batch_size: int, criterion: nn.Module) -> dict:
    """Returns mean loss, Dice and IoU over the images of a split, at the size of the network's input.

    Every process computes all images, so that all of them select the same epoch.

    Raises:
        NotFiniteError: outputs that are NaN or infinite.
    """
    config, was = model.config, model.training
    model.eval()
    losses, dice, iou = [], [], []
    thresholds = torch.tensor(config.thresholds, device=accelerator.device).view(-1, 1, 1)
    for rows in torch.arange(len(data)).split(batch_size):
        images, masks = data.batch(rows, accelerator.device)
        images = normalise(images, config.preprocess).contiguous(memory_format=torch.channels_last)
        with autocast(accelerator):
            logits = model(images)
        losses.append(criterion(logits, masks) * len(rows))
        predicted, true, counted = binary_planes(probabilities(logits, config.exclusive), masks, config, thresholds)
        both = (predicted & true & counted).sum((2, 3)).double()
        total = (predicted & counted).sum((2, 3)) + (true & counted).sum((2, 3))
        dice.append(torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0))
        iou.append(torch.where(total > 0, both / (total - both).clamp(min=1), 1.0))
    model.train(was)
    loss = float(torch.stack(losses).sum() / len(data))
    if not np.isfinite(loss):
        raise NotFiniteError("the outputs for validation images are NaN or infinite")
    return {"loss": loss, "dice": float(torch.cat(dice).mean()), "iou": float(torch.cat(iou).mean())}


def binary_planes(
    found: Tensor, masks: Tensor, config: SegmenterConfig, thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns predicted, true and counted pixels of each class, (B, K, H, W) bool.

    Args:
        found: probabilities (B, outputs, H, W).
        masks: (B, M, H, W) uint8.
        config: of the model.
        thresholds: (K, 1, 1); not used for exclusive classes.
    """
    if not config.exclusive:
        return found >= thresholds, masks == 1, masks != IGNORED
    numbers = torch.arange(1, config.outputs, device=masks.device).view(1, -1, 1, 1)
    return (
        found.argmax(1, keepdim=True) == numbers,
        masks == numbers,
        (masks != IGNORED).expand(-1, len(numbers[0]), -1, -1),
    )
