"""Training images that look most like an image to a model, and a map of several images, by pooled features.

A model folder may hold a gallery, `similar.safetensors`: features and thumbnails of a sample of the training images,
with their licence and source. Only images whose licence allows it may be shown, so `python -m hub.similar` builds a
gallery for such datasets only.

>>> gallery = load_gallery(folder)
>>> find_similar(model, "cell.png", gallery)[0].label
'neutrophil'

Distances are root mean squares over the features, each divided by its standard deviation within classes, as in
`medmamba.inference.ood`. Images that are close look alike to the model, which need not mean that they show the same.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..imaging.ahead import Order, Unread
from ..imaging.load import MedicalImage
from ..utils import config_checks as checks
from ..utils.checksums import CHECKSUM_KEY, CONFIG_NAME, WEIGHTS_NAME, file_hash
from ..utils.files import write_atomically
from ..utils.strict_json import read_json
from .ood_fit import Pooled, look
from .stream import stream

if TYPE_CHECKING:
    from ..data import ImageDataset

NAME = "similar.safetensors"
MAX_FILE = 8 * 2**20  # bytes
MAX_THUMBNAIL = 32 * 2**10  # bytes
MAX_SIDE = 256  # pixels of a thumbnail
MAX_CLASSES = 10_000
FREE = ("CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-SA-4.0", "MIT")
"""Licences, as SPDX identifiers, whose images may be shown with their source."""


class SimilarError(ValueError):
    """A gallery that cannot be read or built, or does not fit the model."""


@dataclass(frozen=True)
class Match:
    """A training image near to an image.

    Attributes:
        index: its number in the gallery.
        label: its class.
        distance: see the module.
    """

    index: int
    label: str
    distance: float


@dataclass(frozen=True, eq=False)
class Gallery:
    """A sample of the training images of a model.

    Attributes:
        features: (N, C) float32, pooled features.
        labels: (N,) class numbers.
        thumbnails: N images as WebP files.
        classes: names of the classes.
        licence: SPDX identifier of the licence of the images.
        attribution: whose images they are, and what was changed.
    """

    features: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    thumbnails: tuple[bytes, ...] = field(repr=False)
    classes: tuple[str, ...]
    licence: str
    attribution: str

    @cached_property
    def spread(self) -> NDArray[np.float64]:
        """(C,) standard deviation of the features within classes."""
        x = self.features.astype(np.float64)
        means = {k: x[self.labels == k].mean(0) for k in np.unique(self.labels)}
        rest = x - np.stack([means[k] for k in self.labels])
        spread = np.sqrt((rest**2).mean(0))
        return np.maximum(spread, max(1e-3 * float(spread.mean()), 1e-12))

    @cached_property
    def typical(self) -> tuple[float, float]:
        """The range in which nine of ten training images of the gallery have their nearest other one."""
        distances = np.stack([self.distances(row) for row in self.features])
        np.fill_diagonal(distances, np.inf)
        low, high = np.quantile(distances.min(1), (0.05, 0.95))
        return float(low), float(high)

    def distances(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the distances (N,) of pooled features (C,) to the images of the gallery.

        Raises:
            SimilarError: the features are those of another network.
        """
        if features.shape != self.features.shape[1:]:
            raise SimilarError(f"the gallery holds {self.features.shape[1]} features per image, not {features.shape}")
        return np.sqrt((((features - self.features) / self.spread) ** 2).mean(1))

    def nearest(self, features: NDArray[Any], k: int = 6) -> list[Match]:
        """Returns the `k` images nearest to pooled features (C,), nearest first."""
        distances = self.distances(features)
        order = np.argsort(distances, kind="stable")[:k]
        return [Match(int(i), self.classes[self.labels[i]], float(distances[i])) for i in order]

    def picture(self, index: int) -> NDArray[np.uint8]:
        """Decodes a thumbnail: uint8 (H, W, 3).

        Raises:
            SimilarError: it is damaged or too large.
        """
        try:
            with Image.open(io.BytesIO(self.thumbnails[index]), formats=("WEBP",)) as picture:
                if max(picture.size) > MAX_SIDE:
                    raise SimilarError(f"thumbnail {index} has {picture.width} × {picture.height} pixels")
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise SimilarError(f"thumbnail {index} is damaged: {error}") from error

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `similar.safetensors` into a model folder, bound to the weights there."""
        from safetensors.numpy import save

        folder = Path(folder)
        sizes = np.array([len(data) for data in self.thumbnails], np.int64)
        tensors: dict[str, NDArray[Any]] = {
            "features": self.features.astype(np.float16),
            "labels": self.labels.astype(np.int16),
            "sizes": sizes,
            "thumbnails": np.frombuffer(b"".join(self.thumbnails), np.uint8),
        }
        record = {"classes": list(self.classes), "licence": self.licence, "attribution": self.attribution}
        text = json.dumps({**record, "weights": _weights_of(folder)})
        content = save(tensors, metadata={"record": text})
        return write_atomically(folder / NAME, lambda partial: partial.write_bytes(content))


def load_gallery(folder: str | os.PathLike) -> Gallery | None:
    """Loads the gallery of a model folder; returns None if there is none or it belongs to other weights.

    Raises:
        SimilarError: the file was not written by `Gallery.save`.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > MAX_FILE:
            raise SimilarError(f"larger than {MAX_FILE // 2**20} MiB")
        with safe_open(path, "numpy") as file:
            record = json.loads((file.metadata() or {})["record"])
            features = file.get_tensor("features").astype(np.float32)
            labels, sizes, data = (file.get_tensor(name) for name in ("labels", "sizes", "thumbnails"))
        classes = [checks.text(name, "a class") for name in checks.several(record["classes"], "classes", MAX_CLASSES)]
        licence, attribution = (checks.text(record[name], name) for name in ("licence", "attribution"))
        labels, count = labels.astype(np.int64), len(features)
        if features.ndim != 2 or count < 2 or not np.isfinite(features).all():
            raise SimilarError(f"features {features.shape}")
        if labels.shape != (count,) or labels.min() < 0 or labels.max() >= len(classes):
            raise SimilarError("labels that are not numbers of classes")
        if sizes.shape != (count,) or sizes.min() < 1 or sizes.max() > MAX_THUMBNAIL or sizes.sum() != data.size:
            raise SimilarError("sizes that do not fit the thumbnails")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SimilarError(f"{path} cannot be read ({error}); delete it, or build it again") from error
    ends = np.cumsum(sizes)
    whole = data.astype(np.uint8).tobytes()
    thumbnails = tuple(whole[end - size : end] for end, size in zip(ends, sizes, strict=True))
    found = Gallery(features, labels, thumbnails, tuple(classes), licence, attribution)
    return found if record.get("weights") == _weights_of(Path(folder)) else None


def build_gallery(
    model: Any, dataset: ImageDataset, licence: str, attribution: str, images: int = 300, side: int = 72
) -> Gallery:
    """Builds a gallery from a sample of the split "train", as many images of each class as there are, up to a limit.

    Args:
        dataset: with the classes of the model, in its order.
        licence: SPDX identifier of the licence of the images.
        attribution: whose images they are.
        images: number of images in the gallery.
        side: longest side of a thumbnail, in pixels.

    Raises:
        SimilarError: the licence does not allow showing them, or the images have several labels.
        UnusualError: there is no split "train", or images cannot be read.
    """
    if licence not in FREE:
        raise SimilarError(f"images under {licence or 'unknown terms'} are not shown; licences that allow it: {FREE}")
    if dataset.task == "multilabel":
        raise SimilarError("images with several labels have no class to show")
    classes = tuple(model.config.labels)
    if len(classes) != len(dataset.classes):
        raise SimilarError(f"{dataset.name} has {len(dataset.classes)} classes, the model {len(classes)}")
    part = dataset.split("train")
    labels = np.asarray(part.labels)
    random = np.random.default_rng(0)
    share = max(images // len(classes), 1)
    by_class = [random.permutation(np.flatnonzero(labels == k))[:share] for k in np.unique(labels)]
    chosen = np.sort(np.concatenate(by_class))
    subset = part.subset(chosen)
    seen = look(model, subset, None, len(subset))
    thumbnails = tuple(_thumbnail(subset.reader.read(record), side) for record in subset.records)
    return Gallery(seen.features, seen.labels, thumbnails, classes, licence, attribution)


def find_similar(model: Any, image: Any, gallery: Gallery, k: int = 6, **reading: Any) -> list[Match]:
    """Returns the images of a gallery that look most like an image to the model, nearest first.

    Args:
        image: anything that `load_image` reads, or a `MedicalImage`.
        reading: `frame` and `window`, as in `load_image`.

    Raises:
        SimilarError: the image cannot be read, or the gallery is of another network.
    """
    return gallery.nearest(features_of(model, [image], **reading)[0], k)


def features_of(model: Any, images: Iterable[Any], frame: int | None = None, window: Any = None) -> NDArray[np.float32]:
    """Returns the pooled features (N, C) of images.

    Args:
        images, frame, window: as in `predict`.

    Raises:
        SimilarError: an image cannot be read, or the model does not call its head.
    """
    order = Order(model.config.preprocess, model.config.in_chans, frame, window)
    pooled = Pooled()
    for batch in stream(model, images, order):
        for item in batch.items:
            if isinstance(item, Unread):
                raise SimilarError(item.error)
        if batch.answer is None or batch.answer.features is None:
            raise SimilarError(f"{type(model).__name__} does not call its head, so there are no features before it")
        pooled.add(batch.answer.features)
    return pooled.array()


@dataclass(frozen=True, eq=False)
class Projection:
    """Images on a plane, by principal component analysis of their features.

    Attributes:
        points: (N, 2).
        background: (M, 2), other images on the same plane.
        explained: shares of the variance along the two axes.
    """

    points: NDArray[np.float64]
    background: NDArray[np.float64]
    explained: tuple[float, float]


def project(features: NDArray[Any], background: NDArray[Any] | None = None) -> Projection:
    """Projects features (N, C) on the plane along which they, and those of the background (M, C), differ most.

    Raises:
        SimilarError: fewer than two images.
    """
    own = np.asarray(features, np.float64)
    other = np.zeros((0, own.shape[1])) if background is None else np.asarray(background, np.float64)
    x = np.concatenate([own, other])
    if len(x) < 2:
        raise SimilarError("a map needs at least two images")
    scale = x.std(0)
    x = (x - x.mean(0)) / np.where(scale > 1e-6 * max(float(scale.max()), 1e-30), scale, np.inf)
    _, sizes, axes = np.linalg.svd(x, full_matrices=False)
    axes, sizes = _two(axes), _two(sizes)
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(1)] + 0.5 * (np.abs(axes).max(1) == 0))[:, None]
    points = x @ axes.T
    total = float((x**2).sum()) or 1.0
    first, second = (float(size**2) / total for size in sizes)
    return Projection(points[: len(own)], points[len(own) :], (first, second))


def _two(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the first two rows, zeros if there is only one."""
    return np.concatenate([values[:2], np.zeros((max(2 - len(values), 0), *values.shape[1:]))])


def _thumbnail(image: MedicalImage, side: int) -> bytes:
    picture = image.to_pil()
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "webp", quality=70, method=6)
    return buffer.getvalue()


def _weights_of(folder: Path) -> str:
    """Returns the hash of the weights in `config.json`, or else computes it."""
    try:
        recorded = read_json(folder / CONFIG_NAME).get(CHECKSUM_KEY)
    except (OSError, ValueError, AttributeError):
        recorded = None
    return recorded or file_hash(folder / WEIGHTS_NAME)
