"""Metrics of detection: COCO's average precision by pycocotools, with bootstrap intervals."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.extras import require
from .bootstrap import bootstrap_weights, resampling_units

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (N, 4), scores (N,), labels (N,)


@dataclass
class DetectionEvaluation:
    """Metrics of a detector on one split.

    Attributes:
        classes: names.
        n: number of images.
        units: what the bootstrap resampled: "patients" or "images".
        metrics: "map" (mean over IoU .50 to .95 and classes), "map50", and "map50 NAME" for each class; each
            {"value", "low", "high"} with a 95 % interval, None where it is not defined.
        counts: true boxes of each class.
    """

    classes: tuple[str, ...]
    n: int
    units: str
    metrics: dict[str, dict[str, float | None]]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for JSON."""
        import dataclasses

        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DetectionEvaluation:
        """Reads what `to_dict` wrote."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__} | {"classes": tuple(data["classes"])})

    def table(self) -> str:
        """Returns the metrics as a Markdown table with 95 % intervals."""
        rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
        for name, found in self.metrics.items():
            value, low, high = found["value"], found["low"], found["high"]
            interval = "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            rows.append(f"| {name} | {'–' if value is None else f'{value:.3f}'} | {interval} |")
        return "\n".join(rows)


def evaluate_boxes(
    found: Sequence[Boxes],
    true: Sequence[tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str],
    patients: Sequence[str | None] | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> DetectionEvaluation:
    """Compares detected with true boxes, as COCO does (at most 100 a class and image count, all sizes).

    Args:
        found: for each image boxes as (left, top, right, bottom), scores and labels from 0.
        true: for each image boxes and labels.
        classes: names.
        patients: of the images, None where unknown.
        resamples: of the bootstrap; 0: no intervals.

    Raises:
        ValueError: no images, or another number of results.
        ImportError: pycocotools is not installed; the message holds the command that installs it.
    """
    if not true or len(found) != len(true):
        raise ValueError(f"expected the same number of images, at least one; got {len(found)} and {len(true)}")
    require("pycocotools", "metrics of detection")
    evaluator = _evaluated(found, true, classes)
    n = len(true)
    rows = [_precision(evaluator, np.arange(n), len(classes))]
    unit_of, strata = resampling_units(np.zeros(n, dtype=np.int64), patients)
    for weights in bootstrap_weights(unit_of, strata, resamples, seed) if resamples else ():
        rows += [_precision(evaluator, np.repeat(np.arange(n), row.astype(int)), len(classes)) for row in weights]
    names = ["map", "map50", *(f"map50 {label}" for label in classes)]
    metrics = {name: _interval(np.array([row[i] for row in rows])) for i, name in enumerate(names)}
    labels = np.concatenate([label for _, label in true]) if true else np.zeros(0)
    counts = {label: int((labels == i).sum()) for i, label in enumerate(classes)}
    known = patients is not None and any(patient is not None for patient in patients)
    return DetectionEvaluation(tuple(classes), n, "patients" if known else "images", metrics, counts)


def _evaluated(found: Sequence[Boxes], true: Sequence[Any], classes: Sequence[str]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    results: Any = []
    for image, ((boxes, scores, labels), (true_boxes, true_labels)) in enumerate(zip(found, true, strict=True)):
        for box, label in zip(true_boxes.tolist(), true_labels.tolist(), strict=True):
            size = [box[2] - box[0], box[3] - box[1]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [*box[:2], *size],
                    "area": size[0] * size[1],
                    "iscrowd": 0,
                }
            )
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            bbox = [*box[:2], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": int(label), "bbox": bbox, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its timings
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(true))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        results = truth.loadRes(results) if results else _none_found(truth)
        evaluator = COCOeval(truth, results, "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [100]
        evaluator.evaluate()
    return evaluator


def _none_found(truth: Any) -> Any:
    from pycocotools.coco import COCO

    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _precision(evaluator: Any, images: np.ndarray, classes: int) -> list[float]:
    """Returns map, map50 and the map50 of each class over a sample of the images, NaN where there is no true box."""
    total = len(evaluator.params.imgIds)
    sample = copy.copy(evaluator)
    sample.evalImgs = [evaluator.evalImgs[k * total + i] for k in range(classes) for i in images]
    # `accumulate` looks images up by their numbers, so that each draw needs one of its own.
    sample.params = copy.copy(evaluator.params)
    sample.params.imgIds = list(range(len(images)))
    sample._paramsEval = sample.params
    with contextlib.redirect_stdout(io.StringIO()):
        sample.accumulate(sample.params)
    precision = sample.eval["precision"][:, :, :, 0, 0]  # (IoU, recall, class)
    precision = np.where(precision < 0, np.nan, precision)
    by_class = precision[0].mean(0)  # (class,), at IoU .50
    known = ~np.isnan(by_class)
    if not known.any():
        return [float("nan")] * (2 + classes)
    return [float(precision[:, :, known].mean()), float(by_class[known].mean()), *map(float, by_class)]


def _interval(values: np.ndarray) -> dict[str, float | None]:
    if not np.isfinite(values[0]):
        return {"value": None, "low": None, "high": None}
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn):
        return {"value": float(values[0]), "low": None, "high": None}
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    return {"value": float(values[0]), "low": low, "high": high}
