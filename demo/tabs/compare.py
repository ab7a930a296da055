"""The Compare tab: two models on the same images, where they differ, and whether one is better."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.data import DatasetError, ImageDataset
from medmamba.evaluation import ReviewCancelled

from ..advice import in_app, plain
from ..context import Context
from ..html import empty, error, folder_html, tag
from ..labelled import TABLES, take, without_paths
from ..options import BUSY, Limits
from ..sessions import Session
from ..theme import Html
from . import comparison as pages
from .classify import refuse
from .evaluate import PROBLEMS, Progress, waiting
from .evaluation import progress_html

EMPTY = empty(
    "Compare two models",
    "Give images here, or use those of Classify or Evaluate. Where the models differ appears here, largest first.",
)
CANCELLED = empty("Cancelled", "Press Compare to start again.")
Updates = dict[Any, Any]


def build(context: Context, tab: gr.Tab) -> None:
    """Builds the tab and its events. Call inside `tab`."""
    limits = context.options.limits
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=4, min_width=300):
            titles = context.titles(None)
            first = gr.Dropdown(
                context.choices(None), value=titles[0], label="First model", filterable=False, elem_id="mm-first"
            )
            second = gr.Dropdown(
                context.choices(None), value=titles[min(1, len(titles) - 1)], label="Second model", filterable=False,
                elem_id="mm-second",
            )  # fmt: skip
            file = gr.File(
                label="Images", show_label=False, file_count="multiple", type="filepath", height=132,
                elem_id="mm-compared",
            )  # fmt: skip
            Html(
                tag(
                    '<p class="mm-hint">Images; or a zip of class folders, or images with a CSV file, to see which '
                    "model is right more often. Up to {} MB and {:,} images.</p>",
                    limits.zip_mb,
                    limits.zip_images,
                )
                + folder_html("mm-compared", limits.zip_mb)
            )
            with gr.Row(elem_id="mm-take"):
                classified = gr.Button("Images of Classify", size="sm", elem_id="mm-take-classified")
                evaluated = gr.Button("Set of Evaluate", size="sm", elem_id="mm-take-evaluated")
            seen = Html(visible=False, elem_id="mm-compared-set")
            run = gr.Button("Compare", variant="primary", size="lg", interactive=False, elem_id="mm-run-compare")
            stop = gr.Button("Cancel", visible=False, elem_id="mm-stop-compare")
        with gr.Column(scale=8, min_width=320):
            picture = Html(EMPTY, elem_id="mm-comparison")
            table = gr.DownloadButton("Each image (CSV)", size="sm", visible=False, elem_id="mm-compare-file")
            differences = Html(visible=False, elem_id="mm-differences")

    panel = [picture, table, differences, run, stop]
    given = [file, seen, *panel]

    def hidden() -> Updates:
        return {table: gr.update(visible=False), differences: gr.update(visible=False)}

    def described(session: Session) -> Updates:
        images = session.compared
        if images is None:
            return {seen: gr.update(visible=False), run: gr.update(interactive=False)}
        name = images.name if isinstance(images, ImageDataset) else "Images"
        return {
            seen: gr.update(value=pages.set_html(images, name), visible=True),
            run: gr.update(interactive=True),
            picture: EMPTY,
            **hidden(),
        }

    def upload(paths: list[str] | None, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if not paths:
            return {file: gr.skip()}
        try:
            session.compared = images_of(session, paths, limits)
        except PROBLEMS as problem:
            text = in_app(plain(without_paths(problem, session), *map(Path, paths)))
            refused_ = error("These images cannot be used", text[:1].upper() + text[1:])
            return {**described(session), file: None, picture: refused_}
        return {**described(session), file: None}

    def from_classify(request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if not session.images:
            return {picture: error("No images in Classify", "Classify some images first, or give images here.")}
        session.compared = list(session.images)
        return described(session)

    def from_evaluate(request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if session.labelled is None:
            return {picture: error("No set in Evaluate", "Give a labelled set in Evaluate first, or here.")}
        session.compared = session.labelled.index
        return described(session)

    def idle() -> Updates:
        return {run: gr.update(visible=True), stop: gr.update(visible=False)}

    def refused() -> Updates:
        """Reports that the queue is full."""
        return {picture: error("The comparison did not start", BUSY), **idle()}

    def begin(request: gr.Request) -> Updates:
        """Shows the waiting state immediately, before the queue."""
        session = context.sessions.of(request)
        session.stop_comparing = threading.Event()
        return {
            **hidden(),
            picture: progress_html(0, 2 * len(session.compared or ()), 0),
            run: gr.update(visible=False),
            stop: gr.update(visible=True, interactive=True, value="Cancel"),
        }

    def compare(one: str, other: str, request: gr.Request) -> Iterator[Updates]:
        session = context.sessions.of(request)
        images, cancelled = session.compared, session.stop_comparing
        if not images:
            yield {picture: error("No images yet", "Give images here, or take those of another tab."), **idle()}
            return
        began, state = time.monotonic(), Progress(cancelled)
        try:
            if one == other:
                raise DatasetError("both menus name the same model; choose two")
            pair = context.load(session, one), context.load(session, other)
            job = context.service.compare(*pair, images, state)
            for _ in waiting(job, cancelled):
                session.used = time.monotonic()  # keeps the session alive
                yield {picture: progress_html(state.done, 2 * len(images), time.monotonic() - began)}
            found = job.result()
            path = session.new_download("comparison.csv")
            path.write_text(without_paths(found.to_csv(), session), encoding="utf-8")
            yield {
                picture: pages.summary_html(found),
                differences: gr.update(value=pages.differences_html(found), visible=True),
                table: gr.update(value=str(path), visible=True),
                **idle(),
            }
        except (ReviewCancelled, CancelledError):
            yield {picture: CANCELLED, **hidden(), **idle()}
        except PROBLEMS as problem:
            text = in_app(without_paths(problem, session))
            yield {picture: error("These models cannot be compared", text[:1].upper() + text[1:]), **hidden(), **idle()}
        finally:  # also if the visitor leaves
            cancelled.set()

    def cancel(request: gr.Request) -> Any:
        context.sessions.of(request).stop_comparing.set()
        return gr.update(value="Cancelling…", interactive=False)

    def offered(one: str, other: str, request: gr.Request) -> tuple[Any, Any]:
        """Offers the models trained meanwhile."""
        choices = context.choices(context.sessions.of(request))
        return gr.update(choices=choices), gr.update(choices=choices)

    private: dict[str, Any] = dict(api_visibility="private")
    tab.select(offered, [first, second], [first, second], show_progress="hidden", **private)
    file.upload(upload, file, given, show_progress_on=[picture], **private)
    classified.click(from_classify, None, given, show_progress="hidden", **private)
    evaluated.click(from_evaluate, None, given, show_progress="hidden", **private)
    started = run.click(begin, None, panel, queue=False, show_progress="hidden", **private)
    done = started.then(compare, [first, second], panel, concurrency_id="evaluate", show_progress="hidden", **private)
    done.failure(refused, None, panel, queue=False, **private)
    stop.click(cancel, None, stop, queue=False, **private)


def images_of(session: Session, uploads: Sequence[str], limits: Limits) -> ImageDataset | list[Path]:
    """Keeps uploaded images: a labelled set if there is a zip or CSV file, else files without labels.

    Raises:
        DatasetError: too many or too large, or a set that cannot be used.
    """
    if any(Path(name).suffix.lower() in (".zip", *TABLES) for name in uploads):
        return take(session, uploads, limits).index
    if problem := refuse(list(uploads), limits.batch_files, limits.image_mb):
        raise DatasetError(problem)
    return session.kept(uploads)
