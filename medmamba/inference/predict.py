"""Prediction: images to calibrated class probabilities."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..imaging.image import Window
from ..imaging.load import ImageError, MedicalImage, load_image
from ..imaging.preprocess import preprocess
from ..utils.modes import eval_view, unwrap
from ..utils.precision import FullPrecision
from .fitted import in_force

UNUSUAL = "warning: this does not look like the images the model was trained on; the prediction may be meaningless"


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        source: file name, or the type of the object that was passed.
        label, probability: the most probable class.
        top: the `top_k` most probable (label, probability) pairs, in descending order.
        image_notes: how the file was decoded and preprocessed; notes that deserve attention begin with "warning".
        logits: raw outputs in class order, before temperature and softmax.
        unusual: whether the image is out-of-distribution (a heuristic): by its features if the model has a detector
            (see `medmamba.inference.ood`), otherwise by its logits (see `calibration.OutOfDistribution`); None if
            the model has a threshold for neither.
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
        """Returns plain types for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or classified.

    Attributes:
        source: as in `Prediction`.
        error: the reason and how to fix it.
        cause: the exception that was raised, for its type and attributes such as `FrameNeeded.n_frames`.
    """

    source: str
    error: str
    cause: Exception | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "error": self.error}


class NotFinite(Failure):
    """An image for which the model returned NaN or infinity."""


class NotFiniteError(ArithmeticError):
    """A model returned NaN or infinity: its training diverged, or values overflowed."""


def predict(
    model,
    images,
    top_k: int | None = None,
    batch_size: int = 16,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> Prediction | list[Prediction]:
    """Classifies one image or a list of them, on the device and in the dtype of the model.

    The model is not changed and may be in any mode; several threads may predict with one model.

    Args:
        model: a `MedMamba`, possibly wrapped by `torch.compile` or `DataParallel`; its `config.preprocess` and
            calibration are applied.
        images: anything that `load_image` reads, a `MedicalImage`, or a list or tuple of those.
        top_k: number of classes to report, or None for all.
        batch_size: images per forward pass.
        frame, window: as in `load_image`, for every image.

    Returns:
        A `Prediction`, or a list of them in the order of the images.

    Raises:
        ImageError: an image cannot be read. `iter_predict` continues after such images.
        NotFiniteError: the model returned NaN or infinity.
    """
    if not isinstance(images, list | tuple):
        return predict(model, [images], top_k, batch_size, frame=frame, window=window)[0]  # type: ignore[index]
    results = []
    for result in iter_predict(model, images, top_k, batch_size, frame=frame, window=window):
        if isinstance(result, NotFinite):
            raise NotFiniteError(result.error)
        if isinstance(result, Failure):
            raise result.cause if isinstance(result.cause, ImageError) else ImageError(result.error)
        results.append(result)
    return results


def iter_predict(
    model,
    images: Iterable[Any],
    top_k: int | None = None,
    batch_size: int = 16,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> Iterator[Prediction | Failure]:
    """Yields predictions lazily and in order, with a `Failure` in place of each image that cannot be read or for which
    the model returns NaN or infinity. Arguments are those of `predict`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    model = unwrap(model)
    if not model.config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    pending: list[Failure | tuple[MedicalImage, Tensor]] = []
    for image in images:
        pending.append(_prepare(model, image, frame, window))
        if sum(not isinstance(p, Failure) for p in pending) == batch_size:
            yield from _finish(model, pending, top_k)
            pending = []
    yield from _finish(model, pending, top_k)


def read_image(source: Any, frame: int | None = None, window: Window | None = None) -> MedicalImage:
    """Returns `load_image(source, frame=frame, window=window)`, or the source where it is a `MedicalImage` already.

    Raises:
        ImageError: the file cannot be read, or a frame or window is given for an image that is already decoded.
    """
    if not isinstance(source, MedicalImage):
        return load_image(source, frame=frame, window=window)
    if frame is not None or window is not None:
        raise ImageError(f"{source.source}: frame and window apply to files, but this image is already decoded")
    return source


def predict_logits(model, batch: Tensor) -> Tensor:
    """Returns the logits (B, num_classes), float32 on the CPU, of normalised images (B, in_chans, H, W).

    The model is not changed, and may be in any mode: see `medmamba.utils.modes.eval_view`. Non-finite logits are
    returned as they are.

    Raises:
        ValueError: the model does not return logits of `config.num_classes` classes.
    """
    return _outputs(model, batch)[1]


def predict_features(model, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pooled features (B, C), which are the input of the classifier, and the logits of `predict_logits`.

    Raises:
        ValueError: as in `predict_logits`, or a subclass does not call `model.head`.
    """
    features, logits = _outputs(model, batch)
    if features is None:
        raise ValueError(f"{type(unwrap(model)).__name__} does not call its head, so there are no features before it")
    return features, logits


@torch.inference_mode()
def _outputs(model, batch: Tensor) -> tuple[Tensor | None, Tensor]:
    view = eval_view(model)
    weight = view.patch_embed.proj.weight
    seen: list[Tensor] = []
    if isinstance(view.head, torch.nn.Module) and not isinstance(view.head, torch.jit.ScriptModule):
        table = view.head.__dict__["_forward_pre_hooks"].copy()  # a copy that belongs to the view
        view.head.__dict__["_forward_pre_hooks"] = table
        view.head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    # Otherwise an explanation in another thread, which turns TF32 off for the process, would change the result.
    with FullPrecision() if weight.is_cuda and weight.dtype == torch.float32 else nullcontext():
        logits = view(batch.to(weight.device, weight.dtype))
    classes = view.config.num_classes
    if classes and (not isinstance(logits, Tensor) or logits.shape != (len(batch), classes)):
        found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model returned {found} for {len(batch)} images, not logits ({len(batch)}, {classes}): to give it "
            "another classifier use model.reset_classifier(num_classes), which also replaces the names of the classes"
        )
    return seen[-1].float().cpu() if seen else None, logits.float().cpu()


def probabilities(logits: Tensor, config) -> Tensor:
    """Returns calibrated probabilities of logits (..., num_classes).

    Applies softmax, or sigmoid for a multi-label model, to the logits divided by the temperature fitted on validation
    data (1 if there is none).
    """
    from ..metrics.calibration import to_probabilities

    temperature = float(config.calibration.get("temperature", 1.0))
    found = to_probabilities(logits.detach().cpu().double().numpy(), config.task, temperature)
    return torch.from_numpy(found).to(logits)


def why_not_finite(model, logits: Tensor) -> str:
    """Returns why the outputs of a model are NaN or infinite, and how to fix it.

    Args:
        logits: (num_classes,), some of them not finite.
    """
    kind = "NaN" if logits.isnan().any() else "infinite"
    bad = next((n for n, t in model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()), None)
    if bad is not None:
        return (
            f"the model's outputs are {kind} because its weights are not finite ({bad}): its training diverged or the "
            "file is damaged; load another checkpoint, or train again with a lower learning rate"
        )
    dtype = str(model.patch_embed.proj.weight.dtype).removeprefix("torch.")
    advice = "compute in float32, as model.float() does" if dtype != "float32" else "its weights are far too large"
    return f"the model's outputs are {kind}: values overflowed in {dtype}; {advice}"


def _prepare(model, source, frame: int | None, window: Window | None) -> Failure | tuple[MedicalImage, Tensor]:
    try:
        image = read_image(source, frame, window)
        return image, preprocess(image, model.config.preprocess, model.config.in_chans)
    except (ValueError, OSError, MemoryError) as error:  # ImageError is a ValueError
        name = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
        return Failure(name, str(error) or f"{name}: {type(error).__name__}", error)


def _finish(model, pending: list, top_k: int | None) -> Iterator[Prediction | Failure]:
    batch = [p[1] for p in pending if not isinstance(p, Failure)]
    if not batch:
        yield from pending
        return
    config, detector, changes = in_force(model)
    features, logits = _outputs(model, torch.stack(batch))
    finite = logits.isfinite().all(1)
    known = None if features is None else features[finite]
    rows = zip(
        logits[finite],
        probabilities(logits[finite], config),
        _unusual(config, detector, known, logits[finite]),
        strict=True,
    )
    position = 0
    for item in pending:
        if isinstance(item, Failure):
            yield item
            continue
        position += 1
        if not finite[position - 1]:
            reason = why_not_finite(model, logits[position - 1])
            yield NotFinite(item[0].source, f"{item[0].source}: {reason}")
            continue
        row_logits, row, unusual = next(rows)
        order = row.argsort(descending=True, stable=True).tolist()[: top_k or len(row)]
        top = [(config.id2label[i], row[i].item()) for i in order]
        yield Prediction(
            source=item[0].source,
            label=top[0][0],
            probability=top[0][1],
            top=top,
            image_notes=[
                *item[0].notes,
                *_input_notes(item[0], config),
                *changes,
                *([UNUSUAL] if unusual else []),
            ],
            logits=row_logits.tolist(),
            unusual=unusual,
        )


def _unusual(config, detector, features: Tensor | None, logits: Tensor) -> list[bool] | list[None]:
    from ..metrics.calibration import Calibration

    if not len(logits):
        return []
    if detector and features is not None:
        return detector.is_unusual(features.numpy()).tolist()
    ood = Calibration.from_dict(config.calibration, config.task).ood if config.calibration.get("ood") else None
    return [None] * len(logits) if ood is None else ood.is_unusual(logits.numpy(), config.task).tolist()


def _input_notes(image: MedicalImage, config) -> list[str]:
    """Returns notes and warnings about resizing to the input size of the network."""
    height, width = image.pixels.shape[:2]
    target = config.preprocess.input_size
    notes = [f"resized from {height}x{width} to {target[0]}x{target[1]} ({config.preprocess.crop_mode})"]
    stretch = abs(math.log((width / height) / (target[1] / target[0])))
    if config.preprocess.crop_mode == "squash" and stretch > math.log(1.5):
        notes.append("warning: the aspect ratio is far from the model's; the image is visibly distorted")
    if min(height, width) < min(target) / 4:
        notes.append("warning: the image is much smaller than the training images; detail is missing")
    if image.pixels.max() == image.pixels.min():
        notes.append("warning: all pixels of the image are equal; the prediction is meaningless")
    return notes
