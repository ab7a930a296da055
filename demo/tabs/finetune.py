"""The Fine-tune tab: trains a model on a zip of class folders, with live progress."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.cards import read_facts
from medmamba.config import ConfigError
from medmamba.data import DatasetError
from medmamba.data.grouping import FOLDER, table_columns
from medmamba.imaging.load import ImageError
from medmamba.metrics import Evaluation
from medmamba.pretrained import PretrainedError

from ..charts import Line, chart
from ..context import Context
from ..examples import held_out
from ..gpu import ZERO_GPU
from ..html import (
    NOTHING,
    Markup,
    callout,
    card,
    empty,
    error,
    folder_html,
    tag,
)
from ..jobs import Job, JobError, Progress, plan
from ..options import BUSY, SAMPLE_SET
from ..sessions import Session
from ..theme import Html
from . import answers
from .classify import ClassifyTab
from .patients import BY_COLUMN, BY_FOLDER, BY_NAME, RULES, set_html
from .results import results_html

EMPTY = empty(
    "Train a model on your own classes",
    "Upload a zip with one folder of images per class, or use the sample dataset, and follow the training here.",
)
CANCELLED = empty("Cancelled", "Nothing was saved. Press Fine-tune to start again.")
POLL_SECONDS = 0.7
FEW_IMAGES = 100
"""Below this number of test images, results are shown with a warning."""
CHOSEN_BY_VAL = (
    "These images were used to select the best epoch and to fit the calibration, so the results are optimistic. Add a "
    "test folder for an unbiased estimate."
)
SAME_PATIENT = (
    "Patients are not known, so the split is by image, and results may be too optimistic. If file names, folders or a "
    "CSV file tell the patient, say so under “Which images are of one patient”."
)
TABLE_MB = 20
Updates = dict[Any, Any]


def build(context: Context, classify: ClassifyTab, tabs: gr.Tabs) -> None:
    """Builds the tab and its events. Call inside `gr.Tab`."""
    limits = context.options.limits
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=4, min_width=300):
            file = gr.File(
                label="Zip of class folders", show_label=False, file_types=[".zip"], type="filepath", height=132,
                elem_id="mm-zip",
            )  # fmt: skip
            Html(
                tag(
                    '<p class="mm-hint">A .zip with one folder per class, or with train, val and test folders '
                    "that contain them. Up to {} MB and {:,} images. Deleted when you leave the page.</p>",
                    limits.zip_mb,
                    limits.zip_images,
                )
                + folder_html("mm-zip", limits.zip_mb)
            )
            sample = gr.Button("Use the sample dataset: 64 chest X-rays", size="sm", elem_id="mm-sample")
            seen = Html(visible=False, elem_id="mm-set")
            with gr.Accordion(
                "Which images are of one patient", open=False, visible=False, elem_id="mm-patients"
            ) as patients:
                rule = gr.Radio(RULES, value=BY_NAME, label="Patients are told by", elem_id="mm-patient-rule")
                pattern = gr.Textbox(
                    label="Pattern (regular expression)", placeholder=r"^(patient\d+)_", max_lines=1, max_length=200,
                    info="What the first pair of brackets matches is the patient. All images of a patient then stay in "
                    "one split.",
                )  # fmt: skip
                table = gr.File(
                    label="CSV with a row for each image", file_types=[".csv", ".tsv"], type="filepath", height=110,
                    visible=False, elem_id="mm-patient-table",
                )  # fmt: skip
                column = gr.Dropdown([], label="Column of the patient", visible=False, elem_id="mm-patient-column")
                apply = gr.Button("Apply", size="sm", elem_id="mm-apply-pattern")
            base = gr.Dropdown(
                context.starts,
                value=first_base(context),
                label="Start from",
                filterable=False,
                elem_id="mm-base",
            )
            epochs = gr.Slider(
                1, limits.epochs, min(10, limits.epochs), step=1, label="Epochs", buttons=[],
                info=f"Stops after {limits.train_minutes:g} minutes at the latest and keeps the best epoch so far.",
            )  # fmt: skip
            run = gr.Button("Fine-tune", variant="primary", size="lg", interactive=False, elem_id="mm-run-train")
            stop = gr.Button("Cancel", visible=False, elem_id="mm-stop-train")
        with gr.Column(scale=8, min_width=320):
            picture = Html(EMPTY, elem_id="mm-training")
            with gr.Row(visible=False) as done:
                use = gr.Button("Try it in Classify", variant="primary", elem_id="mm-try")
                download = gr.DownloadButton("Download the model", elem_id="mm-download-model")

    def take(path: str | None, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        hidden = {seen: gr.update(visible=False), run: gr.update(interactive=False), patients: gr.update(visible=False)}
        if not path:
            return hidden
        session.data = None
        session.uploads.add(Path(path))
        target = session.new_folder() / Path(path).name
        try:
            shutil.copyfile(path, target)
            found = plan(target, limits)
        except (DatasetError, ImageError, OSError, ValueError) as problem:
            shutil.rmtree(target.parent, ignore_errors=True)
            shown = error("This dataset cannot be used", answers.reason(str(problem), target))
            # Empties the drop zone, so that another file can be dropped.
            return {**hidden, file: None, picture: shown, done: gr.update(visible=False)}
        session.data = found
        return {
            seen: gr.update(value=set_html(found), visible=True),
            run: gr.update(interactive=True),
            patients: gr.update(visible=True, open=False),
            pattern: "",
            rule: BY_NAME,
            **rule_parts(BY_NAME),
            picture: EMPTY,
            done: gr.update(visible=False),
        }

    def rule_parts(chosen: str) -> Updates:
        """Shows what a rule for patients needs."""
        return {
            pattern: gr.update(visible=chosen == BY_NAME),
            table: gr.update(visible=chosen == BY_COLUMN, value=None),
            column: gr.update(visible=False, choices=[], value=None),
        }

    def take_table(path: str | None, request: gr.Request) -> Updates:
        """Offers the columns of an uploaded CSV file."""
        session = context.sessions.of(request)
        session.patients = None
        if not path:
            return {column: gr.update(visible=False)}
        session.uploads.add(Path(path))
        kept = session.new_folder() / Path(path).name
        try:
            if Path(path).stat().st_size > TABLE_MB * 2**20:
                raise DatasetError(f"the file is larger than {TABLE_MB} MB; leave columns out")
            shutil.copyfile(path, kept)
            names = table_columns(kept)
        except (DatasetError, OSError, ValueError) as problem:
            shown = callout("error", "This file cannot be used", answers.reason(str(problem), kept))
            return {column: gr.update(visible=False), seen: (set_html(session.data) if session.data else "") + shown}
        session.patients = kept
        likely = next((name for name in names if "patient" in name.lower()), names[-1])
        return {column: gr.update(visible=True, choices=names, value=likely)}

    def group(chosen: str, text: str, name: str | None, request: gr.Request) -> Updates:
        """Reads the dataset again with a rule for patients."""
        session = context.sessions.of(request)
        if session.data is None:
            return {seen: gr.update(visible=False)}
        try:
            if chosen == BY_COLUMN and not (session.patients and name):
                raise DatasetError("choose a CSV file and the column that names the patient")
            by = {BY_FOLDER: FOLDER, BY_COLUMN: f"{session.patients}:{name}"}.get(chosen, "")
            session.data = plan(session.data.data, limits, text.strip() if chosen == BY_NAME else "", by)
        except (DatasetError, ImageError, OSError, ValueError) as problem:
            said = answers.reason(str(problem).replace(f"{session.patients}", "the CSV file"), session.data.data)
            shown = callout("error", "This rule cannot be used", said)
            return {seen: set_html(session.data) + shown, run: gr.update(interactive=False)}
        return {seen: set_html(session.data), run: gr.update(interactive=True)}

    def take_sample(request: gr.Request) -> Updates:
        return take(str(SAMPLE_SET), request)

    def idle() -> Updates:
        return {run: gr.update(visible=True), stop: gr.update(visible=False)}

    def refused() -> Updates:
        """Reports that the queue is full."""
        return {picture: error("Training did not start", BUSY), **idle()}

    def begin(count: float, request: gr.Request) -> Updates:
        """Shows the waiting state immediately, before the queue."""
        context.sessions.of(request).stop_training.clear()
        return {
            picture: progress_html(Progress(), int(count), "Waiting for another training to finish"),
            run: gr.update(visible=False),
            stop: gr.update(visible=True, interactive=True, value="Cancel"),
            done: gr.update(visible=False),
        }

    def train(title: str, count: float, request: gr.Request) -> Iterator[Updates]:
        session = context.sessions.of(request)
        if session.data is None:
            yield {picture: error("No dataset yet", "Upload a zip file or use the sample dataset first."), **idle()}
            return
        if session.stop_training.is_set():  # cancelled while waiting
            yield {picture: CANCELLED, **idle()}
            return
        folder = session.new_folder()
        job = None
        try:
            source = context.start(title)
            device = training_device(context)
            job = Job(session.data, source, int(count), folder, limits, device)
            while job.running:
                if session.stop_training.wait(POLL_SECONDS):
                    yield {picture: CANCELLED, **idle()}
                    return
                session.used = time.monotonic()  # keeps the session alive
                yield {picture: progress_html(job.progress(), int(count))}
            found = job.result()
            name = own_name(session)
            session.models[name] = job.out
            session.examples[name] = held_out(session.data.index, session.new_folder())
            yield {
                picture: result_html(found, job, name, limits.idle_minutes),
                done: gr.update(visible=True),
                download: packed(job.out, session.new_download("medmamba-model.zip")),
                **idle(),
            }
        except (JobError, DatasetError, PretrainedError, ConfigError, OSError, ValueError) as problem:
            yield {picture: error("Training failed", str(problem)), **idle()}
        finally:  # also if the visitor leaves
            if job:
                job.stop()

    def cancel(request: gr.Request) -> Any:
        context.sessions.of(request).stop_training.set()
        return gr.update(value="Cancelling…", interactive=False)

    def try_it(request: gr.Request) -> tuple[Any, Any]:
        session = context.sessions.of(request)
        newest = list(session.models)[-1] if session.models else context.default_title
        return gr.update(choices=context.choices(session), value=newest), gr.Tabs(selected="classify")

    private: dict[str, Any] = dict(api_visibility="private")
    taken = [file, seen, run, patients, rule, pattern, table, column, picture, done]
    file.upload(take, file, taken, show_progress_on=[picture], **private)
    file.clear(take, file, taken, **private)
    sample.click(take_sample, None, taken, show_progress_on=[picture], **private)
    rule.input(rule_parts, rule, [pattern, table, column], show_progress="hidden", **private)
    gr.on([table.upload, table.clear], take_table, table, [column, seen], show_progress_on=[seen], **private)
    ruled = [rule, pattern, column]
    gr.on([apply.click, pattern.submit], group, ruled, [seen, run], show_progress_on=[seen], **private)
    panel = [picture, done, download, run, stop]
    started = run.click(begin, epochs, panel, queue=False, show_progress="hidden", **private)
    trained = started.then(
        train, [base, epochs], panel, concurrency_id="train", concurrency_limit=1, show_progress="hidden", **private
    )
    trained.failure(refused, None, panel, queue=False, **private)
    stop.click(cancel, None, stop, queue=False, **private)
    use.click(try_it, None, [classify.model, tabs], **private).then(
        classify.rerun,
        [classify.model, *classify.view],
        classify.outputs,
        js="(...x) => (scrollTo(0, 0), x)",
        **private,
    )


def first_base(context: Context) -> str:
    """Returns what training starts from by default, see `Context.first_start`."""
    return context.first_start(light=training_device(context) == "cpu")


def training_device(context: Context) -> str:
    """Returns the training device: on ZeroGPU the CPU, because subprocesses get no GPU there."""
    return "cpu" if ZERO_GPU else context.store.device.type


def own_name(session: Session) -> str:
    """Returns an unused display name for a visitor's new model."""
    assert session.data is not None
    name = f"Yours: {session.data.data.stem[:40]}"
    number = 2
    while name in session.models:
        name = f"Yours: {session.data.data.stem[:40]} ({number})"
        number += 1
    return name


def packed(model: Path, target: Path) -> str:
    """Packs the model folder as a zip, which `MedMamba.from_pretrained` loads directly."""
    return shutil.make_archive(str(target.with_suffix("")), "zip", model.parent, model.name)


def progress_html(found: Progress, epochs: int, stage: str = "") -> Markup:
    """Renders the curves so far and the remaining time; `stage` replaces the epoch as the title."""
    if stage:
        title = stage
    elif found.history or found.losses:
        title = f"Epoch {min(len(found.history) + 1, epochs)} of {epochs}"
    else:
        title = "Reading the images"
    left = f"about {duration(found.left)} left" if found.left is not None else "estimating time left"
    share = 100 * found.share
    bar = tag(
        '<div class="mm-progress" role="progressbar" aria-label="Training" aria-valuemin="0" aria-valuemax="100" '
        'aria-valuenow="{share:.0f}"><span style="width:{share:.1f}%"></span></div>',
        share=share,
    )
    text = f"{duration(found.seconds)} elapsed, {left}" if found.seconds else "This server trains one model at a time."
    return card(bar + curves_html(found, epochs), title, text, attributes=Markup('aria-live="off"'))


def curves_html(found: Progress, epochs: int, best: int | None = None) -> Markup:
    """Renders loss and accuracy over epochs, with a mark at the epoch that was kept, if known."""

    def column(name: str) -> list[float]:
        return [math.nan if row[name] is None else row[name] for row in found.history]

    x = column("epoch")
    loss = [Line("training", [p[0] for p in found.losses], [p[1] for p in found.losses], "faint")]
    if found.history:
        loss = [Line("training", x, column("loss"), "dash"), Line("validation", x, column("val_loss"), "a")]
    scores = [
        Line("accuracy", x, column("val_accuracy"), "a"),
        Line("balanced accuracy", x, column("val_balanced_accuracy"), "dash"),
    ]
    limit = (0.0, float(epochs))
    mark = (float(best), "kept") if best else None
    drawn = chart(scores, "Validation accuracy", "epoch", "higher is better", limit, (0, 1), mark=mark)
    losses = chart(loss, "Loss", "epoch", "lower is better", limit, mark=mark)
    return tag('<div class="mm-chart-grid">{}{}</div>', losses, drawn)


def result_html(found: dict[str, Evaluation], job: Job, name: str, minutes: float) -> Markup:
    """Renders the results and curves of the finished model."""
    split = "test" if "test" in found else "val"
    evaluation = found[split]
    progress = job.progress()
    best = read_facts(job.out, licence="other").config.training.get("best_epoch")
    few = NOTHING
    if evaluation.n_images < FEW_IMAGES:
        text = f"These results are based on {evaluation.n_images} images"
        few = callout("warn", "Few images", text + (", hence the wide intervals." if evaluation.resamples else "."))
    chosen = callout("warn", "No test images", CHOSEN_BY_VAL) if split != "test" else NOTHING
    unknown = NOTHING
    if job.plan.made and not any(job.plan.index.patients):
        unknown = callout("warn", "Images of one patient may be in several splits", SAME_PATIENT)
    epochs = len(progress.history)
    ended = f"Epoch {best} of {epochs} was best on validation." if best else f"{epochs} epochs."
    text = f"{ended} Total time {duration(progress.seconds)}. {kept_until(minutes)}"
    results = few + chosen + unknown + results_html(evaluation, split, job.out)
    return card(results, f"{name} is ready", text) + card(curves_html(progress, epochs, best))


def kept_until(minutes: float) -> str:
    """Says when a visitor's model is deleted."""
    return f"It is deleted when you leave the page or after {minutes:g} minutes of inactivity."


def duration(seconds: float) -> str:
    """Formats seconds as "45 s" or "3 min 20 s"."""
    whole = max(round(seconds), 0)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
