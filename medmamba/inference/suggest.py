"""Which other model an image is for, when one has refused it.

The pixels of an image alone mostly say whether it is an X-ray of the chest or a blood cell, so the statistics of the
pixels that each model stores with its detector (`ood`) are compared first, which takes milliseconds and no network.
Only the best of those that accept the pixels are asked themselves, if they can be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import MedMambaConfig
from ..data import registry
from ..imaging.image import MedicalImage
from .ood import Unusual
from .signature import pixel_statistics

ASKED = 2
"""The most models that are asked themselves."""


@dataclass(frozen=True)
class Suggestion:
    """A model that an image may be for.

    Attributes:
        name: of the model.
        kind: of its images, such as "paediatric chest X-ray"; "" where its dataset is not in the registry.
        score: how unlike its training images the pixels are; up to 1 is accepted.
        asked: whether the model itself would not refuse the image, which is more than that its pixels are accepted.
    """

    name: str
    kind: str
    score: float
    asked: bool = False


def suggest_model(
    image: MedicalImage,
    known: Mapping[str, tuple[MedMambaConfig, Unusual | None]],
    load: Callable[[str], Any] | None = None,
) -> Suggestion | None:
    """Returns the model whose training images an image resembles most, or None if it resembles none.

    Args:
        image: as `load_image` returns it.
        known: configuration and detector of each model that may be suggested. Those without a detector, or with one of
            version 1, cannot be.
        load: returns the model of a name; at most `ASKED` are asked, the smallest first among equals. None: the pixels
            alone decide.
    """
    found = []
    for name, score in pixel_scores(image, known).items():
        if score <= 1:
            found.append(Suggestion(name, kind_of(known[name][0]), score))
    found.sort(key=lambda one: (round(one.score, 1), sum(known[one.name][0].dims), one.name))
    if load is None or not found:
        return found[0] if found else None
    from .predict import predict

    for one in found[:ASKED]:
        model = load(one.name)
        prediction = predict(model, [image])[0]  # type: ignore[index]
        if prediction.unusual_level != "far":
            return Suggestion(one.name, one.kind, one.score, asked=True)
    return None


def pixel_scores(image: MedicalImage, known: Mapping[str, tuple[MedMambaConfig, Unusual | None]]) -> dict[str, float]:
    """Returns `Unusual.pixel_score` of an image by model, of those that know what pixels of theirs look like."""
    from ..imaging.preprocess import preprocess

    seen: dict[str, Any] = {}
    scores = {}
    for name, (config, unusual) in known.items():
        if unusual is None or unusual.combined is None:
            continue
        key = repr((config.preprocess, config.in_chans))
        if key not in seen:
            try:
                batch = preprocess(image, config.preprocess, config.in_chans)[None]
            except ValueError:  # channels that this model does not take
                continue
            seen[key] = pixel_statistics(batch, config).numpy()
        scores[name] = float(unusual.pixel_score(seen[key])[0])
    return scores


def kind_of(config: MedMambaConfig) -> str:
    """Returns the kind of the images of a model, by the registry; "" if unknown."""
    try:
        return registry.get(str(config.training.get("dataset") or "")).modality
    except registry.RegistryError:
        return ""
