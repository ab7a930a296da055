"""The Segment tab: masks over an image with their areas, and boxes where the model detects."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from medmamba.config import ConfigError
from medmamba.imaging.formats import sniff
from medmamba.imaging.image import WindowNeeded
from medmamba.imaging.load import ImageError
from medmamba.pretrained import PretrainedError

from ..advice import WARNING, in_app, of_problem
from ..context import Context
from ..dense import LEAST_SCORE, DenseModels, Offered, Outlined
from ..examples import load_examples, outlined_html
from ..html import (
    NOTHING,
    Markup,
    bullets,
    callout,
    card,
    data_uri,
    empty,
    error,
    facts,
    join,
    licence_name,
    percent,
    table,
    tag,
    with_detail,
)
from ..service import LARGEST_SHOWN, View, inspect
from ..sessions import Session
from ..theme import Html
from .answers import failure_html, reason
from .classify import pick_js, refuse
from .window import CUSTOM, FIRST, WindowControls, full_range, named_window, view_of

OPACITY = 45
SNIFFED = 4096  # bytes that tell the format of a file
EMPTY_TEXT = "Drop, paste or choose an image on the left. The outlines of what the model finds appear here."
PROBLEMS = (ImageError, PretrainedError, ConfigError, ImportError, OSError, ValueError)
Updates = dict[Any, Any]


def build(context: Context, models: DenseModels, tab: gr.Tab) -> None:
    """Builds the tab and its events. Call inside `gr.Blocks`."""
    limits = context.options.limits
    first = models.about(None)
    with gr.Row(elem_classes="mm-columns"):
        with gr.Column(scale=5, min_width=320):
            model = gr.Dropdown(
                models.titles, value=first.title, label="Model", filterable=False, elem_id="mm-segment-model"
            )
            file = gr.File(
                label="Image", show_label=False, type="filepath", height=132, elem_id="mm-segment-drop",
                elem_classes="mm-drop",
            )  # fmt: skip
            Html(
                tag(
                    '<p class="mm-hint">One PNG, JPEG, WebP, TIFF, BMP or DICOM image, up to {} MB, of the kind the '
                    "model was trained on.</p>",
                    limits.image_mb,
                )
            )
            reading = WindowControls("mm-segment-reading")
            frame = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False, buttons=[])
            threshold = gr.Slider(
                LEAST_SCORE, 0.95, round(first.threshold, 2), step=0.01, label=slider_label(first), buttons=[],
                visible=adjustable(first), elem_id="mm-segment-threshold",
            )  # fmt: skip
            examples = load_examples(boxed=True)
            picker = Html(
                outlined_html(examples, first.dataset),
                elem_id="mm-segment-examples",
                js_on_load=pick_js("mm-example", "click"),
            )
        with gr.Column(scale=7, min_width=320):
            result = Html(
                empty("Nothing to outline yet", EMPTY_TEXT), elem_id="mm-segment-result",
                js_on_load=pick_js("mm-window", "click"),
            )  # fmt: skip
            with gr.Row(visible=False, elem_id="mm-segment-downloads") as downloads:
                mask = gr.DownloadButton("Mask (PNG)", size="sm")
                overlay = gr.DownloadButton("Overlay (PNG)", size="sm")
                dicom = gr.DownloadButton("DICOM Segmentation", size="sm")
            about = Html(about_html(first), elem_id="mm-segment-about")

    shown = [result, downloads, mask, overlay, dicom]
    preset, center, width = reading.parts
    view = [*reading.parts, frame]

    def answer(session: Session, title: str, value: float | None, view_: View) -> Updates:
        """Returns the result for the image of the session."""
        hidden: Updates = {downloads: gr.update(visible=False)}
        path = session.outlined
        if path is None:
            return {result: empty("Nothing to outline yet", EMPTY_TEXT), **hidden}
        try:
            found = models.predict(title, path, view_, value)
        except WindowNeeded as problem:
            return {result: failure_html(of_problem(problem), path, windowed=True), **hidden}
        except ImageError as problem:
            return {result: failure_html(of_problem(problem), path), **hidden}
        except PROBLEMS as problem:
            return {result: error("The image could not be segmented", reason(problem, path)), **hidden}
        written = save(found, session, path)
        return {
            result: result_html(found),
            downloads: gr.update(visible=True),
            mask: gr.update(value=str(written["mask"]) if "mask" in written else None, visible="mask" in written),
            overlay: gr.update(value=str(written["overlay"])),
            dicom: gr.update(value=str(written["dicom"]) if "dicom" in written else None, visible="dicom" in written),
        }

    def take(upload: str | None, title: str, request: gr.Request) -> Updates:
        session = context.sessions.of(request)
        if upload is None:
            return {file: None}
        if problem := refuse([upload], 1, limits.image_mb):
            return {file: None, result: error("Upload rejected", problem)}
        try:
            session.keep_outlined(upload)
        except OSError:  # another visitor with an identical file left meanwhile
            return {file: None, result: error("The upload was lost", "Choose the file again.")}
        controls: Updates = {frame: gr.update(visible=False, value=1), **reading.hidden()}
        with contextlib.suppress(ImageError, ValueError):  # the prediction reports why
            found = inspect(session.outlined) if session.outlined else None
            if found is not None:
                frames = found.image.n_frames
                controls |= {frame: gr.update(visible=frames > 1, maximum=max(frames, 2), value=1)}
                controls |= reading.shown(found)
        try:
            start = models.about(title)
        except PROBLEMS as problem:
            return {file: None, result: error("The model could not be loaded", str(problem))}
        level = gr.update(value=round(start.threshold, 2))
        return {file: None, **controls, threshold: level, **answer(session, title, None, FIRST)}

    def pick(event: gr.EventData, title: str, request: gr.Request) -> Updates:
        index = int(event.index)
        if not 0 <= index < len(examples):  # not sent by the page
            return {result: gr.skip()}
        return take(str(examples[index].path), title, request)

    def moved(title: str, value: float, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        return answer(context.sessions.of(request), title, float(value), view_of(preset_, c, w, f))

    def look(title: str, value: float, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        """Applies a window, and sets the sliders to it."""
        session = context.sessions.of(request)
        path = session.outlined
        if path is None:
            return {result: gr.skip()}
        c, w = named_window(path, preset_, c, w, f)
        updates = answer(session, title, float(value), view_of(preset_, c, w, f))
        with contextlib.suppress(ImageError, OSError):  # reported with the result
            found = inspect(path, view_of(preset_, c, w, f))
            if found.windowed:
                updates |= reading.sliders(found)
        return updates

    def by_hand(title: str, value: float, c: float, w: float, f: float, request: gr.Request) -> Updates:
        # Leaves the sliders alone: the visitor may have moved them further.
        return {preset: CUSTOM, **moved(title, value, CUSTOM, c, w, f, request)}

    def by_range(title: str, value: float, f: float, request: gr.Request) -> Updates:
        """Applies the full-range window, as the button in a result says."""
        path = context.sessions.of(request).outlined
        try:
            found = full_range(path, f) if path is not None else None
        except (ImageError, OSError) as problem:
            assert path is not None
            return {result: failure_html(of_problem(problem), path)}
        if found is None:
            return {result: gr.skip()}
        name, window = found
        return {preset: name, **look(title, value, name, *window, f, request)}

    def chosen(title: str, preset_: str, c: float, w: float, f: float, request: gr.Request) -> Updates:
        try:
            dense = models.about(title)
        except PROBLEMS as problem:
            return {result: error("The model could not be loaded", str(problem)), downloads: gr.update(visible=False)}
        return {
            about: about_html(dense),
            picker: outlined_html(examples, dense.dataset),
            threshold: gr.update(value=round(dense.threshold, 2), label=slider_label(dense), visible=adjustable(dense)),
            **answer(context.sessions.of(request), title, None, view_of(preset_, c, w, f)),
        }

    def prepare(title: str) -> None:
        """Loads the model while the visitor looks for an image: its packages alone take seconds."""
        with contextlib.suppress(*PROBLEMS):  # reported when the model is used
            models.get(title)

    tab.select(prepare, model, None, api_visibility="private", show_progress="hidden")
    shared: dict[str, Any] = dict(api_visibility="private", concurrency_id="classify", show_progress_on=[result])
    minimal: dict[str, Any] = {**shared, "show_progress": "minimal"}
    changed = [file, reading.group, *view, threshold, *shown]
    for given in (
        file.upload(take, [file, model], changed, **minimal),
        picker.click(pick, [model], changed, **minimal),
    ):
        given.then(None, js="() => mmShowAnswer(false, '#mm-segment-result')", api_visibility="private")
    moving: dict[str, Any] = {**shared, "show_progress": "hidden", "trigger_mode": "always_last"}
    threshold.input(moved, [model, threshold, *view], shown, **moving)
    frame.release(moved, [model, threshold, *view], shown, **moving)
    preset.input(look, [model, threshold, *view], [*reading.parts, *shown], **minimal)
    gr.on([center.input, width.input], by_hand, [model, threshold, center, width, frame], [preset, *shown], **moving)
    result.click(by_range, [model, threshold, frame], [*reading.parts, *shown], **minimal)
    model.input(chosen, [model, *view], [about, picker, threshold, *shown], **minimal)


def adjustable(dense: Offered) -> bool:
    """Returns whether the model has one threshold to move."""
    return dense.detects or not dense.facts.config.exclusive


def slider_label(dense: Offered) -> str:
    """Returns the label of the slider, with the model's own value."""
    what = "Score from which a box is shown" if dense.detects else "Probability from which a pixel counts"
    return f"{what} (the model’s own: {dense.threshold:.2f})"


def save(found: Outlined, session: Session, path: Path) -> dict[str, Path]:
    """Writes the downloads: "mask", "overlay" and, for a DICOM file, "dicom"."""
    written: dict[str, Path] = {}
    stem = path.stem or "image"
    target = session.new_download(f"{stem}_overlay.png")
    found.found.overlay().save(target)
    written["overlay"] = target
    if found.dense.detects:
        return written
    written["mask"] = Path(found.found.save(session.new_download(f"{stem}_mask.png")))
    with path.open("rb") as file:
        is_dicom = sniff(file.read(SNIFFED)) == "DICOM"
    if is_dicom:
        try:
            written["dicom"] = Path(found.found.save(session.new_download(f"{stem}_seg.dcm"), source=path))
        except Exception:  # a file without what a DICOM Segmentation must repeat: the masks are there as PNG
            logging.getLogger(__name__).warning("no DICOM Segmentation was written", exc_info=True)
    return written


def result_html(found: Outlined) -> Markup:
    """Renders what was found: the picture, and a table of areas or boxes."""
    return boxes_html(found) if found.dense.detects else masks_html(found)


def masks_html(outlined: Outlined) -> Markup:
    """Renders masks over the image; the opacity slider works in the browser."""
    found = outlined.found
    record = found.to_dict()
    shown = [entry for entry in record["classes"] if entry["area"]]
    title = ", ".join(entry["label"] for entry in shown) if shown else "Nothing found"
    lead = f"{outlined.milliseconds:.0f} ms. A pixel counts from a probability of {outlined.threshold:.2f}."
    if found.exclusive:
        lead = f"{outlined.milliseconds:.0f} ms. Each pixel belongs to the most probable class."
    head = tag(
        '<div class="mm-maps-head"><div><h2>{}</h2><p>{}</p></div><label class="mm-slider"><span>Opacity</span>'
        '<input type="range" min="0" max="100" value="{percent}" data-mm-opacity aria-label="Opacity of the mask">'
        "<output>{percent} %</output></label></div>",
        title[:1].upper() + title[1:],
        lead,
        percent=OPACITY,
    )
    picture = tag(
        '<figure class="mm-map mm-outlined"><div class="mm-stack"><img src="{}" alt=""><img class="mm-over" src="{}" '
        'alt="{}: the image with what was found in colour"></div></figure>',
        data_uri(small(found.overlay(0.0))),
        data_uri(small(found.overlay(1.0))),
        title,
    )
    rows = [
        [
            entry["label"],
            f"{entry['area']:,}",
            "" if entry["area_mm2"] is None else f"{entry['area_mm2']:,.1f}",
            percent(entry["share"]),
            str(entry["regions"]),
        ]
        for entry in record["classes"]
    ]
    names = ["Class", "Pixels", "mm²", "Share of the image", "Regions"]
    if found.spacing is None:
        rows, names = [[*row[:2], *row[3:]] for row in rows], [*names[:2], *names[3:]]
    areas = table(names, rows, "Area")
    height, width = found.size
    where = f"{width}×{height} pixels"
    if found.spacing is not None:
        where += f", {found.spacing[0]:.3g} × {found.spacing[1]:.3g} mm each, as the file says"
    parts = [head, _warnings(found.notes), picture, areas, tag('<p class="mm-hint">{}.</p>', where), _regions(record)]
    return tag('<section class="mm-card mm-maps" style="--mm-opacity:{}">{}</section>', OPACITY / 100, join(parts))


def _regions(record: dict[str, Any], most: int = 20) -> Markup:
    regions = record["regions"]
    if len(regions) < 2:
        return NOTHING
    rows = [
        [
            entry["label"],
            f"{entry['area']:,}",
            percent(entry["score"]),
            _sides(entry["box"]),
        ]
        for entry in regions[:most]
    ]
    names = ["Class", "Pixels", "Mean probability", "Columns, rows"]
    more = f", the largest {most} of {len(regions)}" if len(regions) > most else ""
    return tag('<details class="mm-more"><summary>Regions{}</summary>{}</details>', more, table(names, rows, "Regions"))


def _sides(box: Any) -> str:
    left, top, right, bottom = (round(value) for value in box)
    return f"{left} – {right}, {top} – {bottom}"


def boxes_html(outlined: Outlined, most: int = 50) -> Markup:
    """Renders the image with the boxes, their numbers by class, and the boxes as a table."""
    found = outlined.found
    counts = [(label, count) for label, count in found.counts.items() if count]
    title = ", ".join(f"{label} {count}" for label, count in counts) or "Nothing found"
    lead = f"{outlined.milliseconds:.0f} ms. Boxes with a score of at least {outlined.threshold:.2f}."
    picture = tag(
        '<figure class="mm-map mm-outlined"><img src="{}" alt="{}: the image with boxes"></figure>',
        data_uri(small(found.overlay())),
        title,
    )
    rows = [[box.label, f"{box.score:.2f}", _sides(box.box)] for box in found.boxes[:most]]
    more = f", the first {most} of {len(found.boxes)}" if len(found.boxes) > most else ""
    boxes = NOTHING
    if rows:
        boxes = tag(
            '<details class="mm-more"><summary>Boxes{}</summary>{}</details>',
            more,
            table(["Class", "Score", "Columns, rows"], rows, "Boxes"),
        )
    return card(join([_warnings(found.notes), picture, boxes]), title[:1].upper() + title[1:], lead, css="mm-maps")


def small(picture: Image.Image) -> np.ndarray:
    """Returns a picture as pixels, reduced if its longer side exceeds what a page shows."""
    if max(picture.size) > LARGEST_SHOWN:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN))
    return np.asarray(picture)


def _warnings(notes: tuple[str, ...]) -> Markup:
    said = [in_app(note) for note in notes if note.startswith(WARNING)]
    return join(callout("warn", text[:1].upper() + text[1:]) for text in dict.fromkeys(said))


def about_html(dense: Offered) -> Markup:
    """Renders what the model is, what it was trained on, and its figures on test images."""
    info = dense.facts
    height, width = dense.facts.config.preprocess.input_size
    rows: list[tuple[object, object]] = [
        ("Finds", ", ".join(dense.facts.config.classes)),
        ("Trained on", info.dataset),
        (
            "Network",
            with_detail(info.config.encoder.architecture, f"{info.parameters / 1e6:.1f}M, {height}×{width}"),
        ),
    ]
    wanted = {"dice": "Dice", "iou": "IoU", "map50": "mAP50"}
    for name, score in info.scores("test"):
        metric, _, of_class = name.partition(", ")
        if metric in wanted and score["value"] is not None:
            low, high = score["low"], score["high"]
            span = "" if low is None or high is None else f"{low:.3f} – {high:.3f}"
            shown = ", ".join(filter(None, (wanted[metric], of_class, "test")))
            rows.append((shown, with_detail(f"{score['value']:.3f}", span)))
    rows.append(("Licence", licence_name(info.terms.name or info.terms.licence)))
    limits = info.training.get("limits") or ()
    text = "Areas and counts are only as good as the outlines. Check every one of them."
    more = tag('<details class="mm-more"><summary>Limits</summary>{}</details>', bullets(limits)) if limits else NOTHING
    return card(facts(rows) + more, "About this model", text)
