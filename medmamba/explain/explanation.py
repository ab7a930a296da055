"""`explain`: computes an attribution map, and records everything needed to judge and reproduce it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MedMambaConfig, PreprocessConfig
from ..imaging.image import Window
from ..imaging.load import ImageSource, MedicalImage
from ..imaging.preprocess import placement, preprocess
from ..inference.fitted import in_force
from ..inference.predict import probabilities, read_image
from ..kernels import resolve_backend
from ..model import MedMamba
from ..utils import modes
from ..utils.extras import missing_text
from ..utils.text import json_text
from .conditions import SeededNumPy, controlled
from .location import location_note
from .methods import METHODS, Attribution, Method, check_options
from .render import Map, colour_limit, faint_range, overlay_figure, overlay_pixels
from .subject import Progress, Subject, blocks, default_batch_size, frozen_view, resolve_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CustomMethod = Callable[[MedMamba, Tensor, int], Tensor]
"""A user-defined method: takes a frozen model, its input (1, C, H, W) and a class index; returns a map (H, W)."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """An attribution map, the class and the image it is for, and how it was made.

    Attributes:
        method: name of the method.
        attribution: float32 (H, W) at the size of the network's input, on which the metrics are computed. Positive
            values are evidence for the class; negative ones, in signed methods, against it.
        signed: whether negative values can occur.
        target, label: index and name of the class explained.
        logit: of that class; this is what is explained.
        probability: of that class, after softmax or sigmoid.
        parameters: every setting, including seed and backend. The same parameters give the same map.
        diagnostics: measurements of the method itself, such as the completeness error of integrated gradients.
        seconds: wall-clock time.
        notes: caveats about the image and the result.
        image: the image explained.
        preprocess: how the image was turned into the network's input.
        request: the method, a name or a function, and the options passed; `assess` uses them to run it again.
    """

    method: str
    attribution: np.ndarray = field(repr=False)
    signed: bool
    target: int
    label: str
    logit: float
    probability: float
    parameters: dict[str, Any]
    diagnostics: dict[str, Any]
    seconds: float
    notes: tuple[str, ...]
    image: MedicalImage = field(repr=False)
    preprocess: PreprocessConfig = field(repr=False)
    request: tuple[str | CustomMethod, dict[str, Any]] = field(repr=False)

    @property
    def title(self) -> str:
        """Name of the method, with its layer if it has one."""
        layer = self.parameters.get("layer")
        return f"{self.method} ({layer})" if layer else self.method

    @cached_property
    def attribution_full(self) -> np.ndarray:
        """float32 (h, w) at the size of the original image, interpolated; 0 where preprocessing cropped the image."""
        return to_image_size(self.attribution, self.image.size, self.preprocess)

    @property
    def reading(self) -> str:
        """How to read the map, in plain words; says so if it was enlarged from a coarser feature map."""
        method = METHODS.get(self.method)
        said = method.reading if method else ""
        coarse = self.parameters.get("layer_size")
        if coarse and tuple(coarse) != self.attribution.shape:
            h, w = coarse
            said += f" This is a map of {h}×{w} values, enlarged: its outlines are blurred."
        return said.strip()

    @property
    def location(self) -> str:
        """A sentence if much of the weight lies in a corner or in the border of the model's input, else ""."""
        return location_note(self.attribution)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the pixels and the map, in plain types, for JSON."""
        return {
            "source": self.image.source,
            "image_size": list(self.image.size),
            "input_size": list(self.attribution.shape),
            **{
                name: getattr(self, name)
                for name in ("method", "signed", "target", "label", "logit", "probability", "parameters", "diagnostics")
            },
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def overlay(self, alpha: float = 0.75) -> Figure:
        """Returns the map over the image at its original resolution, with a colour bar, as a matplotlib `Figure`."""
        method = METHODS.get(self.method)
        unit = method.unit if method else ""
        sides = "blue against, red for the class" if self.signed and method else ""
        caption = f"{self.label}: logit {self.logit:.2f}, probability {self.probability:.1%}"
        return overlay_figure(self.image, self.map_to_draw(), caption, ": ".join(filter(None, (unit, sides))), alpha)

    def overlay_pixels(self, alpha: float = 0.75) -> np.ndarray:
        """Returns the overlay without title and colour bar: uint8 (h, w, 3)."""
        return overlay_pixels(self.image, self.map_to_draw(), alpha)

    def map_to_draw(self) -> Map:
        """Returns the map as `render` takes it."""
        return Map(self.title, self.attribution_full, colour_limit(self.attribution), self.signed)

    def save(self, path: str | os.PathLike, facts: Mapping[str, str] | None = None) -> Path:
        """Writes .png (the overlay), .npz (both maps, and the record as JSON text) or .json (the record).

        Args:
            facts: text by name for the metadata of the .png, such as `reporting.record_facts`.

        Returns:
            The path.

        Raises:
            ValueError: unknown suffix.
        """
        path = Path(path)
        if path.suffix == ".png":
            self.overlay().savefig(path, metadata=dict(facts or {}))
        elif path.suffix == ".npz":
            record = json_text(self.to_dict())
            np.savez_compressed(
                path, attribution=self.attribution, attribution_full=self.attribution_full, record=np.array(record)
            )
        elif path.suffix == ".json":
            path.write_text(json_text(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        else:
            raise ValueError(f"cannot save an explanation as {path.name!r}: use .png, .npz or .json")
        return path


def explain(
    model: MedMamba,
    image: ImageSource | MedicalImage,
    method: str | CustomMethod = "integrated_gradients",
    target: int | str | None = None,
    *,
    frame: int | None = None,
    window: Window | int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Explanation:
    """Computes pixel attributions for a class.

    The model is explained in float32 and eval mode, whatever its own dtype and mode, and is not changed. On an NVIDIA
    GPU, TF32 is off meanwhile for the whole process, see `FullPrecision`.

    Args:
        image: anything that `load_image` reads.
        method: a name from `methods()`, or a function `(model, x, target) -> (H, W)`.
        target: class index or label; None: the predicted class.
        frame: as in `load_image`.
        window: (center, width) as in `load_image`; a single number is the option `window` of the method "occlusion".
        seed: for methods that draw random numbers.
        batch_size: maximum number of copies of the image per forward pass, which bounds memory. None: 8, or on an
            NVIDIA GPU 8 to 128 by its memory. The result does not depend on it, except for the noise that smoothgrad
            and gradient_shap draw.
        progress: called with the fraction done; return False to cancel.
        options: options of the method, such as `layer="stage3.scan"` for gradcam; see `methods()[name].options`.

    Raises:
        ValueError: unknown method, option, class or layer, or a value out of range.
        ImageError: the image cannot be read.
        ImportError: captum is missing.
        ExplainCancelled: `progress` returned False.
    """
    began = time.perf_counter()
    if isinstance(window, int | float):
        options, window = {**options, "window": window}, None
    chosen = find_method(method)
    filled = check_options(chosen, options)
    view = frozen_view(model)
    original = cast(MedMamba, modes.unwrap(model))
    batch_size = check_batch_size(batch_size, view)
    config, _, changes = in_force(original)
    index = resolve_target(target, config)
    picture = read_image(image, frame, window)
    device = view.patch_embed.proj.weight.device
    x = preprocess(picture, config.preprocess, config.in_chans, device).unsqueeze(0)
    subject = Subject(view, x, index, batch_size, progress)
    result = attribute(subject, chosen, filled, seed)
    subject.report(1.0)
    assert subject.logits is not None and subject.target is not None
    values = result.values.detach().cpu().float().numpy()
    where = [note] if (note := location_note(values)) else []
    return Explanation(
        method=chosen.name,
        attribution=values,
        signed=chosen.signed,
        target=subject.target,
        label=config.id2label[subject.target],
        logit=subject.logits[subject.target].item(),
        probability=probabilities(subject.logits, config)[subject.target].item(),
        parameters={
            **{name: list(v) if isinstance(v, tuple) else v for name, v in filled.items()},
            **result.parameters,
            "seed": seed,
            "batch_size": batch_size,
            "device": str(device),
            "scan_backend": resolve_backend(device, torch.float32, blocks(view, 1)[0].ssm.scan_backend),
        },
        diagnostics=result.diagnostics,
        seconds=time.perf_counter() - began,
        notes=(
            *_notes(picture, config, original),
            *(note.removeprefix("warning: ") for note in changes),
            *result.notes,
            *where,
        ),
        image=picture,
        preprocess=config.preprocess,
        request=(method, options),
    )


def attribute(subject: Subject, method: Method, options: dict[str, Any], seed: int) -> Attribution:
    """Runs a method with gradients on, autocast and TF32 off, and random numbers from `seed`.

    Raises:
        ImportError: captum is missing.
        ValueError: the method returned a map that is not finite, or of the wrong shape.
    """
    subject.seed = seed
    with controlled(subject.x.device, seed), SeededNumPy(seed) if method.foreign else nullcontext():
        try:
            if not method.single_pass:
                subject.planned += 1
                subject.measure()
            result = method.run(subject, **options)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "captum":
                raise
            raise ImportError(missing_text("captum", "an explanation")) from error
    if tuple(result.values.shape) != tuple(subject.x.shape[2:]):
        raise ValueError(
            f"{method.name} returned a map of shape {tuple(result.values.shape)}, expected {tuple(subject.x.shape[2:])}"
        )
    if not result.values.isfinite().all():
        raise ValueError(f"{method.name} returned values that are not finite; do the weights contain NaN or infinity?")
    return result


def check_batch_size(batch_size: int | None, model: MedMamba) -> int:
    """Returns the batch size, or the default for the model's device if it is None.

    Raises:
        ValueError: not a positive integer.
    """
    if batch_size is None:
        return default_batch_size(model.patch_embed.proj.weight.device)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    return batch_size


def to_image_size(map_: np.ndarray, size: tuple[int, int], config: PreprocessConfig) -> np.ndarray:
    """Resizes a map (H, W) of the network's input to the image's (height, width); 0 where the image was cropped."""
    inner, (left, right, top, bottom) = placement(size, config)
    placed = F.pad(torch.from_numpy(map_)[None, None], (-left, -right, -top, -bottom))
    assert tuple(placed.shape[2:]) == inner
    return F.interpolate(placed, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def find_method(method: str | CustomMethod) -> Method:
    """Returns the method of that name, or wraps a function of the caller.

    Raises:
        ValueError: unknown name.
    """
    if callable(method):
        return _custom(method)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}, or pass a function")
    return METHODS[method]


def _custom(function: CustomMethod) -> Method:
    def run(subject: Subject) -> Attribution:
        assert subject.target is not None
        return Attribution(torch.as_tensor(function(subject.model, subject.x, subject.target)))

    name = getattr(function, "__name__", type(function).__name__)
    return Method(name, "user-defined function", "its own", True, run, foreign=True)


def _notes(image: MedicalImage, config: MedMambaConfig, model: MedMamba) -> list[str]:
    notes = []
    size, target = image.size, config.preprocess.input_size
    if image.pixels.max() == image.pixels.min():
        notes.append(
            f"the image is constant (every value is {float(image.pixels.flat[0]):.3g}): it holds no evidence to "
            "locate, and what the map shows is how the model treats borders"
        )
    elif (span := faint_range(image)) is not None:
        notes.append(
            f"the image has hardly any contrast, nearly all values are from {span[0]:.2f} to {span[1]:.2f}; figures "
            "show it stretched, the model sees it as it is"
        )
    if size[0] < target[0] or size[1] < target[1]:
        notes.append(
            f"the image, {size[0]}x{size[1]}, is smaller than the model's input, {target[0]}x{target[1]}: it was "
            "enlarged, and the map cannot be finer than the image"
        )
    _, margins = placement(size, config.preprocess)
    if min(margins) < 0:
        notes.append("the model crops the image; the map is 0 where it did not look")
    stretch = abs(math.log((size[1] / size[0]) / (target[1] / target[0])))
    if config.preprocess.crop_mode == "squash" and stretch > math.log(1.5):
        notes.append("the model sees this image with a visibly distorted aspect ratio")
    if model.patch_embed.proj.weight.dtype != torch.float32:
        notes.append(f"the weights are {str(model.patch_embed.proj.weight.dtype)[6:]}; explained in float32")
    return notes
