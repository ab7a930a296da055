"""Similar training images of an answer, and the map of a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.imaging.load import ImageError
from medmamba.inference.predict import Failure
from medmamba.inference.similar import Gallery, Match, Projection, SimilarError, project
from medmamba.pretrained import PretrainedError

from ..context import Context
from ..html import NOTHING, Markup, card, data_uri, error, join, licence_name, percent, pick_js, tag
from ..service import Answer, View
from ..store import Loaded
from ..theme import Html
from .classify import ClassifyTab

SHOWN = 6
WIDTH, HEIGHT, MARGIN = 640, 420, 22
SHAPES = ("circle", "square", "diamond", "triangle")
COLOURS = 8
"""Number of colours in style.css; classes beyond have another shape."""


def build(context: Context, classify: ClassifyTab) -> None:
    """Builds both and their events. Call inside the result column of the Classify tab."""
    similar = Html("", elem_id="mm-similar")
    button = gr.Button("Map of these images", size="sm", visible=False, elem_id="mm-map-batch")
    plot = Html("", js_on_load=pick_js("mm-index", "click"), elem_id="mm-embedding")

    def neighbours(title: str, request: gr.Request) -> Markup | str:
        """Renders the training images nearest to the displayed image."""
        session = context.sessions.of(request)
        if session.prediction is None or not session.images:
            return ""
        view = session.view or View()
        try:
            loaded = context.load(session, title)
            if loaded.gallery is None:
                return ""
            features = session.features
            if features is None:
                features = context.service.features(loaded.source, [session.images[session.current]], view)[0]
            return similar_html(loaded.gallery, loaded.gallery.nearest(features, SHOWN))
        except (SimilarError, ImageError, PretrainedError, ConfigError, OSError, ValueError):
            return ""  # the answer above says what is wrong with the image

    def offer(request: gr.Request) -> dict[Any, Any]:
        """Offers the map for several readable images."""
        results = context.sessions.of(request).results
        several = sum(isinstance(result, Answer) for result in results) > 1
        return {button: gr.update(visible=several), plot: ""}

    def draw(title: str, request: gr.Request) -> Markup:
        session = context.sessions.of(request)
        answers = [(i, r) for i, r in enumerate(session.results) if not isinstance(r, Failure)]
        try:
            loaded = context.load(session, title)
            paths = [session.images[i] for i, _ in answers]
            features = context.service.features(loaded.source, paths, View())
            gallery = loaded.gallery
            found = project(features, gallery.features if gallery else None)
        except (SimilarError, ImageError, PretrainedError, ConfigError, OSError, ValueError) as problem:
            return error("The map could not be drawn", str(problem))
        points = [Point(i, session.images[i].name, answer.prediction.label) for i, answer in answers]
        return map_html(found, points, loaded)

    quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden", concurrency_id="similar")
    classify.result.change(neighbours, classify.model, similar, trigger_mode="always_last", **quiet)
    classify.batch.change(offer, None, [button, plot], **quiet)
    button.click(
        draw, classify.model, plot, show_progress_on=[plot], api_visibility="private", concurrency_id="similar"
    )
    classify.opens(plot)


@dataclasses.dataclass(frozen=True)
class Point:
    """An image on the map: its index, name and predicted class."""

    index: int
    name: str
    label: str


def similar_html(gallery: Gallery, matches: Sequence[Match]) -> Markup:
    """Renders the nearest training images with class and distance, and whose images they are."""
    low, high = gallery.typical
    cells = join(
        tag(
            '<li><img src="{}" alt="Training image: {}" loading="lazy"><strong>{}</strong><span>{:.2f}</span></li>',
            data_uri(gallery.picture(match.index), exact=False),
            match.label,
            match.label,
            match.distance,
        )
        for match in matches
    )
    far = NOTHING
    if matches and matches[0].distance > high:
        far = tag(
            '<p class="mm-where">Nothing like this is among them: the nearest is farther away than 95 % of training '
            "images are from their nearest neighbour.</p>"
        )
    lead = (
        "Nearest in the model’s features, of a sample of its training images. They show what the model has seen, not "
        "whether it is right."
    )
    return card(
        tag(
            '<ul class="mm-similar">{}</ul>{}<p class="mm-source">Below each: class and distance; training images are '
            "{:.2f} to {:.2f} from their nearest neighbour. {} images. {}</p>",
            cells,
            far,
            low,
            high,
            licence_name(gallery.licence),
            gallery.attribution,
        ),
        "Training images most like this one",
        lead,
    )


def map_html(found: Projection, points: Sequence[Point], loaded: Loaded) -> Markup:
    """Renders the images as points, coloured by prediction, over those of the gallery, faint."""
    labels, gallery = loaded.config.labels, loaded.gallery
    everything = [*found.points.tolist(), *found.background.tolist()]
    xs, ys = [p[0] for p in everything], [p[1] for p in everything]
    place = _placer((min(xs), max(xs)), (min(ys), max(ys)))
    number = {label: i for i, label in enumerate(labels)}
    faint = NOTHING
    if gallery is not None:
        of_class = [number.get(gallery.classes[k], 0) for k in gallery.labels]
        marks = (_mark(place(p), k, 2.4) for p, k in zip(found.background.tolist(), of_class, strict=True))
        faint = tag('<g class="mm-background">{}</g>', join(marks))
    own = join(
        tag(
            '<g role="button" tabindex="0" data-mm-index="{}" aria-label="{}: {}"><title>{}: {}</title>{}</g>',
            point.index,
            point.name,
            point.label,
            point.name,
            point.label,
            _mark(place(p), number.get(point.label, 0), 6.5),
        )
        for p, point in zip(found.points.tolist(), points, strict=True)
    )
    used = list(dict.fromkeys(point.label for point in points))
    if gallery is not None:
        used += [name for name in gallery.classes if name not in used]
    legend = join(
        tag('<li><svg viewBox="-8 -8 16 16" width="14" height="14" aria-hidden="true">{}</svg>{}</li>', mark, name)
        for name, mark in ((name, _mark((0, 0), number.get(name, 0), 6.0)) for name in used)
    )
    first, second = found.explained
    small = " Small faint points are training images." if gallery is not None else ""
    lead = (
        "Images that look alike to the model lie together; colour and shape are the predicted class. Select a point to "
        f"open its image.{small}"
    )
    shares = f"Principal components of the features: {percent(first)} and {percent(second)} of the variance."
    return card(
        tag(
            '<figure class="mm-embedding"><svg viewBox="0 0 {} {}" role="group" aria-label="Map of the images">{}{}'
            "</svg><ul>{}</ul><figcaption>{}</figcaption></figure>",
            WIDTH,
            HEIGHT,
            faint,
            own,
            legend,
            shares,
        ),
        "Map of these images",
        lead,
    )


def _placer(
    x_range: tuple[float, float], y_range: tuple[float, float]
) -> Callable[[Sequence[float]], tuple[float, float]]:
    """Returns a function from a point to its place in the drawing."""

    def scaled(value: float, low: float, high: float, size: int) -> float:
        share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.5
        return MARGIN + share * (size - 2 * MARGIN)

    return lambda p: (scaled(p[0], *x_range, WIDTH), HEIGHT - scaled(p[1], *y_range, HEIGHT))


def _mark(at: tuple[float, float], number: int, radius: float) -> Markup:
    """Draws the mark of a class at a place."""
    x, y = at
    colour, shape = number % COLOURS, SHAPES[(number // COLOURS) % len(SHAPES)]
    r = radius
    if shape == "circle":
        return tag('<circle class="mm-c{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>', colour, x, y, r)
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)],
        "triangle": [(0, -1.2 * r), (1.1 * r, r), (-1.1 * r, r)],
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return tag('<polygon class="mm-c{}" points="{}"/>', colour, points)
