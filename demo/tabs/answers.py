"""What the Classify tab shows, as HTML: an answer, a table of answers, the card of a model."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from gradio.utils import sanitize_value_for_csv

from medmamba.evaluation import PAPER_COLUMNS
from medmamba.evaluation.result import TITLES
from medmamba.predict import Failure

from ..html import bars, callout, card, data_uri, error, esc, facts, licence_name, percent, table
from ..service import Answer, FileFacts, reduced
from ..store import Loaded

EMPTY_TITLE = "No image yet"
EMPTY_TEXT = "Drop one in, paste it, or pick an example. The answer appears here in a second."
_WARNING = "warning: "
_NO_WINDOW = "no usable window in the file"
SURE = 0.8
"""From this calibrated probability on, an answer gets a tick."""


def answer_html(found: Answer, loaded: Loaded) -> str:
    """One image: what the model saw, how probable each class is, how far to believe it, how it came about."""
    prediction, config = found.prediction, loaded.config
    height, width = config.preprocess.input_size
    if config.task == "multilabel":
        above = [label for label, p in prediction.top if p >= 0.5]
        kicker, title = "The model sees", ", ".join(above) or "none of the labels"
        caption = "Calibrated probability of each label" if loaded.calibration else "Score of each label"
    else:
        kicker, title = "The model’s answer", prediction.label
        caption = "Calibrated probability" if loaded.calibration else "Score, not calibrated"
    first, *rest = ["", *(callout(*remark) for remark in remarks_of(found, loaded))]
    if found.unusual:  # before anything that looks like an answer
        first, rest = rest[0], rest[1:]
    doubt = " mm-doubt" if found.unusual else ""
    made = facts(
        [
            ("Model", f"{esc(loaded.title)}<span>MedMamba-{esc(config.architecture)}</span>"),
            ("Time", f"{found.milliseconds:.0f} ms"),
            ("Backend", f"{esc(loaded.backend)} on {esc(loaded.device)}"),
        ]
    )
    notes = "".join(f"<li>{esc(note)}</li>" for note in prediction.image_notes if not note.startswith(_WARNING))
    return (
        f'<section class="mm-card mm-answer{doubt}" aria-live="polite" aria-label="Answer">{first}'
        f'<div class="mm-answer-top"><figure class="mm-seen"><img src="{data_uri(found.seen)}" '
        f'alt="The image at the size and contrast that the model sees"><figcaption>As the model sees it, '
        f'{width}×{height}</figcaption></figure><div class="mm-verdict"><p class="mm-kicker">{kicker}</p>'
        f"<h2>{esc(title)}</h2>{bars(prediction.top, caption)}</div></div>"
        f'<div class="mm-remarks">{"".join(rest)}</div>{made}'
        f'<details class="mm-notes"><summary>What was done to the file</summary><ul>{notes}</ul></details></section>'
    )


def remarks_of(found: Answer, loaded: Loaded) -> list[tuple[str, str, str]]:
    """(kind, title, text) in plain language, the most important first."""
    prediction, remarks = found.prediction, []
    if found.unusual:
        remarks.append(
            (
                "warn",
                "This does not look like what the model was trained on",
                f"Only {1 - _coverage(loaded):.0%} of its validation images looked this unusual. The probabilities "
                f"mean little here, whatever they say.{_auroc_text(loaded)}",
            )
        )
    for note in prediction.image_notes:
        if note.startswith(_WARNING):
            text = note.removeprefix(_WARNING)
            remarks.append(("warn", text[:1].upper() + text[1:], ""))
    if any(note.startswith(_NO_WINDOW) for note in prediction.image_notes):
        text = "All values are shown, so the contrast is low. Choose a window, or set level and width."
        remarks.append(("info", "The file declares no window", text))
    share = round(100 * prediction.probability)
    right = f"about {share} of 100" if share < 100 else "more than 99 of 100"
    if loaded.config.task == "multilabel":
        if found.unsure:
            remarks.append(("info", "No label reaches an even chance", "The model sees none of what it knows."))
    elif found.unsure:
        second = prediction.top[1][0] if len(prediction.top) > 1 else ""
        says = f"It is right in {right} such cases." if loaded.calibration else "Its scores are not calibrated."
        remarks.append(("warn", "The model is unsure", f"{says} The runner-up is {second}." if second else says))
    elif not found.unusual and loaded.calibration:
        remarks.append(
            (
                "good" if prediction.probability >= SURE else "info",
                f"Answers this sure are right in {right} cases",
                "On images like those it was trained on. Another hospital, device or population can change that.",
            )
        )
    if not loaded.calibration:
        remarks.append(
            (
                "info",
                "This model was never calibrated",
                "Read the scores as a ranking of the classes, not as probabilities. It cannot tell unusual images.",
            )
        )
    return remarks


def _coverage(loaded: Loaded) -> float:
    """Share of the validation images that the warning lets pass."""
    if loaded.unusual:
        return loaded.unusual.coverage
    ood = loaded.calibration.ood if loaded.calibration else None
    return ood.coverage if ood else 1.0


def _auroc_text(loaded: Loaded) -> str:
    """How well the warning works, where that was measured."""
    measured = loaded.unusual.measured.get("auroc", {}) if loaded.unusual else {}
    values = [row["auroc"] for row in measured.values()]
    if not values:
        return " How well this warning works was not measured for this model."
    return (
        f" The warning is a heuristic: it told the model’s own test images from those of {len(values)} other datasets "
        f"with an AUROC of {min(values):.3f} or more."
    )


def preview_html(path: Path, found: FileFacts, shown: str | None = None) -> str:
    """The current file: what it looks like and what it is."""
    image = found.image
    height, width = image.size
    large = " mm-large" if found.windows else ""
    kind = f"{image.format}, {image.bit_depth} bit, {width}×{height}"
    if image.n_frames > 1:
        kind += f", frame {image.frame + 1} of {image.n_frames}"
    return (
        f'<figure class="mm-current{large}"><img src="{shown or data_uri(squeeze(reduced(image, 384).to_uint8()))}" '
        f'alt="The image as it is read from the file"><figcaption><strong>{esc(path.name)}</strong>'
        f"<span>{esc(kind)}</span></figcaption></figure>"
    )


def squeeze(pixels):
    """(H, W, 1) to (H, W)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


BATCH_COLUMNS = ["Image", "Answer", "Probability", "Remarks"]


def batch_html(paths: list[Path], results: list[Answer | Failure]) -> str:
    """A table that sorts; each image opens by a button."""
    rows = []
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        name = esc(path.name)
        none = '<span class="mm-file"><i></i>'
        if isinstance(result, Failure):
            rows.append(
                [
                    f"{none}{name}</span>",
                    "",
                    "",
                    f'<span class="mm-tag mm-error">{esc(reason(result.error, path))}</span>',
                ]
            )
            continue
        prediction = result.prediction
        tags = ['<span class="mm-tag mm-warn">unusual</span>'] if result.unusual else []
        tags += ['<span class="mm-tag mm-warn">unsure</span>'] if result.unsure else []
        rows.append(
            [
                f'<span class="mm-file"><img src="{data_uri(squeeze(result.seen), exact=False)}" alt="">'
                f'<button type="button" class="mm-link" data-mm-index="{i}">{name}</button></span>',
                esc(prediction.label),
                f'<span data-mm-value="{prediction.probability:.6f}">{percent(prediction.probability)}</span>',
                " ".join(tags),
            ]
        )
    failed = sum(isinstance(result, Failure) for result in results)
    done = f"{len(results)} images" + (f", {failed} could not be read" if failed else "")
    text = "Select an image for the full answer. Headers sort."
    return card(table(BATCH_COLUMNS, rows, "Answers", sort=True, css="mm-batch"), done, text)


def batch_csv(paths: list[Path], results: list[Answer | Failure], labels: list[str]) -> str:
    """The table with every class, safe to open in a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["image", "label", "probability", "unsure", "unusual", *map(sanitize_value_for_csv, labels), "error"]
    )
    for path, result in zip(paths, results, strict=True):
        name = sanitize_value_for_csv(path.name)
        if isinstance(result, Failure):
            writer.writerow([name, *[""] * (4 + len(labels)), sanitize_value_for_csv(plain(result.error, path))])
            continue
        prediction = result.prediction
        scores = dict(prediction.top)
        unusual = "" if result.unusual is None else result.unusual
        label = sanitize_value_for_csv(prediction.label)
        values = [f"{scores[name]:.6f}" for name in labels]
        writer.writerow([name, label, f"{prediction.probability:.6f}", result.unsure, unusual, *values, ""])
    return text.getvalue()


def plain(message: object, *paths: Path) -> str:
    """An error text without the server's own paths."""
    text = str(message)
    for path in paths:
        text = text.replace(str(path), path.name)
    return text


def reason(message: object, path: Path) -> str:
    """Why a file could not be read, as a sentence that does not name it again."""
    text = plain(message, path).removeprefix(f"{path.name}: ")
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def failure_html(message: object, path: Path) -> str:
    """An image that could not be classified."""
    return error(f"{path.name} could not be read", reason(message, path))


def card_html(loaded: Loaded) -> str:
    """What a model is, from its folder: data, classes, licence, figures with intervals, calibration."""
    entry, config, terms = loaded.facts.entry, loaded.config, loaded.facts.terms
    training = config.training
    dataset = entry.title if entry else str(training.get("dataset") or "not stated")
    if entry:
        dataset = f"{esc(dataset)}<span>{esc(entry.modality)}</span>"
    named = terms.name if terms.name else licence_name(terms.licence)
    licence = f"{esc(named)}<span>{esc(terms.reason[:1].upper() + terms.reason[1:])}</span>"
    if not loaded.licence_known:
        licence = "Not stated<span>Ask whoever made the model before you use it elsewhere</span>"
    labels = "".join(f"<li>{esc(label)}</li>" for label in config.labels)
    rows = [
        ("Trained on", dataset),
        ("Licence of the weights", licence),
        ("Calibration", _calibration(loaded)),
        ("Unusual images", _unusual(loaded)),
    ]
    classes = facts([(f"{config.num_classes} classes", f'<ul class="mm-classes">{labels}</ul>')])
    height, width = config.preprocess.input_size
    title = f"MedMamba-{config.architecture}, {_parameters(loaded)}, images of {width}×{height}"
    return card(classes + facts(rows) + _figures(loaded), loaded.title, title, css="mm-model")


def _figures(loaded: Loaded) -> str:
    split = loaded.facts.split
    if not split:
        return callout("info", "No test figures come with this model", "Nothing is known of how often it is right.")
    evaluation = loaded.facts.evaluations[split]
    names = ["accuracy", "balanced_accuracy", *(n for n in PAPER_COLUMNS if n != "accuracy"), "ece"]
    rows = []
    for name in names:
        estimate = evaluation.overall.get(name)
        if estimate is None or math.isnan(estimate.value):
            continue
        interval = "" if math.isnan(estimate.low) else f"<span>{estimate.low:.3f} – {estimate.high:.3f}</span>"
        rows.append((TITLES[name], f"<strong>{estimate.value:.3f}</strong>{interval}"))
    by = f"{evaluation.n_images:,} images" + (f" of {evaluation.n_patients} patients" if evaluation.n_patients else "")
    head = f"<h3>On the {esc(split)} split <span>{by}, with {evaluation.level:.0%} intervals</span></h3>"
    return f'<div class="mm-figures">{head}{facts(rows)}</div>'


def _calibration(loaded: Loaded) -> str:
    found = loaded.calibration
    if found is None:
        return "None<span>Scores are not probabilities</span>"
    change = f"Calibration error {found.ece_before:.3f} before, {found.ece_after:.3f} after, on {found.n:,} images"
    title = f"Temperature {found.temperature:.2f}" if found.method == "temperature" else "Not needed"
    return f"{title}<span>{esc(change)}</span>"


def _unusual(loaded: Loaded) -> str:
    if loaded.unusual:
        measured = loaded.unusual.measured
        each = ", ".join(f"{name} {row['auroc']:.3f}" for name, row in measured.get("auroc", {}).items())
        text = f"{loaded.unusual.coverage:.0%} of validation images pass. "
        text += f"AUROC against {each}" if each else "How well it works was not measured"
        return f"Warned by the distance of features<span>{esc(text)}</span>"
    ood = loaded.calibration.ood if loaded.calibration else None
    if ood is None:
        return "No warning<span>The model has no threshold for it</span>"
    text = f"{ood.coverage:.0%} of validation images pass. How well it works was not measured for this model"
    return f"Warned by the {esc(ood.score.replace('_', ' '))} score<span>{esc(text)}</span>"


def _parameters(loaded: Loaded) -> str:
    return f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M parameters"
