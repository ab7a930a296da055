"""Compares several attribution methods on one image."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..imaging.image import Window
from ..imaging.load import ImageSource, MedicalImage
from ..inference.predict import read_image
from ..model import MedMamba
from ..utils import modes
from ..utils.text import json_text
from .explanation import Explanation, explain
from .faithfulness import METRICS, Assessor, Trust, text_table
from .methods import METHODS
from .removal import cell_means
from .render import comparison_figure
from .similarity import rank_correlation
from .subject import Progress, sub_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS_SHARE = 0.3
"""Fraction of the progress, if there are checks, that the maps themselves take."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Explanations of one image and class by several methods.

    Attributes:
        explanations: in the order of the request.
        trust: results of the checks, one per explanation; empty if none were requested.
        agreement: float64 (n, n) rank correlation between the maps, averaged over 14x14 cells because resolutions
            differ. Methods ask different questions, so a low value calls for caution and proves none of them wrong. NaN
            between a constant map and another; 1 on the diagonal.
    """

    explanations: tuple[Explanation, ...]
    trust: tuple[Trust, ...]
    agreement: np.ndarray = field(repr=False)

    def figure(self) -> Figure:
        """Returns the image and all overlays as a matplotlib `Figure`."""
        first = self.explanations[0]
        title = f"{first.label} {first.probability:.1%}"
        return comparison_figure(first.image, title, [e.map_to_draw() for e in self.explanations])

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns the header and the rows of the table."""
        header = ["method", "seconds", "agreement"]
        if self.trust:
            header += [name for name, _, _ in self.trust[0].rows()]
        rows = []
        for i, explanation in enumerate(self.explanations):
            others = np.delete(self.agreement[i], i)
            known = others[~np.isnan(others)]
            mean = f"{known.mean():.2f}" if len(known) else "-"
            row = [explanation.title, f"{explanation.seconds:.2f}", mean]
            rows.append(row + [result for _, result, _ in self.trust[i].rows()] if self.trust else row)
        return header, rows

    def table(self) -> str:
        """Returns the comparison as aligned text: method, time, mean agreement with the other methods, and checks."""
        header, rows = self.rows()
        return text_table(header, rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record in plain types, for JSON."""
        return {
            "explanations": [e.to_dict() for e in self.explanations],
            "trust": [t.to_dict() for t in self.trust],
            "agreement": self.agreement.tolist(),
        }

    def save(self, path: str | os.PathLike, facts: Mapping[str, str] | None = None) -> Path:
        """Writes .png (the figure), .npz (`maps` (n, H, W), `methods` (n,) and the record) or .json (the record).

        Args:
            facts: text by name for the metadata of the .png, such as `reporting.record_facts`.
        """
        path = Path(path)
        if path.suffix == ".png":
            self.figure().savefig(path, metadata=dict(facts or {}))
        elif path.suffix == ".npz":
            maps = np.stack([e.attribution for e in self.explanations])
            titles = np.array([e.title for e in self.explanations])
            np.savez_compressed(path, maps=maps, methods=titles, record=np.array(json_text(self.to_dict())))
        elif path.suffix == ".json":
            path.write_text(json_text(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        else:
            raise ValueError(f"cannot save a comparison as {path.name!r}: use .png, .npz or .json")
        return path


def compare(
    model: MedMamba,
    image: ImageSource | MedicalImage,
    methods: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    target: int | str | None = None,
    *,
    metrics: Sequence[str] | None = (),
    frame: int | None = None,
    window: Window | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Explains one image with several methods.

    Args:
        methods: names, "gradcam:stage3.scan" for a layer, or (name, options). None: every method, and Grad-CAM of both
            branches of the last stage but one.
        target: class index or label, the same for all methods; None: the predicted class.
        metrics: checks to run on each map, from `METRICS`; None: all.
        frame, window, seed, batch_size, progress: as in `explain`.

    Raises:
        ValueError: no method, or as in `explain` and `Assessor`.
        ImageError: the image cannot be read.
        ImportError: captum is missing.
        ExplainCancelled: `progress` returned False.
    """
    *_, last = iter_compare(
        model,
        image,
        methods,
        target,
        metrics=metrics,
        frame=frame,
        window=window,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return last


def iter_compare(
    model: MedMamba,
    image: ImageSource | MedicalImage,
    methods: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
    target: int | str | None = None,
    *,
    metrics: Sequence[str] | None = (),
    frame: int | None = None,
    window: Window | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    """Yields the comparison after each map, then, with `metrics`, after the checks of each map; the last is complete.

    Args and Raises: as `compare`.
    """
    picture = read_image(image, frame, window)
    requests = [parse_method(m) for m in (default_methods(model) if methods is None else methods)]
    if not requests:
        raise ValueError("name at least one method to compare")
    metrics = METRICS if metrics is None else tuple(metrics)
    count, share = len(requests), MAPS_SHARE if metrics else 1.0
    explanations: list[Explanation] = []
    maps: list[torch.Tensor] = []
    for i, (name, options) in enumerate(requests):
        part = sub_progress(progress, share * i / count, share * (i + 1) / count)
        e = explain(model, picture, name, target, seed=seed, batch_size=batch_size, progress=part, **options)
        explanations.append(e)
        target = e.target
        maps.append(cell_means(torch.from_numpy(e.attribution))[0])
        agreement = np.array([[_agreement(a, b) for b in maps] for a in maps])
        found = Comparison(tuple(explanations), (), agreement)
        yield found
    if not metrics:
        return
    assessor = Assessor(model, seed=seed, batch_size=batch_size)
    for i, e in enumerate(explanations):
        begin, end = (share + (1 - share) * step / count for step in (i, i + 1))
        trust = (*found.trust, assessor.assess(e, metrics, sub_progress(progress, begin, end)))
        found = dataclasses.replace(found, trust=trust)
        yield found


def _agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    if a is b:
        return 1.0
    if any(float(map_.max() - map_.min()) == 0 for map_ in (a, b)):
        return math.nan
    return rank_correlation(a, b)


def default_methods(model: MedMamba) -> list[str]:
    """Returns the names of all methods, and of Grad-CAM for both branches of the last stage but one."""
    stage = max(len(cast(MedMamba, modes.unwrap(model)).stages) - 1, 1)
    return [*METHODS, f"gradcam:stage{stage}.conv", f"gradcam:stage{stage}.scan"]


def parse_method(method: str | tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Returns name and options of a method given as "gradcam:stage3.scan" or (name, options)."""
    if not isinstance(method, str):
        name, options = method
        return name, dict(options)
    name, _, layer = method.partition(":")
    return name, {"layer": layer} if layer else {}
