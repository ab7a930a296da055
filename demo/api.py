"""Endpoints for programs, named and stable: `/models`, `/classify`, `/classify_batch`, `/explain`.

They share nothing with the pages but the models: each call brings its file, which is deleted some minutes later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.explain import methods
from medmamba.images import ImageError
from medmamba.predict import Failure
from medmamba.pretrained import PretrainedError

from .context import Context, Known
from .options import IMAGE_TYPES, NOTICE
from .service import Answer, View
from .store import Loaded
from .tabs.answers import batch_csv, plain
from .tabs.classify import refuse


def build(context: Context) -> None:
    """Adds the endpoints; to be called inside `gr.Blocks`. Their components are never shown."""
    limits = context.options.limits

    def accept(files: list[str]) -> None:
        if problem := refuse(files, limits.batch_files, limits.image_mb):
            raise ValueError(problem)

    def list_models() -> list[dict[str, Any]]:
        """The models on offer.

        Returns:
            One record per model: name, architecture, dataset, classes, licence, test figures with intervals, and how
            well it notices unusual images, where these are on record.
        """
        return [_model_record(title, context.known.get(title)) for title in context.titles(None)]

    def classify(
        file: str,
        model: str | None = None,
        frame: float | None = None,
        window_center: float | None = None,
        window_width: float | None = None,
    ) -> dict[str, Any]:
        """Classify one medical image. For research only; not a medical device.

        Args:
            file: PNG, JPEG, WebP, TIFF, BMP or DICOM image, 8 or 16 bit.
            model: a name from /models; default: the first.
            frame: of an image with several, counted from 0.
            window_center: for grey images, in the units of the file (Hounsfield for CT).
            window_width: with window_center.

        Returns:
            label, probability, probabilities by class, calibrated, unsure, unusual, notes on the file, model, backend,
            milliseconds and the notice.
        """
        with told(file):
            accept([file])
            view = _view(frame, window_center, window_width)
            loaded = context.load(None, model)
            return _record(context.service.classify(loaded.source, Path(file), view), loaded)

    def classify_batch(files: list[str], model: str | None = None) -> tuple[list[dict[str, Any]], str]:
        """Classify several images, each as /classify does; a file that cannot be read gets an error instead.

        Args:
            files: images.
            model: a name from /models; default: the first.

        Returns:
            One record per file in order, and a table as CSV text.
        """
        with told(*(files or [])):
            accept(files)
            loaded = context.load(None, model)
            paths = [Path(name) for name in files or []]
            results = context.service.classify_files(loaded.source, paths)
            records = [
                {"file": path.name, "error": plain(result.error, path)}
                if isinstance(result, Failure)
                else {"file": path.name, **_record(result, loaded)}
                for path, result in zip(paths, results, strict=True)
            ]
            return records, batch_csv(paths, results, loaded.config.labels)

    def explain(
        file: str,
        request: gr.Request,
        model: str | None = None,
        method: str = "integrated_gradients",
        target: str | None = None,
        check: bool = False,
    ) -> tuple[dict[str, Any], str, str]:
        """Which pixels speak for a class. For research only; not a medical device.

        Args:
            file: an image, as for /classify.
            model: a name from /models; default: the first.
            method: one of {methods}, or "gradcam:stage3.scan" for a layer.
            target: name of the class; default: the model's answer.
            check: also test whether the map says what the model does; several times slower.

        Returns:
            The record (settings, diagnostics, checks), the overlay as PNG, the maps as NumPy archive.
        """
        with told(file):
            accept([file])
            loaded = context.load(None, model)
            *_, found = context.service.explain(loaded.source, Path(file), View(), [method], target or None, check)
            target_file = context.sessions.of(request).new_download("explanation.png")
            saved = [str(found.explanations[0].save(target_file.with_suffix(suffix))) for suffix in (".png", ".npz")]
            return {**found.to_dict(), "notice": NOTICE}, saved[0], saved[1]

    with gr.Row(visible=False):
        name = gr.Textbox(label="model")
        file = gr.File(label="file", file_types=IMAGE_TYPES, type="filepath")
        files = gr.File(label="files", file_types=IMAGE_TYPES, type="filepath", file_count="multiple")
        frame, center, width = (gr.Number(label=label, value=None) for label in ("frame", "center", "width"))
        method = gr.Textbox(label="method", value="integrated_gradients", info="of attribution")
        target, check = gr.Textbox(label="target"), gr.Checkbox(label="check")
        record, text = gr.JSON(label="record"), gr.Textbox(label="csv")
        picture, maps = gr.File(label="overlay"), gr.File(label="maps")

    def endpoint(function: Callable[..., Any], inputs: list[Any], outputs: list[Any], queue: str) -> None:
        trigger = gr.Button(visible=False)
        text = (inspect.getdoc(function) or "").replace("{methods}", ", ".join(methods()))
        trigger.click(function, inputs, outputs, api_name=function.__name__, api_description=text, concurrency_id=queue)

    list_models.__name__ = "models"
    endpoint(list_models, [], [record], "classify")
    endpoint(classify, [file, name, frame, center, width], [record], "classify")
    endpoint(classify_batch, [files, name], [record, text], "classify")
    endpoint(explain, [file, name, method, target, check], [record, picture, maps], "explain")


@contextmanager
def told(*uploads: str | None) -> Iterator[None]:
    """Errors become those that a client shows, without the server's paths."""
    try:
        if not uploads or not all(uploads):
            raise ValueError("give a file")
        yield
    except (ImageError, PretrainedError, ConfigError, ImportError, OSError, ValueError) as error:
        message = plain(error, *(Path(name) for name in uploads if name))
        raise gr.Error(message, print_exception=False) from None


def _view(frame: float | None, center: float | None, width: float | None) -> View:
    if (center is None) != (width is None):
        raise ValueError("give window_center and window_width, or neither")
    window = None if center is None or width is None else (float(center), float(width))
    return View(None if frame is None else int(frame), window)


def _record(found: Answer, loaded: Loaded) -> dict[str, Any]:
    prediction = found.prediction
    return {
        "label": prediction.label,
        "probability": prediction.probability,
        "probabilities": dict(prediction.top),
        "calibrated": loaded.calibration is not None,
        "unsure": found.unsure,
        "unusual": found.unusual,
        "notes": prediction.image_notes,
        "model": loaded.title,
        "architecture": loaded.config.architecture,
        "backend": loaded.backend,
        "device": str(loaded.device),
        "milliseconds": round(found.milliseconds, 1),
        "notice": NOTICE,
    }


def _model_record(title: str, known: Known | None) -> dict[str, Any]:
    if known is None:
        return {"name": title}
    facts = known.facts
    return {
        "name": title,
        "architecture": facts.config.architecture,
        "dataset": facts.dataset,
        "classes": facts.config.labels,
        "licence": facts.terms.licence,
        "split": facts.split,
        "figures": facts.evaluations[facts.split].to_dict()["overall"] if facts.split else {},
        "unusual": dict(known.unusual.measured) if known.unusual else {},
    }
