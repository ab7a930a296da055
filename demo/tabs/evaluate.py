"""The Evaluate tab: a model on the visitor's labelled images, from a folder to a threshold to a report."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.data import DatasetError, ImageDataset
from medmamba.evaluation import (
    Review,
    ReviewCancelled,
    match_classes,
    propose_classes,
    rename_classes,
)
from medmamba.imaging.load import ImageError
from medmamba.inference.predict import NotFiniteError
from medmamba.pretrained import PretrainedError
from medmamba.reporting import report_html, study_of

from ..advice import in_app, plain
from ..context import Context, Known
from ..html import Markup, callout, card, empty, error, folder_html, tag
from ..labelled import LabelledSet, take, without_paths
from ..options import BUSY, SAMPLE_SET
from ..sessions import Session
from ..store import Loaded
from ..theme import Html
from . import evaluation as pages
from .classify import pick_js
from .decide import curves_of
from .pdf import PdfButton, pdf_of

EMPTY = empty(
    "Evaluate a model on your images",
    "Give labelled images, or try the sample set. Metrics with intervals, mistakes and a report appear here.",
)
CANCELLED = empty("Cancelled", "Press Evaluate to start again.")
ALL = "All images"
SAMPLE_DATASET = "pneumoniamnist"
"""Dataset of the models that know the classes of the sample set."""
POLL_SECONDS = 0.4
PROBLEMS = (DatasetError, ImageError, PretrainedError, ConfigError, NotFiniteError, OSError, ValueError)
Updates = dict[Any, Any]


def build(context: Context, tab: gr.Tab) -> None:
    """Builds the tab and its events. Call inside `tab`."""
    limits = context.options.limits
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=4, min_width=300):
            model = gr.Dropdown(
                context.choices(None), value=context.default_title, label="Model", filterable=False,
                elem_id="mm-evaluate-model",
            )  # fmt: skip
            file = gr.File(
                label="Labelled images", show_label=False, file_count="multiple", type="filepath", height=132,
                elem_id="mm-labelled",
            )  # fmt: skip
            Html(
                tag(
                    '<p class="mm-hint">A zip with one folder per class, or images with a CSV file (columns path and '
                    "label; others such as age, sex or site become subgroups, patient joins images of a patient). Up "
                    "to {} MB and {:,} images. Deleted when you leave the page.</p>",
                    limits.zip_mb,
                    limits.zip_images,
                )
                + folder_html("mm-labelled", limits.zip_mb)
            )
            sample = gr.Button("Try the sample set: 64 chest X-rays", size="sm", elem_id="mm-evaluate-sample")
            seen = Html(visible=False, elem_id="mm-labelled-set")
            with gr.Group(visible=False, elem_classes="mm-mapping") as mapping:
                proposed = Html("", elem_id="mm-mapping")
                confirm = gr.Button("These are the same classes", size="sm", elem_id="mm-confirm")
            split = gr.Dropdown([ALL], value=ALL, label="Images", visible=False, filterable=False)
            columns = gr.CheckboxGroup([], label="Subgroups by", visible=False, elem_id="mm-by")
            run = gr.Button("Evaluate", variant="primary", size="lg", interactive=False, elem_id="mm-run-evaluate")
            stop = gr.Button("Cancel", visible=False, elem_id="mm-stop-evaluate")
        with gr.Column(scale=8, min_width=320):
            picture = Html(EMPTY, elem_id="mm-evaluation")
            with gr.Row(visible=False, elem_id="mm-evaluate-files") as files:
                report = gr.DownloadButton("Report (HTML)", size="sm")
                pdf = PdfButton("Report (PDF)", "mm-report-pdf")
                table = gr.DownloadButton("Each image (CSV)", size="sm")
            with gr.Group(visible=False) as point:
                wanted = gr.Dropdown([], label="Decide about", filterable=False, elem_id="mm-wanted")
                threshold = gr.Slider(0, 100, 50, step=0.5, label="Threshold (% probability)", buttons=[])
                prevalence = gr.Slider(
                    0.1, 99, 10, step=0.1, label="Prevalence where it is used (%)", buttons=[]
                )  # fmt: skip
                readout = Html("", elem_id="mm-point")
            matrix = Html(visible=False, js_on_load=pick_js("mm-cell", "click"), elem_id="mm-matrix")
            cell = Html(visible=False, elem_id="mm-cell-images")
            mistakes = Html(visible=False, elem_id="mm-mistakes")
            groups = Html(visible=False, elem_id="mm-subgroups")

    below = [files, point, matrix, cell, mistakes, groups]
    panel = [picture, report, table, wanted, threshold, prevalence, readout, run, stop, *below]
    given = [file, model, seen, mapping, proposed, split, columns, *panel]

    def hidden() -> Updates:
        return {part: gr.update(visible=False) for part in below}

    def described(session: Session, title: str) -> Updates:
        """Returns the set of the session as it is for a model: ready, to be confirmed, or not for it."""
        found = session.labelled
        nothing = {mapping: gr.update(visible=False), run: gr.update(interactive=False)}
        if found is None:
            return {**nothing, seen: gr.update(visible=False), split: gr.update(visible=False),
                    columns: gr.update(visible=False)}  # fmt: skip
        names = found.splits
        shown: Updates = {
            seen: gr.update(value=pages.set_html(found), visible=True),
            split: gr.update(choices=[ALL, *names], value="test" if "test" in names else ALL, visible=bool(names)),
            columns: gr.update(choices=list(found.columns), value=list(found.columns), visible=bool(found.columns)),
        }
        try:
            loaded = context.load(session, title)
            match_classes(found.index, loaded.config)
        except DatasetError as problem:
            names_ = propose_classes(found.index, loaded.config)
            if names_ is None:
                text = in_app(problem)
                shown[seen] = gr.update(value=pages.set_html(found) + other_classes(found, loaded, text), visible=True)
                return {**shown, **nothing}
            text = callout(
                "warn", "The model has other class names", "Evaluate only if these mean the same. A wrong match gives "
                "wrong figures without any sign of it."
            )  # fmt: skip
            return {**shown, **nothing, mapping: gr.update(visible=True), proposed: text + pages.mapping_html(names_)}
        except PROBLEMS as problem:
            return {**shown, **nothing, picture: error("The model could not be loaded", str(problem))}
        return {**shown, mapping: gr.update(visible=False), run: gr.update(interactive=True)}

    def upload(paths: list[str] | None, title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if not paths:
            return {file: gr.skip()}
        session.review = None
        try:
            session.labelled = take(session, paths, limits)
        except PROBLEMS as problem:
            text = in_app(plain(without_paths(problem, session), *map(Path, paths)))
            refused_ = error("These images cannot be used", text[:1].upper() + text[1:])
            return {**hidden(), **described(session, title), file: None, picture: refused_}
        return {**hidden(), picture: EMPTY, file: None, **described(session, title)}

    def take_sample(title: str, request: gr.Request) -> Updates:
        """Takes the sample set, and a model of its kind if there is one."""
        fitting = [name for name, known in context.known.items() if is_sample_model(known)]
        title = title if title in fitting else next(iter(fitting), title)
        return {**upload([str(SAMPLE_SET)], title, request), model: title}

    def confirmed(title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        found = session.labelled
        if found is None:
            return {mapping: gr.update(visible=False)}
        names = propose_classes(found.index, context.load(session, title).config)
        if names is not None:
            session.labelled = replace(found, index=rename_classes(found.index, names), renamed=names)
        return described(session, title)

    def chosen(title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        found = session.labelled
        if found is not None and found.renamed:  # confirmed for another model
            original = {theirs: own for own, theirs in found.renamed.items()}
            session.labelled = replace(found, index=_named_back(found.index, original), renamed={})
        return {**hidden(), picture: EMPTY, **described(session, title)}

    def idle() -> Updates:
        return {run: gr.update(visible=True), stop: gr.update(visible=False)}

    def refused() -> Updates:
        """Reports that the queue is full."""
        return {picture: error("The evaluation did not start", BUSY), **idle()}

    def begin(request: gr.Request) -> Updates:
        """Shows the waiting state immediately, before the queue."""
        session = context.sessions.of(request)
        session.stop_evaluating = threading.Event()
        if session.labelled is None:
            return {picture: gr.skip()}
        return {
            **hidden(),
            picture: pages.progress_html(0, len(session.labelled.index), 0),
            run: gr.update(visible=False),
            stop: gr.update(visible=True, interactive=True, value="Cancel"),
        }

    def measure(title: str, part: str, by: list[str], request: gr.Request) -> Iterator[Updates]:
        session = context.sessions.of(request)
        found, cancelled = session.labelled, session.stop_evaluating
        if found is None:
            yield {picture: error("No images yet", "Give labelled images or try the sample set first."), **idle()}
            return
        began, state = time.monotonic(), Progress(cancelled)
        try:
            loaded = context.load(session, title)
            index = found.index if part not in found.splits else found.index.split(part)
            groups_of = found.groups(by)
            job = context.service.review(loaded, index, groups_of, "all" if part == ALL else part, state)
            for _ in waiting(job, cancelled):
                session.used = time.monotonic()  # keeps the session alive
                yield {picture: pages.progress_html(state.done, len(index), time.monotonic() - began)}
            result = session.review = job.result()
            yield {
                picture: pages.summary_html(result, time.monotonic() - began),
                **point_controls(result, loaded),
                matrix: gr.update(value=pages.confusion_html(result), visible=result.task != "multilabel"),
                mistakes: gr.update(value=pages.mistakes_html(result), visible=True),
                groups: gr.update(
                    value=pages.subgroups_html(result.scored.subgroups), visible=result.scored.subgroups is not None
                ),
            }
            yield {**written(session, result, loaded, found), **idle()}
        except (ReviewCancelled, CancelledError):
            yield {picture: CANCELLED, **hidden(), **idle()}
        except (*PROBLEMS, ImportError) as problem:
            text = in_app(without_paths(problem, session))
            yield {picture: error("The evaluation failed", text), **hidden(), **idle()}
        finally:  # also if the visitor leaves
            cancelled.set()

    def point_controls(result: Review, loaded: Loaded) -> Updates:
        """Returns the controls of the threshold, at that of the model if it has one."""
        shown_classes = [row.name for row in result.scored.evaluation.per_class if 0 < row.support < len(result)]
        if not shown_classes:
            return {point: gr.update(visible=False)}
        start, cut = starting_point(loaded, shown_classes)
        share = round(100 * result.at([start], cut / 100).counts.prevalence, 1)
        share = min(max(share, 0.1), 99.0)
        return {
            point: gr.update(visible=True),
            wanted: gr.update(choices=shown_classes, value=start),
            threshold: cut,
            prevalence: share,
            readout: pages.point_html(result, start, cut, share),
        }

    def written(session: Session, result: Review, loaded: Loaded, found: LabelledSet) -> Updates:
        """Writes the files to download."""
        paths = session.new_download("evaluation.csv"), session.new_download("report.html")
        paths[0].write_text(without_paths(result.to_csv(), session), encoding="utf-8")
        study = study_of(result, loaded.model, loaded.folder)
        paths[1].write_text(without_paths(report_html(study), session), encoding="utf-8")
        session.pages["evaluate"] = paths[1]
        session.review = replace(result, signatures=result.signatures[:, :0])  # only the report needs them
        return {files: gr.update(visible=True), table: str(paths[0]), report: str(paths[1])}

    def moved(name: str, cut: float, share: float, request: gr.Request) -> Any:
        result = context.sessions.of(request).review
        if result is None or name not in result.classes:
            return gr.skip()
        return pages.point_html(result, name, min(max(float(cut), 0), 100), min(max(float(share), 0.1), 99))

    def renamed_class(name: str, cut: float, request: gr.Request) -> Updates:
        result = context.sessions.of(request).review
        if result is None or name not in result.classes:
            return {readout: gr.skip()}
        share = min(max(round(100 * result.at([name], float(cut) / 100).counts.prevalence, 1), 0.1), 99.0)
        return {prevalence: share, readout: pages.point_html(result, name, float(cut), share)}

    def open_cell(event: gr.EventData, request: gr.Request) -> Any:
        result = context.sessions.of(request).review
        try:
            i, j = (int(part) for part in str(event.index).split(","))
            assert result is not None
            true, said = result.classes[i], result.classes[j]
        except (ValueError, IndexError, AssertionError):  # not sent by the page
            return gr.skip()
        rows = result.cell(true, said)
        title = f"{true}, predicted {said}" if i != j else f"{true}, found"
        return gr.update(value=pages.gallery_html(result, rows, title, "Most confident first."), visible=True)

    def cancel(request: gr.Request) -> Any:
        context.sessions.of(request).stop_evaluating.set()
        return gr.update(value="Cancelling…", interactive=False)

    def offered(title: str, request: gr.Request) -> Any:
        """Offers the models trained meanwhile."""
        return gr.update(choices=context.choices(context.sessions.of(request)))

    private: dict[str, Any] = dict(api_visibility="private")
    quiet: dict[str, Any] = dict(private, show_progress="hidden", trigger_mode="always_last")
    running: dict[str, Any] = dict(private, concurrency_id="evaluate", concurrency_limit=1, show_progress="hidden")

    def start(event: Any) -> None:
        started = event(begin, None, panel, queue=False, show_progress="hidden", **private)
        done = started.then(measure, [model, split, columns], panel, **running)
        done.failure(refused, None, panel, queue=False, **private)

    tab.select(offered, model, model, **quiet)
    file.upload(upload, [file, model], given, show_progress_on=[picture], **private)
    start(run.click)
    start(sample.click(take_sample, model, given, show_progress_on=[picture], **private).then)
    confirm.click(confirmed, model, given, show_progress="hidden", **private)
    model.input(chosen, model, given, show_progress="hidden", **private)
    gr.on([threshold.input, prevalence.input], moved, [wanted, threshold, prevalence], readout, **quiet)
    wanted.input(renamed_class, [wanted, threshold], [prevalence, readout], **quiet)
    matrix.click(open_cell, None, cell, **quiet).then(
        None, js="() => document.querySelector('#mm-cell-images')?.scrollIntoView({block: 'nearest'})", **private
    )
    stop.click(cancel, None, stop, queue=False, **private)
    pdf.attach(context, lambda session: pdf_of(session.pages.get("evaluate")))


class Progress:
    """Counts the images that are done, for `review`; False once cancelled."""

    def __init__(self, cancelled: threading.Event) -> None:
        self.done = 0
        self.cancelled = cancelled

    def __call__(self, done: int) -> bool:
        self.done = done
        return not self.cancelled.is_set()


def waiting(job: Future[Any], cancelled: threading.Event) -> Iterator[None]:
    """Yields every `POLL_SECONDS` until a job has ended; cancels one that has not begun."""
    while True:
        try:
            job.exception(POLL_SECONDS)
            return
        except NotYet:
            if cancelled.is_set():
                job.cancel()
            yield


def is_sample_model(known: Known) -> bool:
    """Returns whether a model knows the classes of the sample set."""
    entry = known.facts.entry
    return entry is not None and entry.name == SAMPLE_DATASET


def starting_point(loaded: Loaded, classes: list[str]) -> tuple[str, float]:
    """Returns the class and the threshold in percent to begin with: the model's own, else 50 % of the last class."""
    for found in curves_of(loaded):
        if len(found.classes) == 1 and found.classes[0] in classes:
            return found.classes[0], round(200 * found.threshold) / 2
    return classes[-1], 50.0


def other_classes(found: LabelledSet, loaded: Loaded, text: str) -> Markup:
    """Renders that a model does not know the classes of a set."""
    return card(callout("error", f"{loaded.title} has other classes", text))


def _named_back(index: ImageDataset, names: dict[str, str]) -> ImageDataset:
    """Returns a set under its own class names again, without the note about others."""
    back = [names.get(name, name) for name in index.classes]
    return ImageDataset(index.records, back, index.reader, index.task, index.transform, index.name, index.notes[:-1])
