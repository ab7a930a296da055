"""API endpoints `/segment` and `/detect`, where a model for masks or boxes is offered; see `demo.api`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.serving.record import finite

from .api import checked, client_errors, view_of
from .api_docs import documented, example_of
from .context import Context
from .dense import DenseModels, Outlined
from .options import NOTICE
from .tabs.classify import refuse
from .tabs.segment import save

_VIEW = ("frame", "window_center", "window_width")
ENDPOINTS = {
    "segment": ("file", "model", "threshold", "flips", *_VIEW),
    "detect": ("file", "model", "score", *_VIEW),
}
"""Parameter names of each endpoint, in order."""
KINDS = {"segmentation": "segment", "detection": "detect"}
"""Task of a model to its endpoint."""


def build(context: Context, models: DenseModels) -> None:
    """Adds an endpoint for each task that a model is offered for, with invisible components.

    Call inside `gr.Blocks`.
    """
    limits = context.options.limits
    fit = {kind: [title for title in models.titles if models.about(title).facts.task == kind] for kind in KINDS}

    def run(kind: str, file: str, model: str | None, *rest: Any, **options: Any) -> Outlined:
        if problem := refuse([file], 1, limits.image_mb):
            raise ValueError(problem)
        level, frame, center, width = rest
        fitting = fit[kind]
        title = model or fitting[0]
        if title not in fitting:
            raise ValueError(f"no model {title!r} for {kind} here; available: {', '.join(fitting)}")
        return models.predict(title, Path(file), view_of(frame, center, width), level, **options)

    def record_of(found: Outlined) -> dict[str, Any]:
        said = {**found.found.to_dict(), "model": found.dense.title, "milliseconds": found.milliseconds}
        return finite({**said, "threshold": found.threshold, "notice": NOTICE})

    def segment(
        file: str,
        request: gr.Request,
        model: str | None = None,
        threshold: float | None = None,
        flips: bool = False,
        frame: float | None = None,
        window_center: float | None = None,
        window_width: float | None = None,
    ) -> tuple[dict[str, Any], str, str, str | None]:
        """Segment one medical image. For research only; not a medical device.

        Args:
            file: PNG, JPEG, WebP, TIFF, BMP or DICOM image, 8 or 16 bit, detected by content.
            model: one of {models}; default: the first that segments.
            threshold: probability from which a pixel counts, 0 to 1; default: that of the model.
            flips: average over the image and its reflections, in four times the time.
            frame: frame of a multi-frame image, counted from 0.
            window_center: for grey images, in the units of the file (Hounsfield for CT).
            window_width: with window_center.

        Returns:
            The record (classes with area in pixels and, where the file has a pixel spacing, in mm²; regions with area,
            mean probability and box; notes), the mask as PNG, the overlay as PNG, and for a DICOM image a DICOM
            Segmentation, else null.
        """
        with client_errors(file):
            given = (threshold, frame, window_center, window_width)
            found = run("segmentation", file, model, *given, flips=bool(flips))
            written = save(found, context.sessions.of(request), Path(file))
            dicom = written.get("dicom")
            return record_of(found), str(written["mask"]), str(written["overlay"]), str(dicom) if dicom else None

    def detect(
        file: str,
        request: gr.Request,
        model: str | None = None,
        score: float | None = None,
        frame: float | None = None,
        window_center: float | None = None,
        window_width: float | None = None,
    ) -> tuple[dict[str, Any], str]:
        """Detect objects in one medical image. For research only; not a medical device.

        Args:
            file: PNG, JPEG, WebP, TIFF, BMP or DICOM image, 8 or 16 bit, detected by content.
            model: one of {models}; default: the first that detects.
            score: from which a box is reported, 0 to 1; default: that of the model.
            frame: frame of a multi-frame image, counted from 0.
            window_center: for grey images, in the units of the file (Hounsfield for CT).
            window_width: with window_center.

        Returns:
            The record (boxes with label, score and left, top, right, bottom in pixels; counts by class; notes), and the
            image with the boxes as PNG.
        """
        with client_errors(file):
            found = run("detection", file, model, score, frame, window_center, window_width)
            return record_of(found), str(save(found, context.sessions.of(request), Path(file))["overlay"])

    def names() -> gr.Textbox:
        return checked(gr.Textbox(label="model"), "model", str)

    with gr.Row(visible=False):
        file = example_of(checked(gr.File(label="file", type="filepath"), "file"), "image.png")
        threshold = checked(gr.Number(label="threshold", value=None), "threshold", float)
        score = checked(gr.Number(label="score", value=None), "score", float)
        flips = checked(gr.Checkbox(label="flips"), "flips", bool)
        view = [checked(gr.Number(label=label, value=None), label, float) for label in _VIEW]
        record, mask = gr.JSON(label="record"), gr.File(label="mask")
        overlay, dicom = gr.File(label="overlay"), gr.File(label="dicom")
        inputs = {"segment": [file, names(), threshold, flips, *view], "detect": [file, names(), score, *view]}

    outputs: dict[str, list[Any]] = {"segment": [record, mask, overlay, dicom], "detect": [record, overlay]}
    functions: dict[str, Callable[..., Any]] = {"segment": segment, "detect": detect}
    for kind, name in KINDS.items():
        if fit[kind]:
            text = documented(functions[name], inputs[name], models=", ".join(fit[kind]))
            gr.Button(visible=False).click(
                functions[name], inputs[name], outputs[name], api_name=name, api_description=text,
                concurrency_id="classify",
            )  # fmt: skip
