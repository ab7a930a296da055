"""The decision panel of the Classify tab: an operating point to move along, and what it is worth at a prevalence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from medmamba.decision import Decisions, OperatingPoint, indices, perform, score
from medmamba.decision.intervals import Proportion
from medmamba.inference.fitted import in_force
from medmamba.inference.predict import Prediction
from medmamba.metrics.calibration import to_probabilities

from ..context import Context
from ..html import NOTHING, Markup, callout, card, join, percent, table, tag
from ..store import Loaded
from ..theme import Html

TITLE = "Decide"
Updates = dict[Any, Any]


@dataclass
class Panel:
    """Components of the panel; `update` sets them for an answer."""

    group: gr.Group
    point: gr.Dropdown
    sensitivity: gr.Slider
    prevalence: gr.Slider
    readout: Any  # an `Html`

    @property
    def parts(self) -> list[Any]:
        """All components, as outputs of an event."""
        return [self.group, self.point, self.sensitivity, self.prevalence, self.readout]

    def hidden(self) -> Updates:
        """Returns updates that hide the panel."""
        return {self.group: gr.update(visible=False), self.readout: ""}

    def update(self, loaded: Loaded, prediction: Prediction) -> Updates:
        """Returns updates for a new answer, at the stored operating point; hides the panel where there is none."""
        points = curves_of(loaded)
        if not points:
            return self.hidden()
        point = points[0]
        wanted, share = start_of(point)
        return {
            self.group: gr.update(visible=True),
            self.point: gr.update(choices=[titled(p) for p in points], value=titled(point), visible=len(points) > 1),
            self.sensitivity: gr.update(value=wanted, label=slider_label(point)),
            self.prevalence: gr.update(value=share),
            self.readout: readout(loaded, prediction, point, wanted, share),
        }


def build(context: Context, model: gr.Dropdown) -> Panel:
    """Builds the panel, hidden, and its events. Call inside `gr.Blocks`."""
    with gr.Group(visible=False, elem_id="mm-decide") as group:
        point = gr.Dropdown([], label="Decide about", filterable=False, elem_id="mm-decide-point")
        sensitivity = gr.Slider(0, 100, 90, step=1, label="Sensitivity (%)", buttons=[], elem_id="mm-decide-se")
        prevalence = gr.Slider(
            0.1, 99, 10, step=0.1, label="Prevalence where it is used (%)", buttons=[], elem_id="mm-decide-pi"
        )
        readout_ = Html("", elem_id="mm-decide-readout")
    panel = Panel(group, point, sensitivity, prevalence, readout_)

    def find(title: str, wanted: str, request: gr.Request) -> tuple[Loaded, Prediction | None, OperatingPoint | None]:
        session = context.sessions.of(request)
        loaded = context.load(session, title)
        points = {titled(p): p for p in curves_of(loaded)}
        return loaded, session.prediction, points.get(wanted) or next(iter(points.values()), None)

    def moved(title: str, wanted: str, se: float, pi: float, request: gr.Request) -> Any:
        loaded, prediction, found = find(title, wanted, request)
        return "" if prediction is None or found is None else readout(loaded, prediction, found, se, pi)

    def chosen(title: str, wanted: str, pi: float, request: gr.Request) -> Updates:
        loaded, prediction, found = find(title, wanted, request)
        if prediction is None or found is None:
            return panel.hidden()
        se, _ = start_of(found)
        label = slider_label(found)
        html = readout(loaded, prediction, found, se, pi)
        return {sensitivity: gr.update(value=se, label=label), readout_: html}

    shared: dict[str, Any] = dict(api_visibility="private", show_progress="hidden", trigger_mode="always_last")
    gr.on([sensitivity.input, prevalence.input], moved, [model, point, sensitivity, prevalence], readout_, **shared)
    point.input(chosen, [model, point, prevalence], [group, sensitivity, readout_], **shared)
    return panel


def stored(loaded: Loaded) -> Decisions:
    """Returns the decisions of a model that are valid for its weights and preprocessing."""
    return Decisions.from_config(in_force(loaded.model).config)


def curves_of(loaded: Loaded) -> list[OperatingPoint]:
    """Returns one operating point with a validation curve for each group of classes."""
    found: dict[tuple[str, ...], OperatingPoint] = {}
    for point in stored(loaded).points:
        if point.curve is not None:
            found.setdefault(point.classes, point)
    return list(found.values())


def titled(point: OperatingPoint) -> str:
    """Returns the classes of an operating point for display."""
    return " or ".join(point.classes)


def slider_label(point: OperatingPoint) -> str:
    """Returns the label of the slider, which says what is found."""
    return f"Share of “{titled(point)}” to find, on validation (%)"


def start_of(point: OperatingPoint) -> tuple[float, float]:
    """Returns the sensitivity of the stored threshold and the prevalence of the validation images, in percent."""
    return round(100 * point.counts.sensitivity().value), round(100 * point.counts.prevalence, 1)


def place(point: OperatingPoint, sensitivity: float) -> int:
    """Returns the index of the highest threshold of the curve with at least this sensitivity, in percent."""
    curve = point.curve
    assert curve is not None
    stored_at = curve.nearest(point.threshold)
    if sensitivity == start_of(point)[0]:
        return stored_at  # of several thresholds with this sensitivity, that of the model
    needed = math.floor(sensitivity / 100 * curve.positives + 0.5)
    return int(np.searchsorted(np.array(curve.tp), needed, side="left").clip(0, len(curve) - 1))


def readout(
    loaded: Loaded, prediction: Prediction, point: OperatingPoint, sensitivity: float, prevalence: float
) -> Markup:
    """Renders what a threshold says of the image, and what it achieves.

    Args:
        sensitivity: wanted, in percent.
        prevalence: in percent.
    """
    curve = point.curve
    assert curve is not None
    index = place(point, float(sensitivity))
    threshold = point.threshold if index == curve.nearest(point.threshold) else curve.thresholds[index]
    config = in_force(loaded.model).config
    temperature = float(config.calibration.get("temperature", 1.0))
    p = to_probabilities([prediction.logits], config.task, temperature)
    value = float(score(p, indices(point.classes, config.labels), config.task)[0])
    found = perform(curve.counts(index), min(max(float(prevalence) / 100, 0.0), 1.0))
    counts, what = found.counts, titled(point)
    yes = value >= threshold
    verdict = tag(
        '<p class="mm-decision {}"><strong>{}</strong> <span>probability {}, threshold {}</span></p>',
        "mm-positive" if yes else "mm-negative",
        f"{'Positive' if yes else 'Negative'} for {what}",
        percent(value),
        percent(threshold),
    )
    positives, negatives = counts.tp + counts.fn, counts.fp + counts.tn
    rows = [
        ["Sensitivity", rate(found.sensitivity), f"finds {counts.tp} of {positives} with {what}"],
        ["Specificity", rate(found.specificity), f"clears {counts.tn} of {negatives} without"],
        ["PPV", rate(found.ppv), f"share of {what} among images called positive, if {prevalence:g} % of all are"],
        ["NPV", rate(found.npv), f"share without {what} among images called negative"],
    ]
    note = tag(
        '<p class="mm-hint">Measured on the {} validation images that chose it, with 95 % intervals: expect '
        "less on other images, and something else at another site.{}</p>",
        f"{positives + negatives:,}",
        tested(loaded, point) if index == curve.nearest(point.threshold) else "",
    )
    return card(join([verdict, table(["", "Estimate", "Meaning"], rows, "At this threshold"), note]), TITLE)


def rate(estimate: Proportion) -> str:
    """Formats a share with its interval."""
    if math.isnan(estimate.value):
        return "not defined"
    return f"{percent(estimate.value)} ({percent(estimate.low)} – {percent(estimate.high)})"


def tested(loaded: Loaded, point: OperatingPoint) -> str:
    """Returns how the stored threshold fared on test images, or ""."""
    row = loaded.facts.decided.get("operating_points", {}).get(point.name)
    if not row or row["sensitivity"]["value"] is None or row["specificity"]["value"] is None:
        return ""
    se, sp = (rate(Proportion(**row[name])) for name in ("sensitivity", "specificity"))
    images = loaded.facts.decided["data"]["images"]
    return f" The stored threshold on {images:,} test images: sensitivity {se}, specificity {sp}."


def remarks(loaded: Loaded, prediction: Prediction) -> Markup:
    """Renders the sets and abstentions of an answer."""
    entries = {entry.name: entry for entry in stored(loaded).sets}
    parts = []
    for decision in prediction.decisions:
        if decision.kind == "set":
            text = entries[decision.name].statement(loaded.config.labels) if decision.name in entries else ""
            answer = decision.answer[:1].upper() + decision.answer[1:]
            parts.append(callout("info", answer, text))
        elif decision.kind == "abstention" and decision.withheld:
            parts.append(
                callout("warn", "The model would rather not answer", f"{decision.answer}, by its rule {decision.name}.")
            )
    return join(parts) if parts else NOTHING
