"""HTML of test results: per class first, then overall, confusion matrix and reliability diagram."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from medmamba.decision.intervals import proportion
from medmamba.metrics import Evaluation
from medmamba.metrics.result import MACRO, TITLES, Estimate, overall_title

from ..html import NOTHING, Markup, data_uri, interval_text, join, table, tag

CLASS_METRICS = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "PPV",
    "npv": "NPV",
    "auroc": "AUROC",
}
"""Metric of a class to its column."""
OVERALL = ("accuracy", "balanced_accuracy", "auroc", "f1", "ece")
MANY = 12
"""Number of classes above which the confusion matrix is collapsed."""
RELIABILITY = "reliability.png"
_NO_CERTAINTY = "An interval of a single number is no certainty: all resamples of the images gave the same."
_LARGEST_PLOT = 4_000_000  # pixels; a model folder may come from anywhere


def results_html(evaluation: Evaluation, split: str, folder: Path | None = None) -> Markup:
    """Renders the results of a model on a split.

    Args:
        folder: model folder, for the reliability diagram.
    """
    confusion = confusion_html(evaluation)
    if confusion and len(evaluation.classes) > MANY:
        confusion = tag("<details><summary>Confusion matrix</summary>{}</details>", confusion)
    parts = [per_class_html(evaluation, split), overall_html(evaluation), confusion, reliability_html(folder)]
    return tag('<div class="mm-results">{}</div>', join(parts))


def per_class_html(evaluation: Evaluation, split: str) -> Markup:
    """Renders number of images, sensitivity, specificity, PPV, NPV and AUROC of each class."""
    names = [name for name in CLASS_METRICS if any(name in row.scores for row in evaluation.per_class)]
    rows: list[list[object]] = []
    for row in evaluation.per_class:
        cells = [_cell(row.scores.get(name)) for name in names]
        rows.append([tag("<strong>{}</strong>", row.name), f"{row.support:,}", *cells])
    header = ["Class", "Images", *(CLASS_METRICS[name] for name in names)]
    caption = f"Each class against the rest, on the {split} images"
    return table(header, rows, caption, sort=len(rows) > 2, css="mm-per-class") + single_numbers_html(evaluation)


def single_numbers_html(evaluation: Evaluation) -> Markup:
    """Renders what an interval from 1 to 1, or from 0 to 0, does not mean; nothing where there is none."""
    found = [
        (row.support, score.value)
        for row in evaluation.per_class
        for name, score in row.scores.items()
        if name == "sensitivity" and row.support and score.low == score.high == score.value
    ]
    if not found:  # proportions have intervals of their own; older results do not
        same = any(
            s.low == s.high == s.value for row in evaluation.per_class if row.support for s in row.scores.values()
        )
        return tag('<p class="mm-hint">{}</p>', _NO_CERTAINTY) if same else NOTHING
    n, value = min(found)
    count = round(n * value)
    rate = proportion(count, n, evaluation.level)
    return tag(
        '<p class="mm-hint">{} {} of {} images found allow a sensitivity from {:.3f} to {:.3f} (Wilson, {:.0%}).</p>',
        _NO_CERTAINTY, count, n, rate.low, rate.high, evaluation.level,
    )  # fmt: skip


def overall_html(evaluation: Evaluation) -> Markup:
    """Renders the overall metrics; means over the classes are called macro averages."""
    rows: list[list[object]] = []
    for name in OVERALL:
        estimate = evaluation.overall.get(name)
        if estimate is None or math.isnan(estimate.value):
            continue
        title = overall_title(name) if name in MACRO else TITLES[name]
        rows.append([title, _cell(estimate)])
    interval = f", with {evaluation.level:.0%} intervals" if evaluation.resamples else ""
    return table(["Metric", "Value"], rows, f"All classes together{interval}", css="mm-overall")


def confusion_html(evaluation: Evaluation) -> Markup:
    """Renders the confusion matrix, shaded by fraction of the true class."""
    if evaluation.task == "multilabel":
        return NOTHING
    head = join(tag('<th scope="col">{}</th>', name) for name in evaluation.classes)
    rows = []
    for name, row in zip(evaluation.classes, evaluation.confusion, strict=True):
        total = sum(row) or 1
        cells = join(tag('<td style="--share:{:.3f}">{}</td>', count / total, count) for count in row)
        rows.append(tag('<tr><th scope="row">{}</th>{}</tr>', name, cells))
    return tag(
        '<div class="mm-scroll" tabindex="0" role="region" aria-label="Confusion matrix"><table class="mm-confusion">'
        "<caption>Rows: true class. Columns: predicted class.</caption>"
        "<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>",
        head,
        join(rows),
    )


def reliability_html(folder: Path | None) -> Markup:
    """Renders the reliability diagram in a model folder, collapsed; nothing if there is none."""
    if folder is None or not (folder / RELIABILITY).is_file():
        return NOTHING
    try:
        picture = _plot(folder / RELIABILITY, (folder / RELIABILITY).stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError):
        return NOTHING
    if not picture:
        return NOTHING
    return tag(
        '<details class="mm-more"><summary>Reliability: are the probabilities right?</summary>'
        '<figure class="mm-plot"><img src="{}" alt="Reliability diagram: accuracy against predicted probability, with '
        'a histogram of the probabilities" loading="lazy"><figcaption>On the diagonal, predictions are right as often '
        "as their probability says. Below it, the model is too confident.</figcaption></figure></details>",
        picture,
    )


@lru_cache(maxsize=32)
def _plot(path: Path, changed: int) -> str:
    """Returns a diagram, as it was at time `changed`, as a data URI; "" if it is too large."""
    with Image.open(path) as picture:
        if picture.width * picture.height > _LARGEST_PLOT:
            return ""
        picture.thumbnail((700, 700))
        return data_uri(np.asarray(picture.convert("RGB")), exact=False)


def _cell(estimate: Estimate | None) -> Markup:
    if estimate is None or math.isnan(estimate.value):
        return Markup('<span class="mm-none">–</span>')
    between = interval_text(estimate)
    number = tag('<span data-mm-value="{:.6f}"><strong>{:.3f}</strong></span>', estimate.value, estimate.value)
    return number + tag("<small>{}</small>", between) if between else number
