"""Decodes a dataset and predicts the logits of all its images."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import MedMambaConfig
from ..data import CachedDataset, ImageDataset, cache_images
from ..data.deferred import RecordImages
from ..imaging.ahead import Order, Unread
from ..imaging.image import ImageError
from ..imaging.preprocess import normalise
from ..inference.predict import needs_signatures, unusual_flags
from ..inference.stream import Options, stream
from ..model import MedMamba
from ..utils.devices import autocast
from ..utils.modes import eval_view
from ..utils.precision import FullPrecision

if TYPE_CHECKING:
    from accelerate import Accelerator


def decode(
    dataset: ImageDataset,
    config: MedMambaConfig,
    file: str | os.PathLike | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CachedDataset:
    """Decodes all images into memory, resized as in `config.preprocess` but not yet normalised.

    Args:
        file: keeps the decoded images in this file for reuse, see `cache_images`.
    """
    in_unit_range = dataclasses.replace(config.preprocess, mean=(0.0,), std=(1.0,))
    return cache_images(dataset, in_unit_range, config.in_chans, file=file, progress=progress)


class Answers(NamedTuple):
    """What a model says of the images of a dataset, in order.

    Attributes:
        logits: (N, K) float32 on the CPU.
        unusual: (N,) whether the out-of-distribution detector flags an image; None where the model has none.
    """

    logits: Tensor
    unusual: Tensor | None


def dataset_answers(
    model: MedMamba,
    dataset: ImageDataset,
    accelerator: Accelerator,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
    tta: str = "none",
) -> Answers:
    """Predicts all images of a dataset; each process computes its share. See `image_answers`."""
    count, processes = len(dataset), accelerator.num_processes
    share = math.ceil(count / processes)
    mine = dataset.subset(
        [row % count for row in range(accelerator.process_index * share, (accelerator.process_index + 1) * share)]
    )
    visible = progress and accelerator.process_index == 0
    logits, unusual = image_answers(model, mine, accelerator.device, batch_size, workers, visible, tta)

    def whole(part: Tensor) -> Tensor:
        return (part if processes == 1 else accelerator.gather(part.to(accelerator.device)))[:count].cpu()

    return Answers(whole(logits), None if unusual is None else whole(unusual))


def image_answers(
    model: MedMamba,
    dataset: ImageDataset,
    device: torch.device,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
    tta: str = "none",
) -> Answers:
    """Predicts all images of a dataset, read as they are needed and not kept.

    `tta` is test-time augmentation, see `medmamba.inference.tta`. Pixels are rounded to the levels of the files as
    in `decode`, and TF32 is off.

    Raises:
        ImageError: an image that cannot be read.
    """
    order = Order(model.config.preprocess, model.config.in_chans, stored=True)
    options = Options(batch_size, workers, precision="float32", devices=[device], tta=tta)
    options = dataclasses.replace(options, signature=needs_signatures(model))
    found: list[Tensor] = []
    flags: list[bool | None] = []
    with tqdm(total=len(dataset), unit="img", disable=not progress) as bar:
        for batch in stream(model, RecordImages(dataset), order, options):
            for item in batch.items:
                if isinstance(item, Unread):
                    raise item.cause or ImageError(item.error)
            assert batch.answer is not None
            found.append(batch.answer.logits)
            flags += unusual_flags(model, batch.answer)
            bar.update(len(batch.items))
    known = None if any(flag is None for flag in flags) else torch.tensor(flags, dtype=torch.bool)
    return Answers(torch.cat(found), known)


@torch.no_grad()
def predict_logits(
    model: MedMamba,
    data: CachedDataset,
    batch_size: int,
    accelerator: Accelerator,
    full_precision: bool = False,
    progress: bool = False,
) -> Tensor:
    """Returns float32 logits (N, K) on the CPU, of all images in order; each process computes its share.

    Runs an eval-mode view of the model: the model itself and the modes of its modules are not changed.
    """
    view = eval_view(model)
    count, processes = len(data), accelerator.num_processes
    share = math.ceil(count / processes)
    mine = torch.arange(accelerator.process_index * share, (accelerator.process_index + 1) * share) % count
    mine = mine.to(data.device)
    found = []
    visible = progress and accelerator.process_index == 0
    parts = mine.split(batch_size)
    batches = data.batches(parts, accelerator.device)
    for images, _ in tqdm(batches, "predicting", len(parts), unit="batch", disable=not visible):
        images = normalise(images, model.config.preprocess)
        exact = FullPrecision() if full_precision and accelerator.device.type == "cuda" else contextlib.nullcontext()
        with exact, autocast(accelerator, enabled=not full_precision):
            found.append(view(images.contiguous(memory_format=torch.channels_last)).float())
    logits = torch.cat(found)
    return (logits if processes == 1 else accelerator.gather(logits))[:count].cpu()
