"""Metrics of segmentation: Dice, IoU, HD95 and lesion-wise sensitivity and precision, with bootstrap intervals.

Conventions, which differ between libraries and change results: an image in which neither the prediction nor the truth
has a pixel of the class scores Dice and IoU 1; one in which only one of them has scores 0. HD95 is not defined where
either is empty; such images are left out of its mean and counted (`hd95_undefined`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..utils.extras import require
from .bootstrap import bootstrap_weights, resampling_units

LESION_IOU = 0.1  # a predicted and a true region match from this IoU on, as in detection challenges of lesions


@dataclass
class ImageScores:
    """Metrics of one class in one image.

    Attributes:
        dice, iou: in [0, 1].
        hd95: 95th percentile of the distances between the two outlines, in pixels, or in mm with a spacing; NaN where
            one of the masks is empty.
        intersection, predicted, true: pixels.
        found, missed, false: lesions (connected regions) of the truth that were found and missed, and predicted regions
            that match none.
    """

    dice: float
    iou: float
    hd95: float
    intersection: int
    predicted: int
    true: int
    found: int
    missed: int
    false: int


def score_mask(
    predicted: np.ndarray,
    true: np.ndarray,
    ignored: np.ndarray | None = None,
    spacing: tuple[float, float] | None = None,
) -> ImageScores:
    """Compares two masks of one class.

    Args:
        predicted, true: (H, W) bool.
        ignored: (H, W) bool, pixels that count for nothing.
        spacing: (row, column) distance of pixels, for HD95.

    Raises:
        ValueError: masks of different sizes.
    """
    predicted, true = np.asarray(predicted, bool), np.asarray(true, bool)
    if predicted.shape != true.shape or predicted.ndim != 2:
        raise ValueError(f"masks must have one size (H, W); got {predicted.shape} and {true.shape}")
    if ignored is not None:
        predicted, true = predicted & ~ignored, true & ~ignored
    both, p, t = int((predicted & true).sum()), int(predicted.sum()), int(true.sum())
    dice = 2 * both / (p + t) if p + t else 1.0
    iou = both / (p + t - both) if p + t else 1.0
    found, missed, false = match_lesions(predicted, true)
    return ImageScores(dice, iou, hausdorff95(predicted, true, spacing), both, p, t, found, missed, false)


def hausdorff95(predicted: np.ndarray, true: np.ndarray, spacing: tuple[float, float] | None = None) -> float:
    """Returns the larger of the 95th percentiles of the distances from each outline to the other; NaN if one is empty.

    An outline is the pixels of a mask (H, W) with a neighbour outside of it in one of four directions; the border of
    the image counts as outside. This is MONAI's `compute_hausdorff_distance(..., percentile=95)`.
    """
    if not predicted.any() or not true.any():
        return float("nan")
    ndimage = require("scipy.ndimage", "HD95", "segment")
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, true)]
    sampling = spacing or (1.0, 1.0)
    distances = [
        ndimage.distance_transform_edt(~other, sampling=sampling)[outline]
        for outline, other in (outlines, outlines[::-1])
    ]
    return float(max(np.percentile(values, 95) for values in distances))


def match_lesions(predicted: np.ndarray, true: np.ndarray, least: float = LESION_IOU) -> tuple[int, int, int]:
    """Matches connected regions (also diagonally) one to one, by descending IoU.

    Returns:
        Lesions of the truth that were found, those that were missed, and predicted regions that match none.
    """
    ndimage = require("scipy.ndimage", "lesion-wise metrics", "segment")
    around = np.ones((3, 3))
    (a, p), (b, t) = ndimage.label(predicted, around), ndimage.label(true, around)
    if not p or not t:
        return 0, t, p
    shared = np.bincount((a.astype(np.int64) * (t + 1) + b).ravel(), minlength=(p + 1) * (t + 1)).reshape(p + 1, t + 1)
    sizes_p, sizes_t = shared.sum(1)[1:], shared.sum(0)[1:]
    iou = shared[1:, 1:] / (sizes_p[:, None] + sizes_t[None] - shared[1:, 1:])
    free_p, free_t, found = set(range(p)), set(range(t)), 0
    for i, j in sorted(zip(*np.nonzero(iou >= least), strict=True), key=lambda pair: -iou[pair]):
        if i in free_p and j in free_t:
            free_p.remove(i)
            free_t.remove(j)
            found += 1
    return found, t - found, p - found


@dataclass
class SegmentationEvaluation:
    """Metrics of a segmentation model on one split.

    Attributes:
        classes: names.
        n: number of images.
        units: what the bootstrap resampled: "patients" or "images".
        metrics: by class: `dice`, `iou` (means over images), `dice_all` (over the pixels of all images), `hd95`,
            `lesion_sensitivity`, `lesion_precision`; each {"value", "low", "high"} with a 95 % interval, None where it
            is not defined.
        hd95_undefined: by class, images without an HD95.
        hd95_unit: "mm", or "pixels" where the spacing of some image is unknown.
        mean_dice: mean of `dice` over the classes.
    """

    classes: tuple[str, ...]
    n: int
    units: str
    metrics: dict[str, dict[str, dict[str, float | None]]]
    hd95_undefined: dict[str, int] = field(default_factory=dict)
    hd95_unit: str = "pixels"

    @property
    def mean_dice(self) -> float:
        values = [self.metrics[name]["dice"]["value"] for name in self.classes]
        return float(np.mean([v for v in values if v is not None]))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for JSON."""
        import dataclasses

        return {**dataclasses.asdict(self), "classes": list(self.classes), "mean_dice": self.mean_dice}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SegmentationEvaluation:
        """Reads what `to_dict` wrote."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__} | {"classes": tuple(data["classes"])})

    def table(self) -> str:
        """Returns the metrics as a Markdown table with 95 % intervals."""
        names = list(next(iter(self.metrics.values())))
        rows = ["| class | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for label in self.classes:
            cells = [_cell(self.metrics[label][name]) for name in names]
            rows.append(f"| {label} | " + " | ".join(cells) + " |")
        return "\n".join(rows)


def summarise(
    classes: Sequence[str],
    scores: Sequence[Sequence[ImageScores]],
    patients: Sequence[str | None] | None = None,
    *,
    in_mm: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> SegmentationEvaluation:
    """Averages over images, with bootstrap intervals over patients where they are known, else over images.

    Args:
        classes: K names.
        scores: N images of K scores.
        patients: N names, None where unknown.
        in_mm: HD95 is in mm.
        resamples: of the bootstrap; 0: no intervals.

    Raises:
        ValueError: no images.
    """
    n = len(scores)
    if not n:
        raise ValueError("there are no images to evaluate")
    unit_of, strata = resampling_units(np.zeros(n, dtype=np.int64), patients)
    chunks = [np.ones((1, n), np.float32), *(bootstrap_weights(unit_of, strata, resamples, seed) if resamples else ())]
    weights = np.concatenate(chunks).astype(np.float64)  # (1 + R, N); the first row is the sample itself
    metrics, undefined = {}, {}
    for k, label in enumerate(classes):
        column = [row[k] for row in scores]
        get = {name: np.array([getattr(s, name) for s in column], float) for name in ImageScores.__dataclass_fields__}
        hd_known = np.isfinite(get["hd95"])
        undefined[label] = int((~hd_known).sum())
        ones = np.ones(n)
        metrics[label] = {
            "dice": _interval(weights, get["dice"], ones),
            "iou": _interval(weights, get["iou"], ones),
            "dice_all": _interval(weights, 2 * get["intersection"], get["predicted"] + get["true"]),
            "hd95": _interval(weights, np.where(hd_known, get["hd95"], 0), hd_known.astype(float)),
            "lesion_sensitivity": _interval(weights, get["found"], get["found"] + get["missed"]),
            "lesion_precision": _interval(weights, get["found"], get["found"] + get["false"]),
        }
    known = patients is not None and any(patient is not None for patient in patients)
    unit = "mm" if in_mm else "pixels"
    return SegmentationEvaluation(tuple(classes), n, "patients" if known else "images", metrics, undefined, unit)


def _interval(weights: np.ndarray, above: np.ndarray, below: np.ndarray) -> dict[str, float | None]:
    """Returns sum(above) / sum(below) over images, and its 2.5 and 97.5 percentiles over the resamples."""
    bottom = weights @ below
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(bottom > 0, weights @ above / bottom, np.nan)
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (None, None)
    return {
        "value": float(values[0]),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
    }


def _cell(found: dict[str, float | None]) -> str:
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
