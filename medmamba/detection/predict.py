"""From an image to boxes in its own pixels; large ones in overlapping tiles."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..dense import MIN_TILE, shown, tiles
from ..imaging.image import Window
from ..imaging.preprocess import adapt_channels, normalise, placement, resize
from ..inference.predict import NotFiniteError, read_image
from ..utils.modes import eval_view
from ..utils.precision import FullPrecision
from .result import Box, Detection

if TYPE_CHECKING:
    from .model import MedMambaDetector


def predict(
    model: MedMambaDetector,
    image: Any,
    *,
    frame: int | None = None,
    window: Window | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
    score: float | None = None,
) -> Detection:
    """Detects objects in one image, on the device and in the dtype of the model, which is not changed.

    Args:
        model: a `MedMambaDetector`; its `config.preprocess` is applied.
        image: anything that `load_image` reads, or a `MedicalImage`.
        frame, window: as in `load_image`.
        tile: side in pixels of square tiles into which the image is cut, each resized to the network's input; for
            images in which the objects are far smaller than in the training images. None: the image as a whole.
        overlap: share of a tile's side by which neighbours overlap; it should exceed the objects.
        score: from which a box is reported; None: `config.score`.

    Returns:
        Boxes in pixels of the image.

    Raises:
        ImageError: the image cannot be read.
        NotFiniteError: the model gave NaN or infinity.
        ValueError: a tile, overlap or score out of range.
    """
    if tile is not None and tile < MIN_TILE:
        raise ValueError(f"tile must be at least {MIN_TILE} pixels, got {tile}")
    if not 0 <= overlap <= 0.75:
        raise ValueError(f"overlap must be in [0, 0.75], got {overlap}")
    least = model.config.score if score is None else score
    if not 0 <= least <= 1:
        raise ValueError(f"score must be in [0, 1], got {score}")
    read = read_image(image, frame, window)
    pixels = torch.from_numpy(np.ascontiguousarray(read.pixels)).permute(2, 0, 1)  # (C, H, W)
    boxes, scores, labels = detect(model, pixels, tile, overlap)
    if not bool(torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
        raise NotFiniteError(f"{read.source}: the model's outputs are NaN or infinite: its training diverged")
    kept = scores >= least
    rows = zip(boxes[kept].tolist(), scores[kept].tolist(), labels[kept].tolist(), strict=True)
    names = model.config.classes
    found = [Box(names[label], value, (box[0], box[1], box[2], box[3])) for box, value, label in rows]
    return Detection(read.source, found, read.size, shown(read), names, read.notes)


@torch.inference_mode()
def detect(
    model: MedMambaDetector, pixels: Tensor, tile: int | None = None, overlap: float = 0.25
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes (N, 4) in pixels of the image, scores (N,) and labels (N,) on the CPU, highest scores first.

    Args:
        model: the detector.
        pixels: (C, H, W) in [0, 1].
        tile, overlap: as in `predict`.
    """
    from torchvision.ops import batched_nms

    view = eval_view(model)
    height, width = pixels.shape[1:]
    if tile is None or tile >= max(height, width):
        return _whole(view, pixels)
    parts = []
    for rows, columns in tiles((height, width), tile, overlap):
        boxes, scores, labels = _whole(view, pixels[:, rows, columns])
        parts.append((boxes + boxes.new_tensor([columns.start, rows.start] * 2), scores, labels))
    boxes, scores, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    kept = batched_nms(boxes, scores, labels, view.config.overlap)[: view.config.most]
    return boxes[kept], scores[kept], labels[kept]


def _whole(view: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    config = view.config
    size = (pixels.shape[1], pixels.shape[2])
    inner, (left, _, top, _) = placement(size, config.preprocess)
    batch = normalise(resize(adapt_channels(pixels, config.in_chans)[None], config.preprocess), config.preprocess)
    weight = next(view.parameters())
    with FullPrecision() if weight.is_cuda and weight.dtype == torch.float32 else nullcontext():
        found = view(batch.to(weight.device, weight.dtype))[0]
    boxes, scores = to_image(found["boxes"].float().cpu(), size, inner, (left, top)), found["scores"].float().cpu()
    order = scores.argsort(descending=True, stable=True)
    inside = (boxes[order, 2:] > boxes[order, :2]).all(1)  # not in a margin alone
    order = order[inside]
    return boxes[order], scores[order], found["labels"].cpu()[order]


def to_image(boxes: Tensor, size: tuple[int, int], inner: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Converts boxes (N, 4) from the network's input to an image of this size (height, width), and clips them.

    Args:
        inner: height and width of the image in the input.
        corner: left and top of the image in the input.
    """
    scale = boxes.new_tensor([size[1] / inner[1], size[0] / inner[0]] * 2)
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    return torch.minimum(((boxes - boxes.new_tensor(corner * 2)) * scale).clamp(min=0), limit)
