"""Corrected labels of a batch: set in its table, exported as a CSV file that `medmamba train --data` reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.inference.predict import Failure
from medmamba.utils.tables import csv_row

from ..html import Markup, callout, join, tag
from ..service import Answer
from ..sessions import Session
from ..theme import Html

HEADER = ("path", "label", "predicted", "probability", "corrected")
LEAD = (
    "Choose the true class in the last column where you know it. Images without one are left out. Put the file beside "
    "the images and train with it: medmamba train --data labels.csv"
)
Updates = dict[Any, Any]


@dataclass
class LabelBar:
    """The components below the table of a batch."""

    group: gr.Group
    said: Any
    accept: gr.Button
    download: gr.DownloadButton

    @property
    def parts(self) -> list[Any]:
        return [self.group, self.said, self.download]

    def hidden(self) -> Updates:
        """Returns updates that hide the bar."""
        return {self.group: gr.update(visible=False)}

    def update(self, session: Session, results: Sequence[Answer | Failure], classes: Sequence[str]) -> Updates:
        """Returns updates for the current labels; hides the bar where one class per image makes no sense."""
        if not classes:
            return self.hidden()
        known = {i: label for i, label in session.labels.items() if label in classes}
        updates: Updates = {self.group: gr.update(visible=True), self.said: said_html(session.images, results, known)}
        if not known:
            return {**updates, self.download: gr.update(visible=False)}
        path = session.new_download("labels.csv")
        path.write_text(labels_csv(session.images, results, known), encoding="utf-8")
        return {**updates, self.download: gr.update(value=str(path), visible=True)}


def build() -> LabelBar:
    """Builds the components, hidden. Call inside `gr.Blocks`."""
    with gr.Group(visible=False, elem_id="mm-labels") as group:
        said = Html("")
        with gr.Row():
            accept = gr.Button("Accept all other predictions", size="sm", elem_id="mm-accept")
            download = gr.DownloadButton("Download labels (CSV)", size="sm", visible=False, elem_id="mm-labels-csv")
    return LabelBar(group, said, accept, download)


def classes_of(task: str, labels: Sequence[str]) -> list[str]:
    """Returns the classes to choose from: none for multi-label models, whose images have several."""
    return [] if task == "multilabel" else list(labels)


def choice_html(index: int, name: str, classes: Sequence[str], chosen: str) -> Markup:
    """Renders the menu of a row."""
    options = join(
        tag('<option value="{name}" {chosen}>{name}</option>', name=c, chosen=_SELECTED if c == chosen else "")
        for c in classes
    )
    return tag(
        '<select class="mm-select" data-mm-label="{}" aria-label="True class of {}"><option value="">not set</option>{}'
        "</select>",
        index,
        name,
        options,
    )


_SELECTED = Markup("selected")


def accepted(results: Sequence[Answer | Failure], known: Mapping[int, str]) -> dict[int, str]:
    """Returns the labels with the prediction for every image that has none."""
    predicted = {i: r.prediction.label for i, r in enumerate(results) if not isinstance(r, Failure)}
    return {**predicted, **known}


def said_html(paths: Sequence[Path], results: Sequence[Answer | Failure], known: Mapping[int, str]) -> Markup:
    """Renders how many labels are set, and what they say of the predictions."""
    readable = sum(not isinstance(r, Failure) for r in results)
    text = f"{len(known)} of {readable} images have a label"
    if known:
        wrong = sum(_wrong(results[i], label) for i, label in known.items())
        text += f"; {wrong} of them differ{'s' if wrong == 1 else ''} from the prediction"
    same = len({paths[i].name for i in known}) < len(known)
    twice = callout("warn", "Two of these images have the same name", "Rename one before you train.") if same else ""
    return tag('<div class="mm-labels-said"><p><strong>{}.</strong> {}</p>{}</div>', text, LEAD, twice)


def labels_csv(paths: Sequence[Path], results: Sequence[Answer | Failure], known: Mapping[int, str]) -> str:
    """Returns the labels as CSV: path and label, as `open_dataset` reads them, and the prediction beside them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for i in sorted(known):
        result, label = results[i], known[i]
        predicted: list[Any] = ["", ""]
        if not isinstance(result, Failure):
            predicted = [result.prediction.label, f"{result.prediction.probability:.6f}"]
        writer.writerow(csv_row([paths[i].name, label, *predicted, "yes" if _wrong(result, label) else "no"]))
    return text.getvalue()


def _wrong(result: Answer | Failure, label: str) -> bool:
    return not isinstance(result, Failure) and result.prediction.label != label
