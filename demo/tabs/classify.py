"""The Classify tab: upload images, get calibrated probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.imaging.dicom.series import series_order
from medmamba.imaging.image import WindowNeeded
from medmamba.imaging.load import ImageError
from medmamba.pretrained import PretrainedError

from ..advice import of_problem
from ..context import Context
from ..examples import Example, examples_html, load_examples
from ..html import NOTHING, Markup, empty, error, folder_html, pick_js, tag
from ..service import AnswerError, View, inspect
from ..sessions import Session
from ..store import Loaded
from ..theme import Html
from . import answers, decide, labels, refusals
from .record import RecordButton, csv_facts
from .window import CUSTOM, FIRST, WindowControls, full_range, named_window, view_of

LABEL_JS = (
    "element.addEventListener('change', (e) => { const s = e.target.closest('[data-mm-label]');"
    " if (s) trigger('select', {index: s.dataset.mmLabel, label: s.value}); });"
)
Updates = dict[Any, Any]


@dataclass
class ClassifyTab:
    """Components that other tabs use."""

    model: gr.Dropdown
    view: list[Any]
    explain: gr.Button
    rerun: Callable[..., Any]
    look: Callable[..., Any]
    opening: gr.Column
    below: gr.Column
    result: Any
    batch: Any
    opens: Callable[[Any], None]
    outputs: list[Any]


def build(context: Context) -> ClassifyTab:
    """Builds the tab and its events. Call inside `gr.Blocks`."""
    limits, store = context.options.limits, context.store
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=5, min_width=320):
            model = gr.Dropdown(
                context.choices(None),
                value=context.default_title,
                label="Model",
                elem_id="mm-model",
                filterable=False,
            )
            opening = gr.Column(min_width=0, elem_id="mm-opening")
            file = gr.File(
                label="Images",
                show_label=False,
                file_count="multiple",
                type="filepath",
                height=132,
                elem_id="mm-drop",
            )
            Html(
                tag(
                    '<p class="mm-hint">PNG, JPEG, WebP, TIFF, BMP or DICOM with any file name, 8 or 16 bit, '
                    "up to {} MB each and {} at a time. You can also paste an image.</p>",
                    limits.image_mb,
                    limits.batch_files,
                )
                + folder_html("mm-drop", limits.zip_mb)
            )
            current = Html("", visible=False, elem_id="mm-current")
            reading = WindowControls("mm-reading")
            preset, center, width = reading.parts
            frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False, buttons=[])
            button = gr.Button("Classify", variant="primary", size="lg", elem_id="mm-classify")
            examples = load_examples()
            picker = Html(
                examples_html(examples, dataset_of(store.default)),
                elem_id="mm-examples",
                js_on_load=pick_js("mm-example", "click"),
            )
        with gr.Column(scale=7, min_width=320):
            batch = Html(visible=False, js_on_load=pick_js("mm-index", "click") + LABEL_JS, elem_id="mm-batch")
            bar = labels.build()
            table_file = gr.DownloadButton("Download the table (CSV)", visible=False, size="sm")
            result = Html(
                empty(answers.EMPTY_TITLE, answers.EMPTY_TEXT),
                elem_id="mm-result",
                js_on_load=pick_js("mm-window", "click"),
            )
            panel = decide.build(context, model)
            explain = gr.Button("Explain this prediction", visible=False, elem_id="mm-explain-this")
            record = RecordButton()
            below = gr.Column(min_width=0, elem_id="mm-below")
            with gr.Accordion("About this model", open=True, elem_id="mm-about"):
                card = Html(answers.card_html(store.default))

    view = [preset, center, width, frame]
    shown = [current, reading.group, *view, batch, table_file, result, explain, record.row]
    shown += [*panel.parts, *bar.parts]

    def controls(session: Session) -> Updates:
        """Returns the preview and window controls for a new image; none for several images."""
        hidden: Updates = {
            current: gr.update(visible=False),
            **reading.hidden(),
            frame: gr.update(visible=False, value=1),
        }
        if len(session.images) != 1:
            return hidden
        path = session.images[0]
        try:
            found = inspect(path)
        except (ImageError, ValueError):
            return hidden  # classification reports why
        updates = {**hidden, current: gr.update(value=answers.preview_html(path, found), visible=True)}
        if found.image.n_frames > 1:
            updates[frame] = gr.update(visible=True, maximum=found.image.n_frames, value=1)
        return {**updates, **reading.shown(found)}

    def answer(session: Session, title: str, view: View) -> Updates:
        """Returns the results for the current images of the session."""
        nothing = {batch: gr.update(visible=False), table_file: gr.update(visible=False)}
        nothing |= {**panel.hidden(), **bar.hidden(), **record.shown(False)}
        try:
            loaded = context.load(session, title)
        except (PretrainedError, ConfigError, OSError, ValueError) as problem:
            return {**nothing, result: error("The model could not be loaded", str(problem))}
        if not session.images:
            start = empty(answers.EMPTY_TITLE, answers.EMPTY_TEXT)
            return {**nothing, result: start, explain: gr.update(visible=False)}
        if len(session.images) == 1:
            return {**nothing, **single(session, loaded, view)}
        results = session.results = context.service.classify_files(loaded.source, session.images)
        facts = csv_facts(loaded, session.images, results)
        text = answers.batch_csv(session.images, results, loaded.config.labels, facts=facts)
        path = session.new_download("medmamba.csv")
        path.write_text(text, encoding="utf-8")
        return {
            **panel.hidden(),
            **listed(session, loaded),
            **record.shown(True),
            table_file: gr.update(value=str(path), visible=True),
            result: "",
            explain: gr.update(visible=False),
        }

    def listed(session: Session, loaded: Loaded) -> Updates:
        """Returns the table of the batch with the labels set so far."""
        classes = labels.classes_of(loaded.config.task, loaded.config.labels)
        shown_ = answers.batch_html(session.images, session.results, loaded.calibrated, classes, session.labels)
        return {batch: gr.update(value=shown_, visible=True), **bar.update(session, session.results, classes)}

    def label(event: gr.EventData, title: str, request: gr.Request) -> Updates:
        """Keeps the true class that was chosen for an image; the table itself shows it already."""
        session = context.sessions.of(request)
        config = context.load(session, title).config
        index, chosen = int(event.index), str(event.label)
        if 0 <= index < len(session.results):
            session.labels.pop(index, None)
            if chosen in config.labels:
                session.labels[index] = chosen
        return bar.update(session, session.results, labels.classes_of(config.task, config.labels))

    def accept(title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        loaded = context.load(session, title)
        session.labels = labels.accepted(session.results, session.labels)
        return listed(session, loaded) if session.results else {batch: gr.skip()}

    def single(session: Session, loaded: Any, view: View) -> Updates:
        path = session.images[session.current]
        hidden: Updates = {explain: gr.update(visible=False), **panel.hidden()}
        session.prediction, session.features, session.view = None, None, view
        try:
            found = context.service.classify(loaded.source, path, view)
        except AnswerError as problem:
            return {result: error("The image could not be classified", answers.reason(problem, path)), **hidden}
        except (ImageError, OSError, ValueError) as problem:
            lacking = isinstance(problem, WindowNeeded) and len(session.images) == 1
            return {result: answers.failure_html(of_problem(problem, alone=lacking), path, lacking), **hidden}
        if found.refused and (loaded.title, path) not in session.anyway:
            suggestion = context.suggest(loaded.title, path, view, ask=True)
            return {result: refusals.refusal_html(found, loaded, suggestion), **hidden}
        session.prediction, session.features = found.prediction, found.features
        return {
            **(record.shown(True) if len(session.images) == 1 else {}),
            result: answers.answer_html(
                found, loaded, truth_of([*examples, *session.examples.get(loaded.title, ())], path, loaded)
            ),
            explain: gr.update(visible=True),
            **panel.update(loaded, found.prediction),
        }

    def take(files: list[str], title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if problem := refuse(files or [], limits.batch_files, limits.image_mb):
            return {file: None, result: error("Upload rejected", problem)}
        try:
            session.keep_images([files[i] for i in series_order(files)] if files else [])
        except OSError:  # another visitor with an identical file left meanwhile
            return {file: None, result: error("The upload was lost", "Choose the file again.")}
        return {file: None, **controls(session), **answer(session, title, FIRST)}

    def choose(event: gr.EventData, title: str, request: gr.Request) -> Updates:
        offered = [*examples, *context.sessions.of(request).examples.get(title, ())]
        index = int(event.index)
        if not 0 <= index < len(offered):  # not sent by the page
            return {result: gr.skip()}
        return take([str(offered[index].path)], title, request)

    def open_row(event: gr.EventData, title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        session.current = min(max(int(event.index), 0), len(session.images) - 1)
        return single(session, context.load(session, title), View())

    def pressed(title: str, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        if not context.sessions.of(request).images:
            return {result: error("No image yet", "Drop, paste or choose an image first, or pick an example.")}
        return rerun(title, preset_, c, w, f, request)

    def rerun(title: str, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        return answer(session, title, view_of(preset_, c, w, f))

    def look(title: str, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        """Updates preview, window controls and prediction after a change of the window."""
        session = context.sessions.of(request)
        view = view_of(preset_, c, w, f)
        updates = answer(session, title, view)
        with contextlib.suppress(ImageError, OSError):  # reported with the prediction
            if len(session.images) == 1:
                found = inspect(session.images[0], view)
                updates[current] = answers.preview_html(session.images[0], found)
                if found.windowed:
                    updates.update(reading.sliders(found))
        return updates

    def use_preset(title: str, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if len(session.images) == 1:
            c, w = named_window(session.images[0], preset_, c, w, f)
        return look(title, preset_, c, w, f, request)

    def by_hand(title: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        updates = look(title, CUSTOM, c, w, f, request)
        # Do not overwrite the sliders: the visitor may have moved them further.
        return {preset: CUSTOM, **{part: value for part, value in updates.items() if part not in (center, width)}}

    def act(
        event: gr.EventData, title: str, preset_: str, c: float, w: float, f: float, request: gr.Request
    ) -> Updates:
        """Does what the button in a result says: another window, another model, or an answer in any case."""
        session, asked = context.sessions.of(request), str(event.index)
        if asked.startswith(refusals.MODEL) and (name := asked.removeprefix(refusals.MODEL)) in context.titles(session):
            return {model: name, **rerun(name, preset_, c, w, f, request)}
        if asked == refusals.ANYWAY and session.images:
            session.anyway.add((title, session.images[session.current]))
            one = len(session.images) == 1
            view = view_of(preset_, c, w, f) if one else View()
            return single(session, context.load(session, title), view)
        return by_range(title, f, request)

    def by_range(title: str, f: float, request: gr.Request) -> Updates:
        """Applies the full-range window to the displayed image."""
        session = context.sessions.of(request)
        if not session.images:
            return {result: gr.skip()}
        path = session.images[session.current]
        try:
            found = full_range(path, f if len(session.images) == 1 else 1)
        except (ImageError, OSError) as problem:
            return {result: answers.failure_html(of_problem(problem), path)}
        if found is None:
            return {result: gr.skip()}
        name, window = found
        if len(session.images) > 1:
            return single(session, context.load(session, title), View(0, window))
        return {preset: name, **look(title, name, *window, f, request)}

    def describe(title: str, request: gr.Request) -> tuple[Markup, Markup]:
        """Returns the examples and the card of a model."""
        try:
            session = context.sessions.of(request)
            loaded = context.load(session, title)
            offered = examples_html(examples, dataset_of(loaded), session.examples.get(title, ()))
            return offered, answers.card_html(loaded)
        except (PretrainedError, ConfigError, OSError, ValueError):  # reported with the prediction
            return examples_html(examples, None), NOTHING

    shared: dict[str, Any] = dict(
        api_visibility="private", concurrency_id="classify", show_progress_on=[result], show_progress="minimal"
    )
    given = [
        file.upload(take, [file, model], [file, *shown], **shared),
        picker.click(choose, [model], [file, *shown], **shared),
    ]
    for event in given:
        event.then(None, js="() => mmShowAnswer()", api_visibility="private")

    def opens(component: Any) -> None:
        """Has the clicks on a component open the image whose index it sends."""
        opened = component.click(open_row, [model], [result, explain, *panel.parts], **shared)
        opened.then(None, js="() => mmShowAnswer(true)", api_visibility="private")

    opens(batch)
    batch.select(label, [model], bar.parts, api_visibility="private", show_progress="hidden")
    bar.accept.click(accept, [model], [batch, *bar.parts], api_visibility="private", show_progress="hidden")
    button.click(pressed, [model, *view], shown, **shared)
    model.input(rerun, [model, *view], shown, **shared)
    model.change(describe, model, [picker, card], api_visibility="private", show_progress="hidden")
    result.click(act, [model, *view], [model, *shown], **shared)
    preset.input(use_preset, [model, *view], shown, **shared)
    moved: dict[str, Any] = {**shared, "trigger_mode": "always_last"}
    gr.on([center.input, width.input], by_hand, [model, center, width, frame], shown, **moved)
    frame.release(look, [model, *view], shown, **moved)
    record.attach(context, model, view, result)
    return ClassifyTab(model, view, explain, rerun, look, opening, below, result, batch, opens, shown)


def dataset_of(loaded: Loaded) -> str | None:
    """Returns the registry name of a model's training dataset."""
    return loaded.facts.entry.name if loaded.facts.entry else None


def truth_of(examples: list[Example], path: Path, loaded: Loaded) -> str:
    """Returns the true class of a test image of the model's own dataset, bundled or held out, else ""."""
    dataset = dataset_of(loaded)
    for known in examples:
        if known.path.name != path.name or not known.path.is_file():
            continue
        if known.datasets and dataset not in known.datasets:
            continue
        if path.read_bytes() != known.path.read_bytes():
            continue
        if not known.datasets:
            return known.what if known.what in loaded.config.labels else ""
        entry = loaded.facts.entry
        index = entry.class_index(known.what) if entry else None
        return loaded.config.labels[index] if index is not None and index < len(loaded.config.labels) else ""
    return ""


def refuse(files: list[str], most: int, megabytes: int) -> str:
    """Returns why these files are rejected, or "" if they are accepted."""
    if len(files) > most:
        return f"{len(files)} images selected; the limit is {most} at a time. Choose fewer, or use `medmamba predict`."
    for name in files:
        if Path(name).stat().st_size > megabytes * 2**20:
            return f"{Path(name).name} is larger than {megabytes} MB. Crop or downscale it first."
    return ""
