"""Stable API endpoints: `/models`, `/classify`, `/classify_batch`, `/explain`, `/evaluate`.

They share only the models with the pages: each call uploads its own file, which is deleted some minutes later. Every
field is validated, errors name the field and the reason, and responses contain no NaN.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.data import DatasetError
from medmamba.explain import methods
from medmamba.imaging.load import ImageError
from medmamba.inference.predict import Failure
from medmamba.pretrained import PretrainedError
from medmamba.serving.record import Server, check_view, classification, finite

from .advice import for_programs, of_problem, plain
from .api_docs import documented, example_of
from .context import Context, Known
from .labelled import take, without_paths
from .options import NOTICE
from .service import Answer, View
from .store import Loaded
from .tabs.answers import batch_csv
from .tabs.classify import refuse

_VIEW = ("frame", "window_center", "window_width")
ENDPOINTS = {
    "models": (),
    "classify": ("file", "model", *_VIEW, "anyway"),
    "classify_batch": ("files", "model", "anyway"),
    "explain": ("file", "model", "method", "target", "check", *_VIEW),
    "evaluate": ("files", "model", "by"),
}
"""Parameter names of each endpoint, in order."""


def build(context: Context) -> None:
    """Adds the endpoints, with invisible components. Call inside `gr.Blocks`."""
    limits = context.options.limits

    def accept(files: list[str]) -> None:
        if problem := refuse(files, limits.batch_files, limits.image_mb):
            raise ValueError(problem)

    def list_models() -> list[dict[str, Any]]:
        """List the available models.

        Returns:
            One record per model: name, architecture, dataset, classes, licence, test results with intervals, and
            out-of-distribution detection results, where available.
        """
        return finite([_model_record(title, context.known.get(title)) for title in context.titles(None)])

    def classify(
        file: str,
        model: str | None = None,
        frame: float | None = None,
        window_center: float | None = None,
        window_width: float | None = None,
        anyway: bool = False,
    ) -> dict[str, Any]:
        """Classify one medical image. For research only; not a medical device.

        Args:
            file: PNG, JPEG, WebP, TIFF, BMP or DICOM image, 8 or 16 bit, detected by content.
            model: a name from /models; default: the first.
            frame: frame of a multi-frame image, counted from 0.
            window_center: for grey images, in the units of the file (Hounsfield for CT).
            window_width: with window_center.
            anyway: answer also where the image is unlike all that the model knows, which else is refused.

        Returns:
            label, probability, probabilities by class, calibrated, unsure, unusual (out of distribution), unusual_level
            ("near" or "far"), refused (no label, because it is far), suggestion (the model to try then), window (level
            and width as used), better_window (if that hides most of the image), warnings (that affect how reliable
            the answer is), notes on the file, model, backend, milliseconds and the notice.
        """
        with client_errors(file):
            accept([file])
            view = view_of(frame, window_center, window_width)
            loaded = context.load(None, model)
            found = context.service.classify(loaded.source, Path(file), view)
            return _answered(found, loaded, context, Path(file), view, bool(anyway))

    def classify_batch(
        files: list[str], model: str | None = None, anyway: bool = False
    ) -> tuple[list[dict[str, Any]], str]:
        """Classify several images like /classify; files that cannot be read get an error instead.

        Args:
            files: images.
            model: a name from /models; default: the first.
            anyway: as for /classify.

        Returns:
            One record per file, in order, and a table as CSV text.
        """
        with client_errors(*(files or [])):
            accept(files)
            loaded = context.load(None, model)
            paths = [Path(name) for name in files or []]
            results = context.service.classify_files(loaded.source, paths, program=True)
            records = [
                {"file": path.name, "error": for_programs(plain(result.error, path))}
                if isinstance(result, Failure)
                else {"file": path.name, **_answered(result, loaded, context, path, None, bool(anyway))}
                for path, result in zip(paths, results, strict=True)
            ]
            return records, batch_csv(paths, results, loaded.config.labels, bool(anyway))

    def explain(
        file: str,
        request: gr.Request,
        model: str | None = None,
        method: str = "integrated_gradients",
        target: str | None = None,
        check: bool = False,
        frame: float | None = None,
        window_center: float | None = None,
        window_width: float | None = None,
    ) -> tuple[dict[str, Any], str, str]:
        """Compute pixel attributions for a class. For research only; not a medical device.

        Args:
            file: an image, as for /classify.
            model: a name from /models; default: the first.
            method: one of {methods}, or "gradcam:stage3.scan" for a layer.
            target: class name; default: the predicted class.
            check: also test whether the map is faithful to the model; several times slower.
            frame: as for /classify.
            window_center: as for /classify.
            window_width: with window_center.

        Returns:
            The record (settings, diagnostics, checks), the overlay as PNG, the maps as NumPy archive (.npz).
        """
        with client_errors(file):
            accept([file])
            view = view_of(frame, window_center, window_width)
            loaded = context.load(None, model)
            named = [method or "integrated_gradients"]
            *_, found = context.service.explain(loaded.source, Path(file), view, named, target or None, bool(check))
            target_file = context.sessions.of(request).new_download("explanation.png")
            saved = [str(found.explanations[0].save(target_file.with_suffix(suffix))) for suffix in (".png", ".npz")]
            return finite({**found.to_dict(), "notice": NOTICE}), saved[0], saved[1]

    def evaluate(
        files: list[str], request: gr.Request, model: str | None = None, by: str | None = None
    ) -> tuple[dict[str, Any], str]:
        """Evaluate a model on labelled images. For research only; not a medical device.

        Args:
            files: a zip of class folders; or images and a CSV file with the columns path and label.
            model: a name from /models; default: the first.
            by: columns of the CSV file whose groups are compared, separated by commas; default: none.

        Returns:
            Metrics with intervals, overall and by class, the confusion matrix, the groups, files that could not be read
            and the number of images that look unusual; and a table of all images as CSV text.
        """
        with client_errors(*(files or [])):
            session = context.sessions.of(request)
            session.labelled = None
            try:
                found = take(session, files, limits)
            except (DatasetError, OSError) as problem:
                raise ValueError(without_paths(problem, session)) from problem
            wanted = [part.strip() for part in (by or "").split(",") if part.strip()]
            if unknown := [part for part in wanted if part not in found.columns]:
                raise ValueError(f"by: no column {unknown[0]!r} with groups; there are: {', '.join(found.columns)}")
            loaded = context.load(None, model)
            result = context.service.review(loaded, found.index, found.groups(wanted)).result()
            failures = [
                {"file": name, "error": for_programs(without_paths(text, session))} for name, text in result.failures
            ]
            unusual = None if result.unusual is None else int(result.unusual.sum())
            record = {**result.scored.to_dict(), "unusual": unusual, "failures": failures, "notice": NOTICE}
            return finite(record), without_paths(result.to_csv(), session)

    with gr.Row(visible=False):
        name = checked(gr.Textbox(label="model"), "model", str)
        file = example_of(checked(gr.File(label="file", type="filepath"), "file"), "image.png")
        several: dict[str, Any] = {"label": "files", "type": "filepath", "file_count": "multiple"}
        files = example_of(checked(gr.File(**several), "files"), "image.png", "scan.dcm")
        labelled = example_of(checked(gr.File(**several), "files"), "labelled.zip")
        frame, center, width = (checked(gr.Number(label=label, value=None), label, float) for label in _VIEW)
        method = checked(gr.Textbox(label="method", value="integrated_gradients", info="of attribution"), "method", str)
        by = checked(gr.Textbox(label="by"), "by", str)
        target = checked(gr.Textbox(label="target"), "target", str)
        check = checked(gr.Checkbox(label="check"), "check", bool)
        anyway = checked(gr.Checkbox(label="anyway"), "anyway", bool)
        record, text = gr.JSON(label="record"), gr.Textbox(label="csv")
        picture, maps = gr.File(label="overlay"), gr.File(label="maps")

    def endpoint(function: Callable[..., Any], inputs: list[Any], outputs: list[Any], queue: str) -> None:
        trigger = gr.Button(visible=False)
        text = documented(function, inputs, methods=", ".join(methods()))
        trigger.click(function, inputs, outputs, api_name=function.__name__, api_description=text, concurrency_id=queue)

    view = [frame, center, width]
    list_models.__name__ = "models"
    endpoint(list_models, [], [record], "classify")
    endpoint(classify, [file, name, *view, anyway], [record], "classify")
    endpoint(classify_batch, [files, name, anyway], [record, text], "classify")
    endpoint(evaluate, [labelled, name, by], [record, text], "evaluate")
    endpoint(explain, [file, name, method, target, check, *view], [record, picture, maps], "explain")


def checked(component: Any, name: str, kind: type | None = None) -> Any:
    """Makes a component reject input of another type with an error that names the field; returns it.

    Args:
        kind: str, bool or float; None: whatever the component accepts.
    """
    preprocess = component.preprocess

    def strict(payload: Any) -> Any:
        right = payload is None or kind is None or isinstance(payload, (int, float) if kind is float else kind)
        if kind is float and (isinstance(payload, bool) or (right and payload is not None and not _is_finite(payload))):
            right = False
        if not right:
            words = {str: "text", bool: "true or false", float: "a finite number"}
            raise gr.Error(f"{name} must be {words[kind] if kind else 'valid'}", print_exception=False)
        try:
            return preprocess(payload)
        except gr.Error:
            raise
        except Exception:
            raise gr.Error(f"{name} is not a valid value for this field", print_exception=False) from None

    component.preprocess = strict
    return component


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


@contextmanager
def client_errors(*uploads: str | None) -> Iterator[None]:
    """Converts errors to `gr.Error` with a message for API clients, without paths of the server."""
    paths = [Path(name) for name in uploads if name]
    try:
        if not uploads or not all(uploads):
            raise ValueError("file is required")
        yield
    except gr.Error:
        raise
    except (ImageError, PretrainedError, ConfigError, ImportError, OSError, ValueError) as error:
        message = for_programs(plain(of_problem(error, program=True), *paths))
        raise gr.Error(message or type(error).__name__, print_exception=False) from None
    except Exception as error:
        logging.getLogger(__name__).exception("API call failed")
        message = f"internal error ({type(error).__name__}), caused by the file or the server"
        raise gr.Error(message, print_exception=False) from None


def view_of(frame: float | None, center: float | None, width: float | None) -> View:
    """Builds a view from fields of a request, after checking them."""
    return View(*check_view(frame, center, width))


def _record(found: Answer, loaded: Loaded, refused: bool = False, suggestion: str | None = None) -> dict[str, Any]:
    about = Server(loaded.title, loaded.config, loaded.calibrated, loaded.backend, str(loaded.device))
    return classification(found.prediction, found.how, found.milliseconds, about, refused, suggestion)


def _answered(
    found: Answer, loaded: Loaded, context: Context, path: Path, view: View | None, anyway: bool
) -> dict[str, Any]:
    """Returns the record of an answer or, for an image that is far, of a refusal with the model to try."""
    if not found.refused or anyway:
        return _record(found, loaded)
    suggestion = context.suggest(loaded.title, path, view)
    return _record(found, loaded, True, suggestion.name if suggestion else None)


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
