"""Prediction: images to calibrated class probabilities."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..imaging.ahead import Order, Unread, read_source
from ..imaging.image import Window
from ..imaging.load import ImageError
from ..utils.modes import unwrap
from .decide import Decision, chosen, decisions_of
from .engine import Answer, Engine, looking
from .fitted import in_force
from .stream import Batch, Options, stream

UNUSUAL = "warning: this does not look like the images the model was trained on; the prediction may be meaningless"
FAR = "warning: this is unlike all images the model was trained on or tested with; the prediction is meaningless"
_NOTES = {"near": UNUSUAL, "far": FAR}
REFUSABLE = ("far", "near")


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        source: file name, or the type of the object that was passed.
        label, probability: the most probable class.
        top: the `top_k` most probable (label, probability) pairs, in descending order.
        image_notes: how the file was decoded and preprocessed; notes that deserve attention begin with "warning".
        logits: raw outputs in class order, before temperature and softmax.
        labels: of a multi-label model, the labels whose probability is above their threshold (`calibration.thresholds`,
            chosen on validation images; else 0.5), in class order; None for other models.
        grade: of an ordinal model, the mean of the predicted distribution over grades, 0 to K - 1; None for others.
        unusual: whether the image is out-of-distribution (a heuristic): by its features if the model has a detector
            (see `medmamba.inference.ood`), otherwise by its logits (see `calibration.OutOfDistribution`); None if
            the model has a threshold for neither.
        unusual_level: "far" if it is unlike all that the model knows (see `medmamba.inference.ood`), "near" if it is
            otherwise out-of-distribution, else None.
        decisions: results of the decisions that were asked for.
    """

    source: str
    label: str
    probability: float
    top: list[tuple[str, float]]
    image_notes: list[str]
    logits: list[float]
    unusual: bool | None = None
    decisions: tuple[Decision, ...] = ()
    labels: list[str] | None = None
    grade: float | None = None
    unusual_level: str | None = None

    def __str__(self) -> str:
        return f"{self.source}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in self.top)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for JSON; "decisions", "labels", "grade" and "unusual_level" only where there are any."""
        data = asdict(self)
        data["decisions"] = [decision.to_dict() for decision in self.decisions] or None
        optional = ("decisions", "labels", "grade", "unusual_level")
        return {name: value for name, value in data.items() if name not in optional or value is not None}


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


class Refused(Failure):
    """An image that was not classified because it is too unlike the training images, see `refuse_unusual`."""


class NotFinite(Failure):
    """An image for which the model returned NaN or infinity."""


class NotFiniteError(ArithmeticError):
    """A model returned NaN or infinity: its training diverged, or values overflowed."""


def predict(
    model,
    images,
    top_k: int | None = None,
    batch_size: int | None = None,
    *,
    frame: int | None = None,
    window: Window | None = None,
    decide: Any = None,
    tta: str = "none",
) -> Prediction | list[Prediction]:
    """Classifies one image or a list of them, on the device and in the dtype of the model.

    The model is not changed and may be in any mode; several threads may predict with one model. Of many images, other
    processes read the next ones meanwhile; `iter_predict` has options for that.

    Args:
        model: a `MedMamba`, possibly wrapped by `torch.compile` or `DataParallel`; its `config.preprocess` and
            calibration are applied.
        images: anything that `load_image` reads, a `MedicalImage`, or a list or tuple of those.
        top_k: number of classes to report, or None for all.
        batch_size: images per forward pass; None: found automatically.
        frame, window: as in `load_image`, for every image.
        decide: names of operating points, sets and abstentions of the model (`medmamba.decision`), or "all".
        tta: test-time augmentation, the views whose logits are averaged: "none", "hflip", "flips" or "dihedral", see
            `medmamba.inference.tta`. One forward pass per view.

    Returns:
        A `Prediction`, or a list of them in the order of the images.

    Raises:
        ImageError: an image cannot be read. `iter_predict` continues after such images.
        NotFiniteError: the model returned NaN or infinity.
        DecisionError: the model has no such decision, or it is not valid for these weights or this preprocessing.
    """
    if not isinstance(images, list | tuple):
        found = predict(model, [images], top_k, batch_size, frame=frame, window=window, decide=decide, tta=tta)
        return found[0]  # type: ignore[index]
    results = []
    for result in iter_predict(model, images, top_k, batch_size, frame=frame, window=window, decide=decide, tta=tta):
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
    batch_size: int | None = None,
    *,
    frame: int | None = None,
    window: Window | None = None,
    workers: int | None = None,
    precision: str | None = None,
    devices: Sequence[str | torch.device] | None = None,
    reduced: bool = False,
    decide: Any = None,
    tta: str = "none",
    gpu_decode: bool = False,
    refuse_unusual: str | None = None,
) -> Iterator[Prediction | Failure]:
    """Yields predictions lazily and in order, with a `Failure` in place of each image that cannot be read or for which
    the model returns NaN or infinity.

    Args:
        model, top_k, batch_size, frame, window, decide, tta: as in `predict`.
        images: any number of them, also from a generator: they are taken a little ahead of the results, in the caller's
            thread, and memory does not grow with their number.
        workers: processes that read images; 0: none. None: one per core, as soon as more than 2 seconds of reading are
            left.
        precision, devices, reduced, gpu_decode: see `medmamba.inference.stream.Options`.
        refuse_unusual: yield a `Refused`, which is a `Failure`, for images that are "far" from the training images, or
            with "near" for all that are flagged as unusual; None: answer them, with a warning.
    """
    if refuse_unusual not in (None, *REFUSABLE):
        raise ValueError(f"refuse_unusual must be None, {' or '.join(REFUSABLE)}, got {refuse_unusual!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    model = unwrap(model)
    seen = needs_signatures(model)
    options = Options(batch_size, workers, precision, devices, reduced, tta, gpu_decode, signature=seen)
    if not model.config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    if decide:
        chosen(in_force(model), decide)  # refused before the first image is read
    colour = trained_on_colour(model.config)
    order = Order(model.config.preprocess, model.config.in_chans, frame, window, reduced=reduced, colour=colour)
    for batch in stream(model, images, order, options):
        yield from _finish(model, batch, top_k, decide, refuse_unusual)


read_image = read_source
"""The former name of `medmamba.imaging.ahead.read_source`."""


def predict_logits(model, batch: Tensor) -> Tensor:
    """Returns the logits (B, num_classes), float32 on the CPU, of normalised images (B, in_chans, H, W).

    The model is not changed, and may be in any mode: see `medmamba.utils.modes.eval_view`. Non-finite logits are
    returned as they are.

    Raises:
        ValueError: the model does not return logits of `config.num_classes` classes.
    """
    return _outputs(model, batch).logits


def predict_features(model, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pooled features (B, C), which are the input of the classifier, and the logits of `predict_logits`.

    Raises:
        ValueError: as in `predict_logits`, or a subclass does not call `model.head`.
    """
    features, logits, _ = _outputs(model, batch)
    if features is None:
        raise ValueError(f"{type(unwrap(model)).__name__} does not call its head, so there are no features before it")
    return features, logits


def predict_signatures(model, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the signatures (B, S), see `signature`, and the logits of `predict_logits`.

    Raises:
        ValueError: as `predict_features`.
    """
    answer = _outputs(model, batch, signature=True)
    if answer.signature is None:
        raise ValueError(f"{type(unwrap(model)).__name__} does not call its head, so there are no features before it")
    return answer.signature, answer.logits


def _outputs(model, batch: Tensor, signature: bool = False) -> Answer:
    inner: Any = unwrap(model)
    device = inner.patch_embed.proj.weight.device
    return Engine(inner, device, signature=signature).compute(batch.to(device), many=False).answer()


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


def _finish(
    model, batch: Batch, top_k: int | None, decide: Any = None, refuse: str | None = None
) -> Iterator[Prediction | Failure]:
    if batch.answer is None:
        yield from (_failure(item) for item in batch.items if isinstance(item, Unread))
        return
    with looking(model):
        found = in_force(model)
    config, detector, changes = found
    features, logits, seen = batch.answer
    finite = logits.isfinite().all(1)
    good = enumerate(finite.tolist())
    known, answered = features if seen is None else seen, logits
    if not all(finite.tolist()):
        answered, known = logits[finite], None if known is None else known[finite]
    chances = probabilities(answered, config)
    order = chances.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    levels = _levels(config, detector, known, answered)
    flags = [None if level is None else bool(level) for level in levels]
    decided: list[tuple[Decision, ...]] = [()] * len(chances)
    if decide:  # in the precision in which the thresholds were chosen
        exact = probabilities(answered.double(), config).numpy()
        decided = decisions_of(chosen(found, decide), exact, config, flags)
    rows = zip(
        answered.tolist(),
        order.tolist(),
        chances.gather(1, order).tolist(),
        levels,
        decided,
        chances,
        strict=True,
    )
    labels = config.id2label
    for item in batch.items:
        if isinstance(item, Unread):
            yield _failure(item)
            continue
        position, is_finite = next(good)
        if not is_finite:
            yield NotFinite(item.source, f"{item.source}: {why_not_finite(model, logits[position])}")
            continue
        values, classes, shares, level, said, row = next(rows)
        if refuse and (level == "far" or (level and refuse == "near")):
            yield Refused(item.source, f"{item.source}: refused, because {_NOTES[level].partition(': ')[2]}")
            continue
        yield Prediction(
            source=item.source,
            label=labels[classes[0]],
            probability=shares[0],
            top=[(labels[i], chance) for i, chance in zip(classes, shares, strict=True)],
            image_notes=[*item.notes, *changes, *([_NOTES[level]] if level else [])],
            logits=values,
            unusual=None if level is None else bool(level),
            decisions=said,
            labels=_above(row, config) if config.task == "multilabel" else None,
            grade=float(row @ torch.arange(len(row), dtype=row.dtype)) if config.task == "ordinal" else None,
            unusual_level=level or None,
        )


def _failure(item: Unread) -> Failure:
    return Failure(item.source, item.error, item.cause)


def _above(row: Tensor, config) -> list[str]:
    """Returns the labels above their thresholds, of probabilities (K,)."""
    limits = config.calibration.get("thresholds") or [0.5] * len(row)
    return [config.id2label[i] for i, limit in enumerate(limits) if row[i].item() > limit]


def _levels(config, detector, seen: Tensor | None, logits: Tensor) -> Sequence[str | None]:
    """Returns "near" or "far" for out-of-distribution images, "" for others, None where there is no threshold."""
    from ..metrics.calibration import Calibration

    if not len(logits):
        return []
    if detector and seen is not None and seen.shape[1] >= detector.width:
        return [level or "" for level in detector.levels(seen.numpy())]
    ood = Calibration.from_dict(config.calibration, config.task).ood if config.calibration.get("ood") else None
    if ood is None:
        return [None] * len(logits)
    return ["near" if flag else "" for flag in ood.is_unusual(logits.numpy(), config.task)]


def unusual_flags(model, answer: Answer) -> list[bool] | list[None]:
    """Returns for each image of an answer whether it is unlike the training images, or None without a detector.

    The answer holds signatures if `needs_signatures`. Images without a finite answer are not flagged.
    """
    config, detector, _ = in_force(unwrap(model))
    finite = answer.logits.isfinite().all(1)
    seen = answer.features if answer.signature is None else answer.signature
    known = _levels(config, detector, None if seen is None else seen[finite], answer.logits[finite])
    if None in known:
        return [None] * len(finite)
    found = iter(known)
    return [bool(next(found)) if good else False for good in finite.tolist()]


def needs_signatures(model) -> bool:
    """Returns whether the detector of a model compares whole signatures, see `stream.Options`."""
    detector = getattr(unwrap(model), "unusual", None)
    return bool(detector and detector.combined)


def trained_on_colour(config) -> bool | None:
    """Returns whether the training images of a model were in colour, by the registry; None if unknown."""
    from ..data import registry

    try:
        return registry.get(str(config.training.get("dataset") or "")).colour
    except registry.RegistryError:
        return None
