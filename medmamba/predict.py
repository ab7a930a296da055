"""From images to classes with probabilities."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .images import ImageError, MedicalImage, load_image
from .preprocess import preprocess

UNUSUAL = "warning: this does not look like the images the model was trained on; its answer may mean nothing"


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        source: file name, or what kind of object it was.
        label, probability: of the most probable class.
        top: (label, probability) pairs, most probable first; `top_k` of them.
        image_notes: what was done to the file to get pixels, and to those to get the network's input; what in this
            deserves attention begins with "warning".
        logits: raw outputs in class order, before temperature and softmax.
        unusual: the image is unlike the training images (a heuristic): by the features where `model.unusual` is there
            (see `medmamba.unusual`), else by the logits (see `calibrate.OutOfDistribution`, which tells less); None
            where the model has no threshold for either.
    """

    source: str
    label: str
    probability: float
    top: list[tuple[str, float]]
    image_notes: list[str]
    logits: list[float]
    unusual: bool | None = None

    def __str__(self) -> str:
        return f"{self.source}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in self.top)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read; `error` says why and what to do."""

    source: str
    error: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict(model, images, top_k: int | None = None, batch_size: int = 16) -> Prediction | list[Prediction]:
    """Classifies one image or a list of them, on the device and in the dtype of the model.

    Args:
        model: a `MedMamba`; its `config.preprocess` and calibration are applied, its training mode is left as it was.
        images: anything that `load_image` reads, a `MedicalImage`, or a list or tuple of those.
        top_k: how many classes to report; None: all.
        batch_size: images per forward pass.

    Returns:
        A `Prediction`, or a list of them in the order of the images.

    Raises:
        ImageError: an image cannot be read. `iter_predict` goes on past such images.
    """
    if not isinstance(images, list | tuple):
        return predict(model, [images], top_k, batch_size)[0]  # type: ignore[index]
    results = []
    for result in iter_predict(model, images, top_k, batch_size):
        if isinstance(result, Failure):
            raise ImageError(result.error)
        results.append(result)
    return results


def iter_predict(
    model, images: Iterable[Any], top_k: int | None = None, batch_size: int = 16
) -> Iterator[Prediction | Failure]:
    """Like `predict`, lazily and in order, with a `Failure` in the place of each image that cannot be read."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not model.config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    pending: list[Failure | tuple[MedicalImage, Tensor]] = []
    for image in images:
        pending.append(_prepare(model, image))
        if sum(not isinstance(p, Failure) for p in pending) == batch_size:
            yield from _finish(model, pending, top_k)
            pending = []
    yield from _finish(model, pending, top_k)


@torch.inference_mode()
def predict_logits(model, batch: Tensor) -> Tensor:
    """(B, in_chans, H, W) normalised images to (B, num_classes) float32 logits on the CPU, in eval mode."""
    return predict_features(model, batch)[1]


@torch.inference_mode()
def predict_features(model, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Like `predict_logits`, with the pooled features (B, C) behind the classifier before them."""
    weight = model.patch_embed.proj.weight
    was_training = model.training
    model.eval()
    try:
        maps = model.forward_features(batch.to(weight.device, weight.dtype))
        features = model.forward_head(maps, pre_logits=True)
        return features.float().cpu(), model.head(features).float().cpu()
    finally:
        model.train(was_training)


def probabilities(logits: Tensor, config) -> Tensor:
    """Logits (..., num_classes) to calibrated probabilities: softmax, or sigmoids for a multilabel model, of the logits
    over the temperature that was fitted on validation data (1 where none was)."""
    logits = logits / float(config.calibration.get("temperature", 1.0))
    return logits.sigmoid() if config.task == "multilabel" else logits.softmax(-1)


def _prepare(model, source) -> Failure | tuple[MedicalImage, Tensor]:
    try:
        image = source if isinstance(source, MedicalImage) else load_image(source)
        return image, preprocess(image, model.config.preprocess, model.config.in_chans)
    except (ImageError, ValueError) as error:
        name = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
        return Failure(name, str(error))


def _finish(model, pending: list, top_k: int | None) -> Iterator[Prediction | Failure]:
    batch = [p[1] for p in pending if not isinstance(p, Failure)]
    if not batch:
        yield from pending
        return
    features, logits = predict_features(model, torch.stack(batch))
    rows = iter(zip(logits, probabilities(logits, model.config), _unusual(model, features, logits), strict=True))
    for item in pending:
        if isinstance(item, Failure):
            yield item
            continue
        row_logits, row, unusual = next(rows)
        order = row.argsort(descending=True, stable=True).tolist()[: top_k or len(row)]
        top = [(model.config.id2label[i], row[i].item()) for i in order]
        yield Prediction(
            source=item[0].source,
            label=top[0][0],
            probability=top[0][1],
            top=top,
            image_notes=[*item[0].notes, *_input_notes(item[0], model.config), *([UNUSUAL] if unusual else [])],
            logits=row_logits.tolist(),
            unusual=unusual,
        )


def _unusual(model, features: Tensor, logits: Tensor) -> list[bool] | list[None]:
    from .calibrate import Calibration

    if model.unusual:
        return model.unusual.is_unusual(features.numpy()).tolist()
    config = model.config
    ood = Calibration.from_dict(config.calibration, config.task).ood if config.calibration.get("ood") else None
    return [None] * len(logits) if ood is None else ood.is_unusual(logits.numpy(), config.task).tolist()


def _input_notes(image: MedicalImage, config) -> list[str]:
    """How the pixels were brought to the size and channels of the network, and what in that deserves a warning."""
    height, width = image.pixels.shape[:2]
    target = config.preprocess.input_size
    notes = [f"resized from {height}x{width} to {target[0]}x{target[1]} ({config.preprocess.crop_mode})"]
    stretch = abs(math.log((width / height) / (target[1] / target[0])))
    if config.preprocess.crop_mode == "squash" and stretch > math.log(1.5):
        notes.append("warning: the aspect ratio is far from the model's; the image is visibly distorted")
    if min(height, width) < min(target) / 4:
        notes.append("warning: the image is much smaller than what the model was trained on; detail is missing")
    if image.pixels.max() == image.pixels.min():
        notes.append("warning: the image is constant; the answer means nothing")
    return notes
