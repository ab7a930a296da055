"""HTML of the Evaluate tab: the images, metrics, ROC curve, confusion matrix, galleries, subgroups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from medmamba.data import ImageDataset, Record
from medmamba.decision import Curve, Performance
from medmamba.evaluation import Review
from medmamba.imaging.load import ImageError
from medmamba.metrics.group_result import Subgroups

from ..advice import in_app
from ..charts import Line, chart
from ..html import (
    NOTHING,
    Markup,
    bullets,
    callout,
    card,
    data_uri,
    facts,
    join,
    percent,
    table,
    tag,
    with_detail,
)
from ..labelled import LabelledSet
from ..service import reduced
from .answers import squeeze
from .decide import rate
from .finetune import duration
from .results import overall_html, per_class_html

SHOWN = 24
"""Images in a gallery; the table holds all."""
THUMBNAIL = 168
FEW = 100


def set_html(found: LabelledSet, split: str | None = None) -> Markup:
    """Renders the contents of an uploaded set."""
    index = found.index
    counts = zip(index.classes, index.class_counts, strict=True)
    classes = bullets((f"{name} · {count}" for name, count in counts), "mm-classes")
    rows: list[tuple[object, object]] = [(f"{len(index)} images, {len(index.classes)} classes", classes)]
    if found.splits:
        rows.append(("Splits", ", ".join(f"{n} {name or 'without'}" for name, n in index.split_sizes.items())))
    if patients := len({patient for patient in index.patients if patient is not None}):
        rows.append(("Patients", f"{patients:,}, which the intervals take into account"))
    if found.table is not None:
        rows.append(("Table", with_detail(found.table.name, _columns_text(found))))
    if index.notes:
        rows.append(("Notes", bullets(in_app(note) for note in index.notes)))
    return card(facts(rows), found.name, css="mm-tight")


def _columns_text(found: LabelledSet) -> str:
    if not found.columns:
        return "no column divides the images into groups"
    return f"groups by {', '.join(found.columns)}"


def mapping_html(names: dict[str, str]) -> Markup:
    """Renders which class of the visitor would be taken for which class of the model."""
    rows = [[tag("<strong>{}</strong>", own), theirs] for own, theirs in names.items()]
    return table(["Your class", "The model's class"], rows, "Taken in the order of the names")


def progress_html(done: int, total: int, seconds: float) -> Markup:
    """Renders how far an evaluation is."""
    share = 100 * done / max(total, 1)
    bar = tag(
        '<div class="mm-progress" role="progressbar" aria-label="Evaluation" aria-valuemin="0" aria-valuemax="100" '
        'aria-valuenow="{share:.0f}"><span style="width:{share:.1f}%"></span></div>',
        share=share,
    )
    if not done:
        text = "This server evaluates one set at a time."
    elif done < total:
        text = f"{duration(seconds)} elapsed, about {duration(seconds * (total - done) / done)} left"
    else:
        text = "Computing the intervals and the report"
    title = f"{done:,} of {total:,} images" if done else "Starting"
    return card(bar, title, text, attributes=Markup('aria-live="off"'))


def summary_html(found: Review, seconds: float) -> Markup:
    """Renders what the evaluation found: first what limits it, then the metrics."""
    evaluation = found.scored.evaluation
    said = []
    if found.failures:
        names = ", ".join(name for name, _ in found.failures[:3])
        text = f"{names}: {in_app(found.failures[0][1])}"
        said.append(callout("warn", f"{len(found.failures)} images could not be read and are left out", text))
    if drift := unusual_html(found):
        said.append(drift)
    if evaluation.n_images < FEW:
        text = "The intervals say how uncertain the figures are." if evaluation.resamples else ""
        said.append(callout("warn", f"Only {evaluation.n_images} images", text))
    for note in evaluation.notes:
        said.append(callout("info", note))
    head = f"{found.model} on {evaluation.n_images:,} images"
    wilson = ", Wilson's where a proportion is 0 or 1" if evaluation.has_wilson else ""
    by = "patients" if evaluation.n_patients else "images"
    took = f"In {duration(seconds)}. 95 % intervals by resampling {by}{wilson}."
    body = tag('<div class="mm-results">{}{}</div>', per_class_html(evaluation, "evaluated"), overall_html(evaluation))
    return card(join([*said, body]), head, took, css="mm-evaluated")


def unusual_html(found: Review) -> Markup:
    """Renders the share of images unlike the training images; a warning if it is far above the expected."""
    if found.unusual is None:
        return NOTHING
    flagged, total = int(found.unusual.sum()), len(found)
    right = np.ones(total, bool)
    right[found.worst()] = False
    title = f"{flagged} of {total} images ({percent(flagged / total)}) look unlike the model's training images"
    text = "About 5 % of images of the same kind are flagged by design."
    if flagged and flagged < total:
        flags = found.unusual
        text += f" Right: {percent(right[flags].mean())} of the flagged, {percent(right[~flags].mean())} of the others."
    return callout("warn" if flagged > 0.1 * total and flagged > 3 else "info", title, text)


def roc_html(curve: Curve, at: Performance, wanted: str, auroc: float) -> Markup:
    """Draws the ROC curve with the point of the chosen threshold."""
    x = [0.0, *(fp / max(curve.negatives, 1) for fp in curve.fp), 1.0]
    y = [0.0, *(tp / max(curve.positives, 1) for tp in curve.tp), 1.0]
    lines = [Line("ROC curve", x, y, "a"), Line("chance", [0, 1], [0, 1], "faint")]
    if not math.isnan(at.specificity.value) and not math.isnan(at.sensitivity.value):
        lines.append(Line("this threshold", [1 - at.specificity.value], [at.sensitivity.value], "b"))
    area = "" if math.isnan(auroc) else f", AUROC {auroc:.3f}"
    return chart(lines, f"{wanted}{area}", "1 - specificity", "sensitivity", (0, 1), (0, 1))


def point_html(found: Review, wanted: str, threshold: float, prevalence: float) -> Markup:
    """Renders what a threshold achieves on these images.

    Args:
        threshold, prevalence: in percent.
    """
    at = found.at([wanted], threshold / 100, prevalence / 100)
    counts = at.counts
    shown, others = counts.tp + counts.fn, counts.fp + counts.tn
    rows = [
        ["Sensitivity", rate(at.sensitivity), f"finds {counts.tp} of {shown} with {wanted}"],
        ["Specificity", rate(at.specificity), f"clears {counts.tn} of {others} without"],
        ["PPV", rate(at.ppv), f"share with {wanted} among those called positive, if {prevalence:g} % of all have it"],
        ["NPV", rate(at.npv), f"share without {wanted} among those called negative"],
    ]
    score = next(row for row in found.scored.evaluation.per_class if row.name == wanted).scores["auroc"].value
    drawn = roc_html(found.curve([wanted]), at, wanted, score)
    note = tag(
        '<p class="mm-hint">With 95 % intervals. A threshold chosen on these images looks better on them than it '
        "will on others: choose it on one part, and report it on another.</p>"
    )
    caption = f"An image is called positive if its probability for {wanted} is at least {threshold:g} %"
    return tag(
        '<div class="mm-point">{}<div>{}{}</div></div>', drawn, table(["", "Estimate", "Meaning"], rows, caption), note
    )


def confusion_html(found: Review) -> Markup:
    """Renders the confusion matrix; each cell with images is a button that shows them."""
    evaluation = found.scored.evaluation
    if evaluation.task == "multilabel":
        return NOTHING
    names = evaluation.classes
    head = join(tag('<th scope="col">{}</th>', name) for name in names)
    rows = []
    for i, row in enumerate(evaluation.confusion):
        total = sum(row) or 1
        cells = join(_cell(names, i, j, int(count), count / total) for j, count in enumerate(row))
        rows.append(tag('<tr><th scope="row">{}</th>{}</tr>', names[i], cells))
    body = tag(
        '<div class="mm-scroll" tabindex="0" role="region" aria-label="Confusion matrix of the evaluation">'
        '<table class="mm-confusion"><caption>Rows: true class. Columns: predicted class. Select a number to see its '
        "images.</caption><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>",
        head,
        join(rows),
    )
    return card(body, "Confusion matrix")


def _cell(names: Sequence[str], i: int, j: int, count: int, share: float) -> Markup:
    if not count:
        return Markup("<td>0</td>")
    return tag(
        '<td style="--share:{:.3f}"><button type="button" data-mm-cell="{},{}" '
        'aria-label="{} images of {}, predicted {}">{}</button></td>',
        share, i, j, count, names[i], names[j], count,
    )  # fmt: skip


def gallery_html(found: Review, rows: Sequence[int] | np.ndarray, title: str, text: str = "") -> Markup:
    """Renders images with their names, truth and prediction; at most `SHOWN`."""
    total = len(rows)
    p = found.probabilities
    items = join(_item(found, int(row), p[int(row)]) for row in rows[:SHOWN])
    if total > SHOWN:
        text = f"{text} The first {SHOWN} of {total:,}; the table below has all.".strip()
    return card(tag('<ul class="mm-gallery">{}</ul>', items), title, text)


def _item(found: Review, row: int, p: np.ndarray) -> Markup:
    record = found.index.records[row]
    best = int(p.argmax())
    flagged = found.unusual is not None and bool(found.unusual[row])
    mark = Markup('<span class="mm-tag mm-warn">unusual</span>') if flagged else NOTHING
    return tag(
        "<li>{}<strong>{}</strong><span>{}, predicted {} ({})</span>{}</li>",
        thumbnail(found.index, record),
        str(record.source).rpartition("/")[2],
        found.truth(row),
        found.classes[best],
        percent(float(p[best])),
        mark,
    )


def thumbnail(index: ImageDataset, record: Record) -> Markup:
    """Renders a small picture of an image of a set, read now; an empty box if it is gone."""
    try:
        pixels = squeeze(reduced(index.reader.read(record), THUMBNAIL).to_uint8())
    except (ImageError, OSError, ValueError):  # replaced meanwhile
        return Markup("<i></i>")
    return tag('<img src="{}" alt="">', data_uri(pixels, exact=False))


def mistakes_html(found: Review) -> Markup:
    """Renders the misclassified images, the most confident errors first."""
    rows = found.worst()
    if not len(rows):
        return card(callout("good", "No image is misclassified"), "Worst mistakes")
    share = percent(len(rows) / len(found))
    return gallery_html(found, rows, "Worst mistakes", f"{len(rows):,} errors ({share}), most confident first.")


def _with_interval(text: str) -> Markup:
    """Renders "0.938 (0.844 to 1.000)" with the interval below the value."""
    value, _, interval = text.partition(" (")
    return tag("{}<small>{}</small>", value, interval.rstrip(")").replace(" to ", " – "))


def subgroups_html(found: Subgroups | None) -> Markup:
    """Renders the metrics of each group, with gaps and tests."""
    if found is None:
        return NOTHING
    parts: list[Markup] = []
    for column in found.columns:
        header, rows = found.rows(column)
        cells = [[row[0], *map(_with_interval, row[1:])] for row in rows]
        parts.append(table(list(header), cells, f"By {column}", css="mm-groups"))
        warnings = [f"{group.name}: {text}" for group in found.of(column) for text in group.warnings]
        if warnings:
            parts.append(tag('<div class="mm-hint">* Unreliable: {}</div>', bullets(warnings)))
    notes = [in_app(note) for note in found.notes]
    if notes:
        parts.append(
            tag('<details class="mm-more"><summary>How the groups were made</summary>{}</details>', bullets(notes))
        )
    return card(tag('<div class="mm-results">{}</div>', join(parts)), "Subgroups", found.summary())
