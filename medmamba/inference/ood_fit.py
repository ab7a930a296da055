"""Fits out-of-distribution detection on a dataset by predicting its images."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.deferred import RecordImages
from ..imaging.ahead import Order, Unread
from ..imaging.image import ImageError
from .altered import altered
from .fingerprint import fingerprint
from .fitted import body
from .ood import Unusual, UnusualError, fit_signatures
from .predict import why_not_finite
from .signature import Signatures
from .stream import Options, stream

if TYPE_CHECKING:
    from ..data import ImageDataset


@dataclass(frozen=True, eq=False)
class Seen:
    """Outputs of a model on a dataset: signatures (N, S), logits (N, K), labels (N,), or (N, K) for multi-label.

    `features` (N, C) are the pooled features, the last columns of the signatures.
    """

    features: NDArray[np.float32]
    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    signatures: NDArray[np.float32]


def look(model: Any, dataset: ImageDataset, split: str | None, images: int = 600) -> Seen:
    """Predicts a random sample of a split, drawn with a fixed seed.

    Args:
        split: name of the split, or None for the whole dataset.
        images: maximum number of images.

    Raises:
        UnusualError: there is no such split, or images cannot be read.
    """
    if split and not dataset.split_sizes.get(split):
        raise UnusualError(f"{dataset.name} has no split {split!r}; there are {sorted(map(str, dataset.split_sizes))}")
    part = dataset.split(split) if split else dataset
    chosen = sample(len(part), images)
    try:
        found, logits = look_at(model, RecordImages(part.subset(chosen)))
    except UnusualError as error:
        raise UnusualError(f"{dataset.name}: {error}") from error
    return Seen(found[:, -model.config.dims[-1] :], logits, np.asarray(part.labels)[chosen], found)


def look_at(model: Any, sources: Iterable[Any]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Returns the signatures (N, S) and logits (N, K) of images, see `iter_predict` for what they may be.

    Raises:
        UnusualError: images that cannot be read, or for which the model returns NaN.
    """
    order = Order(model.config.preprocess, model.config.in_chans)
    failed: list[str] = []
    seen, logits = Signatures(), []
    for batch in stream(model, sources, order, Options(signature=True)):
        for item, row in batch.rows():
            if isinstance(item, Unread):
                failed.append(item.error)
            elif row is not None and not row.isfinite().all():
                failed.append(f"{item.source}: {why_not_finite(model, row)}")
        if batch.answer is not None:
            if batch.answer.signature is None:
                raise UnusualError(f"{type(model).__name__} does not call its head, so there are no features before it")
            seen.add(batch.answer.signature)
            logits.append(batch.answer.logits.double().numpy())
    if failed or not logits:
        raise UnusualError(f"{len(failed)} images cannot be read; the first: {failed[0] if failed else 'none'}")
    return seen.array(), np.concatenate(logits)


def look_altered(model: Any, dataset: ImageDataset, images: int = 140) -> NDArray[np.float32]:
    """Returns the signatures (N, S) of slightly altered images of the split "val", see `altered`.

    Args:
        images: at most, drawn with a fixed seed; each has one alteration.

    Raises:
        UnusualError: images that cannot be read.
    """
    part = dataset.split("val")
    rows = sample(len(part), images)
    try:
        return look_at(model, (altered(part.image(int(row)), i) for i, row in enumerate(rows)))[0]
    except ImageError as error:
        raise UnusualError(f"{dataset.name}: {error}") from error


def sample(count: int, most: int) -> NDArray[np.int64]:
    """Returns at most `most` of the integers below `count`, sorted; the same on every call."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def learn_unusual(model: Any, dataset: ImageDataset, images: int = 600) -> Unusual:
    """Fits a detector for a model on the splits "train" and "val" of its training dataset.

    Args:
        images: maximum number of images per split.

    Raises:
        UnusualError: a split is missing or too small, or has images that cannot be read.
    """
    train, val = (look(model, dataset, split, images) for split in ("train", "val"))
    slightly = look_altered(model, dataset)
    found = fit_signatures(train.signatures, train.labels, val.signatures, model.config, altered=slightly)
    return dataclasses.replace(found, weights=fingerprint(body(model.state_dict())))


class Pooled:
    """Collects the pooled features of predicted images, see `pooled_features`."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, features: Any) -> None:
        self._parts.append(features.detach().float().cpu().numpy())

    def array(self) -> np.ndarray:
        """Returns the features (N, C) in the order of the images."""
        return np.concatenate(self._parts) if self._parts else np.zeros((0, 0), np.float32)


@contextmanager
def pooled_features(model: Any) -> Iterator[Pooled]:
    """Records the input of the classifier while the model predicts in this thread; nothing is computed twice.

    >>> with pooled_features(model) as pooled:
    ...     predictions = model.predict(images)
    >>> pooled.array().shape
    """
    found, thread = Pooled(), threading.get_ident()

    def keep(module: Any, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            found.add(inputs[0])

    handle = model.head.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
