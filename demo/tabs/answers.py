"""HTML of the Classify tab: a prediction, a table of predictions, the model card."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from medmamba.inference.predict import Failure
from medmamba.utils.tables import csv_row

from ..advice import in_app, plain
from ..html import (
    NOTHING,
    Markup,
    bars,
    bullets,
    callout,
    card,
    data_uri,
    facts,
    icon,
    join,
    licence_name,
    percent,
    table,
    tag,
    with_detail,
)
from ..service import Answer, FileFacts, reduced
from ..store import Loaded
from .decide import remarks as decide_remarks
from .labels import choice_html
from .refusals import REFUSED, refused_row
from .remarks import WINDOW_BUTTON, remarks_of
from .results import results_html

EMPTY_TITLE = "No image yet"
EMPTY_TEXT = "Drop, paste or choose an image, or pick an example. The prediction appears here."


def answer_html(found: Answer, loaded: Loaded, truth: str = "") -> Markup:
    """Renders a prediction: the image as the model sees it, probabilities, remarks on reliability, and details.

    Args:
        truth: true class of an example, if known.
    """
    prediction, config = found.prediction, loaded.config
    if config.task == "multilabel":
        kicker, title = "Labels predicted", ", ".join(prediction.labels or ()) or "none"
        caption = "Calibrated probability per label" if loaded.calibrated else "Score per label (not calibrated)"
    else:
        kicker, title = "Predicted grade" if config.task == "ordinal" else "Prediction", prediction.label
        caption = "Calibrated probability" if loaded.calibrated else "Score (not calibrated)"
    before, after = remarks_of(found, loaded)
    made = facts(
        [
            ("Model", with_detail(loaded.title, f"MedMamba-{config.architecture}")),
            ("Time", f"{found.milliseconds:.0f} ms"),
            ("Backend", f"{loaded.backend} on {loaded.device}"),
            ("Window", window_fact(found)),
        ]
    )
    height, width = config.preprocess.input_size
    return tag(
        '<section class="mm-card mm-answer {doubt}" aria-live="polite" aria-label="Prediction">{first}'
        '<div class="mm-answer-top"><figure class="mm-seen"><img src="{seen}" '
        'alt="The image as the model sees it, resized and windowed"><figcaption>Model input, '
        '{width}×{height}</figcaption></figure><div class="mm-verdict"><p class="mm-kicker">{kicker}</p>'
        '<h2>{title}</h2>{truth}{bars}</div></div><div class="mm-remarks">{rest}</div>{made}'
        '<details class="mm-notes"><summary>How the file was processed</summary>{notes}</details></section>',
        doubt="mm-doubt" if before else "",
        first=join(callout(*remark) for remark in before),  # before anything that looks like a prediction
        seen=data_uri(found.seen),
        width=width,
        height=height,
        kicker=kicker,
        title=title,
        truth=_truth_html(prediction.label, truth),
        bars=bars(prediction.top, caption),
        rest=join([decide_remarks(loaded, prediction), *(callout(*remark) for remark in after)]),
        made=made,
        notes=bullets(in_app(note) for note in found.notes),
    )


def _truth_html(label: str, truth: str) -> Markup:
    """Renders whether the prediction of an example is right."""
    if not truth:
        return NOTHING
    if label == truth:
        return tag('<p class="mm-truth">{} Right: this test image shows {}.</p>', icon("good"), truth)
    return tag('<p class="mm-truth mm-wrong">{} Wrong: this test image shows {}.</p>', icon("error"), truth)


WINDOW_ORIGINS = {
    "argument": "set here",
    "file": "from the file",
    "range": "full bit depth",
}


def window_fact(found: Answer) -> Markup:
    """Renders the applied level and width with their origin; nothing if there is no window."""
    if found.window is None:
        return NOTHING
    center, width = found.window
    return with_detail(f"{center:g} / {width:g}", WINDOW_ORIGINS[found.window_from])


def preview_html(path: Path, found: FileFacts) -> Markup:
    """Renders the current file with the applied window, and its format."""
    image = found.image
    height, width = image.size
    kind = f"{image.format}, {image.bit_depth} bit, {width}×{height}"
    if image.n_frames > 1:
        kind += f", frame {image.frame + 1} of {image.n_frames}"
    return tag(
        '<figure class="mm-current {}"><button type="button" data-mm-view="image" aria-label="Enlarge the image" '
        'title="Zoom, window and frames"><img src="{}" alt="The uploaded image"></button>'
        "<figcaption><strong>{}</strong><span>{}</span></figcaption></figure>",
        "mm-large" if found.windowed else "",
        data_uri(squeeze(reduced(image, 384).to_uint8())),
        path.name,
        kind,
    )


def squeeze(pixels):
    """Drops the channel axis of a greyscale image: (H, W, 1) to (H, W)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


BATCH_COLUMNS = ["Image", "Prediction", "Probability", "Remarks"]


def batch_html(
    paths: list[Path],
    results: list[Answer | Failure],
    calibrated: bool = True,
    classes: Sequence[str] = (),
    labels: Mapping[int, str] | None = None,
) -> Markup:
    """Renders a sortable table with a button per image to open it.

    Args:
        calibrated: whether scores are shown as probabilities.
        classes: to choose the true class of an image from; none: there is no such column.
        labels: true classes set so far, by index of the image.
    """
    rows: list[list[object]] = []
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        if isinstance(result, Failure):
            name = tag('<span class="mm-file"><i></i>{}</span>', path.name)
            problem = tag('<span class="mm-tag mm-error">{}</span>', reason(result.error, path))
            rows.append([name, "", "", problem, *([""] if classes else [])])
            continue
        prediction = result.prediction
        name = tag(
            '<span class="mm-file"><button type="button" class="mm-thumb" data-mm-view="image:{index}" '
            'aria-label="Enlarge image {number}"><img src="{image}" alt=""></button>'
            '<button type="button" class="mm-link" data-mm-index="{index}">{name}</button></span>',
            image=data_uri(squeeze(result.seen), exact=False),
            index=i,
            number=i + 1,
            name=path.name,
        )
        if result.refused:
            rows.append([name, "", "", refused_row(result), *([""] if classes else [])])
            continue
        says = [text for text, said in (("unusual", result.unusual), ("unsure", result.unsure)) if said]
        says += ["warning"] if result.warnings else []
        hint = "; ".join(in_app(text) for text in result.warnings)
        tags = (tag('<span class="mm-tag mm-warn" title="{}">{}</span>', hint, text) for text in says)
        share = prediction.probability
        number = tag('<span data-mm-value="{:.6f}">{}</span>', share, percent(share))
        menu = [choice_html(i, path.name, classes, (labels or {}).get(i, ""))] if classes else []
        rows.append([name, prediction.label, number, join(tags, " "), *menu])
    failed = sum(isinstance(result, Failure) for result in results)
    refused = sum(isinstance(result, Answer) and result.refused for result in results)
    done = f"{len(results)} images" + (f", {failed} could not be read" if failed else "")
    done += f", {refused} refused: unlike all that the model knows" if refused else ""
    text = "Select an image for details, or move with the arrow keys. Click a column header to sort."
    columns = [name if calibrated or name != "Probability" else "Score" for name in BATCH_COLUMNS]
    columns += ["True class"] if classes else []
    return card(table(columns, rows, "Predictions", sort=True, css="mm-batch"), done, text)


RECORDED = ("model", "weights_sha256", "software", "date", "file_sha256", "frame", "window", "decisions", "notice")
"""Facts of a record (`medmamba.reporting.record_facts`) that become columns of a table."""


def batch_csv(
    paths: list[Path],
    results: list[Answer | Failure],
    labels: list[str],
    anyway: bool = False,
    facts: Sequence[Mapping[str, str]] | None = None,
) -> str:
    """Returns the table with all classes as CSV, safe to open in a spreadsheet.

    Args:
        anyway: answer also where the image is unlike all that the model knows.
        facts: of the record of each image, for further columns.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["image", "label", "probability", "unsure", "unusual", *labels, "warnings", "error"]
    writer.writerow(csv_row([*header, *(RECORDED if facts is not None else ())]))
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        own = [] if facts is None else [facts[i].get(name, "") for name in RECORDED]
        if isinstance(result, Failure):
            writer.writerow(csv_row([path.name, *[""] * (5 + len(labels)), plain(result.error, path), *own]))
            continue
        prediction = result.prediction
        if result.refused and not anyway:
            refused = [path.name, "", "", "", True, *[""] * (1 + len(labels)), f"refused: {REFUSED}", *own]
            writer.writerow(csv_row(refused))
            continue
        scores = dict(prediction.top)
        unusual = "" if result.unusual is None else result.unusual
        row = [path.name, prediction.label, f"{prediction.probability:.6f}", result.unsure, unusual]
        warned = "; ".join(in_app(text) for text in result.warnings)
        writer.writerow(csv_row([*row, *(f"{scores[label]:.6f}" for label in labels), warned, "", *own]))
    return text.getvalue()


def reason(message: object, path: Path) -> str:
    """Formats why a file could not be read, without repeating its name."""
    text = in_app(plain(message, path).removeprefix(f"{path.name}: "))
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def failure_html(message: object, path: Path, windowed: bool = False) -> Markup:
    """Renders a failure; with `windowed`, with a button that applies the full-range window."""
    text = reason(message, path)
    return card(callout("error", f"{path.name} could not be read", text, WINDOW_BUTTON if windowed else NOTHING))


def card_html(loaded: Loaded) -> Markup:
    """Renders the model card: training data, classes, licence, results with intervals, calibration."""
    entry, config, terms = loaded.facts.entry, loaded.config, loaded.facts.terms
    dataset: object = str(config.training.get("dataset") or "not stated")
    if entry:
        dataset = with_detail(entry.title, entry.modality)
    named = terms.name if terms.name else licence_name(terms.licence)
    licence = with_detail(named, terms.reason[:1].upper() + terms.reason[1:])
    if not loaded.licence_known:
        licence = with_detail("Not stated", "Ask the authors of the model before you use it elsewhere")
    rows: list[tuple[object, object]] = [
        ("Trained on", dataset),
        ("Licence of the weights", licence),
        ("Calibration", _calibration(loaded)),
        ("Out-of-distribution warning", _unusual(loaded)),
    ]
    classes = facts([(f"{config.num_classes} classes", bullets(config.labels, "mm-classes"))])
    height, width = config.preprocess.input_size
    title = f"MedMamba-{config.architecture}, {_parameters(loaded)}, images of {width}×{height}"
    return card(classes + facts(rows) + _figures(loaded), loaded.title, title, css="mm-model")


def _figures(loaded: Loaded) -> Markup:
    split = loaded.facts.split
    if not split:
        return callout("info", "This model has no test results", "Its accuracy is unknown.")
    evaluation = loaded.facts.evaluations[split]
    said = [counted(evaluation.n_images, evaluation.n_patients, f"{evaluation.unit}s")]
    if evaluation.resamples:
        said.append(f"with {evaluation.level:.0%} intervals")
    if split != "test":
        said.append("not a test set: the weights may have been selected on these images")
    head = tag("<h3>On the {} split <span>{}</span></h3>", split, ", ".join(said))
    return tag('<div class="mm-figures">{}{}</div>', head, results_html(evaluation, split, loaded.folder))


def counted(images: int, groups: int | None, unit: str) -> str:
    """Formats the number of images, and of patients, lesions or other groups."""
    return f"{images:,} images" + (f" of {groups:,} {unit}" if groups else "")


def _calibration(loaded: Loaded) -> Markup:
    found = loaded.calibration
    if found is None:
        return with_detail("None", "Scores are not calibrated probabilities")
    if not loaded.calibrated:
        text = f"Temperature scaling did not help on {found.n:,} validation images; ECE {found.ece_after:.3f}"
        return with_detail("None", f"Scores are not calibrated probabilities. {text}")
    change = f"Calibration error (ECE) {found.ece_before:.3f} before, {found.ece_after:.3f} after, "
    change += f"on {found.n:,} validation images"
    return with_detail(f"Temperature {found.temperature:.2f}", change)


def _unusual(loaded: Loaded) -> Markup:
    if loaded.unusual:
        measured = loaded.unusual.measured
        each = ", ".join(f"{row['called_unusual']:.0%} of {name}" for name, row in measured.get("auroc", {}).items())
        text = f"{loaded.unusual.coverage:.0%} of validation images pass. "
        text += f"It flags {each} images" if each else "How many foreign images it flags was not measured"
        return with_detail("By pixels and features" if loaded.unusual.combined else "By feature distance", text)
    ood = loaded.calibration.ood if loaded.calibration else None
    if ood is None:
        return with_detail("None", "The model has no threshold for it")
    text = f"{ood.coverage:.0%} of validation images pass. Its performance was not measured for this model"
    return with_detail(f"By {ood.score.replace('_', ' ')} score", text)


def _parameters(loaded: Loaded) -> str:
    return f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M parameters"
