"""Reads the tensors of a `model.safetensors`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .checksums import WEIGHTS_NAME, PretrainedError

if TYPE_CHECKING:
    from torch import Tensor


def read_weights(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Reads `model.safetensors` of a model folder, half precision widened to float32.

    Raises:
        PretrainedError: truncated, or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise PretrainedError(f"{path} is damaged or truncated ({error}); download or save it again") from error
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}


def adapt_input(weight: Tensor, channels: int) -> Tensor:
    """Converts a patch embedding (dim, C, p, p) to another number of channels, with equal output for grey images."""
    old = weight.shape[1]
    if old == channels:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (old / channels)
