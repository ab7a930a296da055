"""The Explain tab: pixel attributions for a prediction, and checks of their reliability."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.explain import (
    MAPS_SHARE,
    Comparison,
    ExplainCancelled,
    estimate_seconds,
    methods,
    recommended,
    reliabilities,
)
from medmamba.imaging.load import ImageError
from medmamba.pretrained import PretrainedError

from ..advice import of_problem
from ..context import Context
from ..gpu import ZERO_GPU
from ..html import Markup, card, empty, error, tag
from ..options import BUSY
from ..service import inspect
from ..theme import Html
from . import answers, maps, record
from .classify import ClassifyTab
from .finetune import duration
from .pdf import PdfButton, pdf_of
from .window import view_of

BEST = "Predicted class"
DEFAULT = recommended()
NO_IMAGE = empty("Nothing to explain yet", "Choose an image in the Classify tab first.")
READY = empty("Ready", "Choose one or more methods and press Explain. Their attribution maps appear side by side.")
FILES = ("Picture (PNG)", "Maps (NumPy)", "Record (JSON)", f"{record.PAGE} (HTML)")
Updates = dict[Any, Any]


def build(context: Context, classify: ClassifyTab, tab: gr.Tab, tabs: gr.Tabs) -> None:
    """Builds the tab and its events. Call inside `tab`."""
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=4, min_width=300):
            current = Html(_no_current(), elem_id="mm-explain-current")
            target = gr.Dropdown([BEST], value=BEST, label="Class to explain", filterable=False)
            chosen = gr.CheckboxGroup(
                [(method_label(name), name) for name in methods()],
                value=DEFAULT,
                label="Methods",
                info="Beside each: on what share of 100 test images of each of four models its order of the parts was "
                "better than each of five random ones (a random map: 17%).",
                elem_id="mm-methods",
            )
            checks = gr.Checkbox(
                label="Check the maps",
                info="Tests whether each map is faithful to the model. Takes several times as long.",
            )
            cost = Html("", elem_id="mm-cost")
            run = gr.Button("Explain", variant="primary", size="lg", elem_id="mm-run-explain")
            stop = gr.Button("Cancel", visible=False, elem_id="mm-stop-explain")
        with gr.Column(scale=8, min_width=320):
            status = Html(
                "", visible=False, elem_id="mm-status"
            )  # Gradio draws its progress bar over this, not over the maps
            picture = Html(NO_IMAGE, elem_id="mm-maps")
            with gr.Row(visible=False, elem_id="mm-downloads") as downloads:
                files = [gr.DownloadButton(label, size="sm") for label in FILES]
                pdf = PdfButton(f"{record.PAGE} (PDF)", "mm-explain-pdf")
            trust = Html(visible=False, elem_id="mm-trust")
    panel = [picture, trust, downloads, *files, run, stop, status]

    def enter(title: str, preset: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        """Shows the image and the classes when the tab is opened."""
        session = context.sessions.of(request)
        if not session.images:
            return {current: _no_current(), picture: NO_IMAGE, trust: gr.update(visible=False)}
        try:
            loaded = context.load(session, title)
            path = session.images[session.current]
            shown = answers.preview_html(path, inspect(path, view_of(preset, c, w, f)))
        except (ImageError, PretrainedError, ConfigError, OSError, ValueError) as problem:
            text = answers.reason(of_problem(problem), session.images[session.current])
            return {current: _no_current(), picture: error("This image cannot be explained", text)}
        return {
            current: shown,
            target: gr.update(choices=[BEST, *loaded.config.labels], value=BEST),
            picture: READY,
            trust: gr.update(visible=False),
            downloads: gr.update(visible=False),
        }

    def estimate(title: str, names: list[str], check: bool, request: gr.Request) -> Markup | str:
        """Renders how long the explanation will take on this machine."""
        session = context.sessions.of(request)
        if not names or not session.images or ZERO_GPU:  # a GPU that is lent for a call cannot be timed before
            return ""
        try:
            loaded = context.load(session, title)
            seconds = sum(estimate_seconds(loaded.model, names, checks=check, speed=loaded.speed).values())
        except (PretrainedError, ConfigError, OSError, ValueError):  # reported when it runs
            return ""
        return cost_html(seconds, len(names), check)

    def idle() -> Updates:
        return {run: gr.update(visible=True), stop: gr.update(visible=False), status: gr.update(visible=False)}

    def refused() -> Updates:
        """Reports that the queue is full."""
        return {picture: error("No explanation was computed", BUSY), **idle()}

    def begin(names: list[str], request: gr.Request) -> Updates:
        """Shows the waiting state immediately, before the queue."""
        context.sessions.of(request).stop_explaining.clear()
        return {
            run: gr.update(visible=False),
            stop: gr.update(value="Cancel", interactive=True, visible=True),
            status: gr.update(value=Markup('<div class="mm-status"></div>'), visible=True),
            picture: _working(names) if names else "",
            trust: gr.update(visible=False),
            downloads: gr.update(visible=False),
        }

    def draw(
        title: str,
        preset: str,
        c: float,
        w: float,
        f: float,
        label: str,
        names: list[str],
        check: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  how Gradio detects progress tracking
    ) -> Iterator[Updates]:
        session = context.sessions.of(request)
        if not session.images:
            yield {picture: NO_IMAGE, **idle()}
            return
        if not names:
            yield {picture: error("No method selected", "Select at least one method."), **idle()}
            return
        path = session.images[session.current]

        def report(share: float) -> bool:
            progress(share, desc="Computing the maps" if not check or share < MAPS_SHARE else "Checking the maps")
            return not session.stop_explaining.is_set()

        found: Comparison | None = None
        try:
            loaded = context.load(session, title)
            wanted = None if label == BEST else label
            view = view_of(preset, c, w, f)
            for found in context.service.explain(loaded.source, path, view, names, wanted, check, report):
                session.comparison = found
                drawn = len(found.explanations)
                update: Updates = {trust: gr.update(value=maps.trust_html(found, len(names)), visible=True)}
                if not found.trust:
                    update[picture] = maps.maps_html(found, loaded.calibrated, names[drawn:])
                    if check or drawn < len(names):
                        wait = _checking(len(names)) if drawn == len(names) else ""
                        update[trust] = gr.update(value=wait, visible=bool(wait))
                yield update
        except ExplainCancelled:
            if found is None:
                yield {picture: empty("Cancelled", "Press Explain to start again."), **idle()}
                return
            yield {picture: maps.maps_html(found, loaded.calibrated)}  # without the placeholders of the rest
        except (ImageError, PretrainedError, ConfigError, ImportError, OSError, ValueError) as problem:
            yield {picture: error("The explanation failed", answers.reason(of_problem(problem), path)), **idle()}
            return
        assert found is not None
        target_file = session.new_download("explanation.png")
        answer = context.service.classify(loaded.source, path, view)
        saved = record.explained(loaded, path, answer, view, found, target_file)
        session.pages["explain"] = Path(saved[-1])
        yield {
            trust: gr.update(value=maps.trust_html(found), visible=True),
            downloads: gr.update(visible=True),
            **dict(zip(files, saved, strict=True)),
            **idle(),
        }

    def cancel(request: gr.Request) -> Any:
        context.sessions.of(request).stop_explaining.set()
        return gr.update(value="Cancelling…", interactive=False)

    inputs = [classify.model, *classify.view]
    entered = [current, target, *panel]
    quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    timed: dict[str, Any] = dict(concurrency_id="estimate", trigger_mode="always_last", **quiet)
    priced = [classify.model, chosen, checks]
    tab.select(enter, inputs, entered, **quiet).then(estimate, priced, cost, **timed)
    classify.explain.click(lambda: gr.Tabs(selected="explain"), None, tabs, api_visibility="private").then(
        enter, inputs, entered, **quiet
    ).then(estimate, priced, cost, **timed)
    gr.on([chosen.change, checks.change], estimate, priced, cost, **timed)
    started = run.click(begin, chosen, panel, queue=False, api_visibility="private", show_progress="hidden")
    drawn = started.then(
        draw,
        [*inputs, target, chosen, checks],
        panel,
        api_visibility="private",
        concurrency_id="explain",
        show_progress_on=[status],
    )
    drawn.failure(refused, None, panel, queue=False, api_visibility="private")
    stop.click(cancel, None, stop, queue=False, api_visibility="private")
    pdf.attach(context, lambda session: pdf_of(session.pages.get("explain")))


def cost_html(seconds: float, count: int, checks: bool) -> Markup:
    """Renders the estimated time of an explanation."""
    what = f"{count} map{'s' if count > 1 else ''}" + (" with checks" if checks else "")
    time = "less than a second" if seconds < 1 else f"about {duration(seconds)}"
    return tag('<p class="mm-hint mm-cost" role="status">{} on this machine: {}.</p>', what, time)


def method_label(name: str) -> str:
    """Returns the name of a method with what was measured of it."""
    known = reliabilities().get(name)
    return f"{maps.method_title(name)} ({known})" if known else f"{maps.method_title(name)} (not measured)"


def _no_current() -> Markup:
    return Markup('<p class="mm-hint">The image selected in the Classify tab is explained here.</p>')


def _working(names: list[str]) -> Markup:
    """Renders placeholders for the maps."""
    grid = tag('<div class="mm-map-grid">{}</div>', maps.waiting(names))
    return card(grid, attributes=Markup('role="status" aria-label="Explaining"'))


def _checking(count: int) -> Markup:
    wait = tag('<p class="mm-wait" role="status">Checking 1 of {}…</p>', count)
    return card(wait, "Reliability checks")
