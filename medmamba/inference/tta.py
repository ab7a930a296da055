"""Test-time augmentation: the logits of an image, averaged over mirrored and turned views of it.

`predict(..., tta="hflip")`, `evaluate_model(..., tta=...)` and `--tta` of both commands use `mean_logits`. It costs as
many forward passes as there are views. Choose views that occur in such images: a chest X-ray may be mirrored, and is
never upside down; a cell or a dermatoscopic image has no upright.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Name of the choice to its views: (quarter turns, mirrored left to right). The first is the image itself.
VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "hflip": ((0, False), (0, True)),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "dihedral": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}


def check(name: str) -> None:
    """Checks the name of a choice of views.

    Raises:
        ValueError: there is no such choice.
    """
    if name not in VIEWS:
        raise ValueError(f"tta must be one of {', '.join(VIEWS)}, got {name!r}")


def mean_logits(network: Callable[[Tensor], Tensor], images: Tensor, name: str = "none") -> Tensor:
    """Returns the mean of the logits (B, K) over the views of images (B, C, H, W), in float32 where there are several.

    The mean is of logits, before temperature and softmax, so a calibration that was fitted without views still
    applies; it was measured to stay about as good (docs/weights.md).

    Args:
        network: images to logits; called once per view, with the images themselves first.
        name: a key of `VIEWS`.

    Raises:
        ValueError: no such choice, or quarter turns of images that are not square.
    """
    check(name)
    views = VIEWS[name]
    if len(views) == 1:
        return network(images)
    if images.shape[2] != images.shape[3] and any(turns % 2 for turns, _ in views):
        raise ValueError(f"tta={name!r} turns images by 90 degrees, and this model takes {tuple(images.shape[2:])}")
    total: Tensor | None = None
    for turns, mirrored in views:
        view = torch.rot90(images, turns, (2, 3)) if turns else images
        view = view.flip(3) if mirrored else view
        logits = network(view.contiguous(memory_format=torch.channels_last)).float()
        total = logits if total is None else total + logits
    assert total is not None
    return total / len(views)
