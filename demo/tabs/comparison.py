"""HTML of the Compare tab: agreement, the paired test, and the images on which two models differ."""

from __future__ import annotations

import math
from pathlib import Path

from medmamba.data import ImageDataset
from medmamba.evaluation import Pair
from medmamba.evaluation.pair import image_name
from medmamba.evaluation.review import label_text

from ..advice import in_app
from ..html import NOTHING, Markup, callout, card, facts, join, percent, table, tag
from .evaluation import SHOWN, thumbnail


def set_html(images: ImageDataset | list[Path], name: str) -> Markup:
    """Renders which images are compared."""
    if isinstance(images, ImageDataset):
        text = f"{len(images)} images, {len(images.classes)} classes: which model is right more often is tested."
    else:
        text = f"{len(images)} images without labels: only where the models differ is shown."
    return card(tag('<p class="mm-hint">{}</p>', text), name, css="mm-tight")


def summary_html(found: Pair) -> Markup:
    """Renders agreement and, with labels, which model is right more often."""
    said = []
    if found.failures:
        name, reason = found.failures[0]
        text = f"{Path(name).name}: {in_app(reason)}"
        said.append(callout("warn", f"{len(found.failures)} images could not be read and are left out", text))
    same = int(found.same.sum())
    rows: list[tuple[object, object]] = [
        ("Same answer", f"{same} of {len(found)} images ({percent(found.agreement)})"),
        ("Cohen's kappa", "" if math.isnan(found.kappa) else f"{found.kappa:.2f}"),
        ("Largest difference of a probability", percent(float(found.difference.max()))),
    ]
    body = [*said, facts(rows)]
    if found.outcome is not None:
        body.append(outcome_html(found))
    return card(join(body), f"{found.names[0]} and {found.names[1]}", css="mm-evaluated")


def outcome_html(found: Pair) -> Markup:
    """Renders the paired test of two models on labelled images."""
    outcome = found.outcome
    if outcome is None:
        return NOTHING
    first, second = found.names
    gap = outcome.difference
    between = "" if math.isnan(gap.low) else f" ({gap.low:+.3f} to {gap.high:+.3f})"
    p = "below 0.0001" if outcome.p < 1e-4 else f"{outcome.p:.2g}"
    rows = [
        [f"Accuracy of {first}", f"{outcome.accuracy[0]:.3f}"],
        [f"Accuracy of {second}", f"{outcome.accuracy[1]:.3f}"],
        [f"Difference, with {outcome.level:.0%} interval", f"{gap.value:+.3f}{between}"],
        ["Both right; both wrong", f"{outcome.both}; {outcome.neither}"],
        [f"Only {first} right; only {second}", f"{outcome.first_only}; {outcome.second_only}"],
        ["p, McNemar's exact test", p],
    ]
    caption = f"The same {outcome.n} images, so the test is paired; interval by {outcome.resampled_by}"
    note = "A test without a difference does not show that there is none." if outcome.p > 0.05 else ""
    shown = table(["", "Value"], rows, caption, css="mm-outcome")
    return tag('<div class="mm-results">{}{}</div>', shown, tag('<p class="mm-hint">{}</p>', note) if note else NOTHING)


def differences_html(found: Pair) -> Markup:
    """Renders the images on which the models differ most, with both answers."""
    order = found.most_different()
    different = int((~found.same).sum())
    rows: list[list[object]] = []
    for row in order[:SHOWN]:
        record = found.index.records[int(row)]
        name = tag('<span class="mm-file">{}<span>{}</span></span>', thumbnail(found.index, record), image_name(record))
        answers = [_answer(found, number, int(row)) for number in (0, 1)]
        gap = found.difference[row]
        number = tag('<span data-mm-value="{:.6f}">{}</span>', gap, percent(float(gap)))
        truth = [label_text(record.label, found.classes)] if found.outcome is not None else []
        rows.append([name, *answers, number, *truth])
    header = ["Image", *found.names, "Difference", *(["True class"] if found.outcome is not None else [])]
    text = f"{different} images get different answers." if different else "No image gets different answers."
    text += " Below are those with the largest difference of a probability."
    if len(order) > SHOWN:
        text += f" The first {SHOWN} of {len(order):,}; the table has all."
    return card(table(header, rows, "Where the models differ", css="mm-batch mm-pairs"), "Where they differ", text)


def _answer(found: Pair, number: int, row: int) -> Markup:
    """Renders the answer of a model, and whether it is right."""
    said, p = found.said[number][row], found.probabilities[number][row]
    label = label_text(said, found.classes)
    share = percent(float(p.max()))
    if found.outcome is None:
        return tag("{}<small>{}</small>", label, share)
    right = bool((said == found.index.labels[row]).all())
    mark = Markup("right") if right else Markup('<span class="mm-tag mm-error">wrong</span>')
    return tag("{}<small>{}, {}</small>", label, share, mark)
