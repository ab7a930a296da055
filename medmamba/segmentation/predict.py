"""From an image to its segmentation, at the size of the image; large ones in overlapping tiles."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import MIN_TILE, ramp, shown, tiles
from ..imaging.image import Window
from ..imaging.preprocess import adapt_channels, normalise, placement, resize
from ..imaging.spacing import pixel_spacing
from ..inference.predict import NotFiniteError, read_image
from ..utils.modes import eval_view
from ..utils.precision import FullPrecision
from .result import Segmentation

if TYPE_CHECKING:
    from .model import MedMambaSegmenter

_FLIPS = ((), (3,), (2,), (2, 3))  # dimensions that are reversed: as it is, left-right, up-down, both


@torch.inference_mode()
def predict(
    model: MedMambaSegmenter,
    image: Any,
    *,
    frame: int | None = None,
    window: Window | None = None,
    tile: int | None = None,
    overlap: float = 0.25,
    flips: bool = False,
) -> Segmentation:
    """Segments one image, on the device and in the dtype of the model, which is not changed.

    Args:
        model: a `MedMambaSegmenter`; its `config.preprocess` and thresholds are applied.
        image: anything that `load_image` reads, or a `MedicalImage`.
        frame, window: as in `load_image`.
        tile: side in pixels of square tiles into which the image is cut, each resized to the network's input as a
            whole image is; for images in which the structures are far smaller than in the training images, or
            that are too large for memory. None: the image as a whole.
        overlap: share of a tile's side by which neighbours overlap; they are blended there.
        flips: average over the image and its reflections, in four times the time.

    Returns:
        Masks and probabilities at the size of the image.

    Raises:
        ImageError: the image cannot be read.
        NotFiniteError: the model gave NaN or infinity.
        ValueError: a tile or overlap out of range.
    """
    if tile is not None and tile < MIN_TILE:
        raise ValueError(f"tile must be at least {MIN_TILE} pixels, got {tile}")
    if not 0 <= overlap <= 0.75:
        raise ValueError(f"overlap must be in [0, 0.75], got {overlap}")
    read = read_image(image, frame, window)
    spacing = pixel_spacing(image)
    view = eval_view(model)
    pixels = torch.from_numpy(np.ascontiguousarray(read.pixels)).permute(2, 0, 1)  # (C, H, W)
    if tile is None or tile >= max(read.size):
        found = _whole(view, pixels, flips)
    else:
        found = _tiled(view, pixels, tile, overlap, flips)
    if not bool(torch.isfinite(found).all()):
        raise NotFiniteError(
            f"{read.source}: the model's outputs are NaN or infinite: its training diverged, or values overflowed in "
            f"{str(next(view.parameters()).dtype).removeprefix('torch.')}; compute in float32"
        )
    config = model.config
    maps = found.numpy()
    return Segmentation(
        source=read.source,
        classes=config.classes,
        probabilities=maps[1:] if config.exclusive else maps,
        background=maps[0] if config.exclusive else None,
        thresholds=config.thresholds,
        exclusive=config.exclusive,
        pixels=shown(read),
        spacing=spacing,
        notes=read.notes,
    )


def probabilities(logits: Tensor, exclusive: bool) -> Tensor:
    """Returns probabilities of logits (B, K, H, W): softmax over exclusive classes, else a sigmoid each."""
    return logits.float().softmax(1) if exclusive else logits.float().sigmoid()


def _whole(view: Any, pixels: Tensor, flips: bool) -> Tensor:
    """Returns probabilities (K, H, W) at the size of pixels (C, H, W)."""
    config = view.config
    size = (pixels.shape[1], pixels.shape[2])
    inner, (left, right, top, bottom) = placement(size, config.preprocess)
    batch = normalise(resize(adapt_channels(pixels, config.in_chans)[None], config.preprocess), config.preprocess)
    weight = next(view.parameters())
    batch = batch.to(weight.device, weight.dtype)
    total: Tensor | None = None
    turns = _FLIPS if flips else _FLIPS[:1]
    for dims in turns:
        # As in classification: an explanation in another thread may have changed TF32 for the process.
        with FullPrecision() if weight.is_cuda and weight.dtype == torch.float32 else nullcontext():
            logits = view(batch.flip(dims) if dims else batch)
        found = probabilities(logits, config.exclusive)
        found = found.flip(dims) if dims else found
        total = found if total is None else total + found
    assert total is not None
    total = total[:, :, top : total.shape[2] - bottom, left : total.shape[3] - right] / len(turns)
    # Probabilities are what is enlarged: a bilinear mean of them stays one, and exclusive classes still sum to 1.
    return F.interpolate(total, size, mode="bilinear", align_corners=False)[0].cpu()


def _tiled(view: Any, pixels: Tensor, tile: int, overlap: float, flips: bool) -> Tensor:
    """Returns probabilities (K, H, W), blended from overlapping tiles with weights that fall towards their margins."""
    height, width = pixels.shape[1:]
    total = torch.zeros(view.config.outputs, height, width)
    weights = torch.zeros(1, height, width)
    for rows, columns in tiles((height, width), tile, overlap):
        part = _whole(view, pixels[:, rows, columns], flips)
        weight = ramp(part.shape[1]).view(-1, 1) * ramp(part.shape[2])
        total[:, rows, columns] += part * weight
        weights[:, rows, columns] += weight
    return total / weights
