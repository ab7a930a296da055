"""The sections of a report on a model."""

from __future__ import annotations

import math

import numpy as np

from ..cards.card import NOTICE
from ..cards.sections import input_text, parameters
from ..data.leakage import find_leakage
from ..evaluation import figures
from ..metrics.result import TITLES, Estimate
from . import checklists
from .blocks import Block, Bullets, Section, Table, Text, picture
from .decisions import decisions
from .findings import corruptions, explanations, failures, flagged_text, subgroups, unusual
from .study import Study


def report_sections(study: Study, statements: dict[str, dict[str, str]]) -> list[Section]:
    """Returns the sections of a report, those without content left out; the checklists come last.

    Args:
        statements: what the authors state, by checklist and number of the item.
    """
    makers = (
        ("summary", "Summary", _summary),
        ("model", "Model and intended use", _model),
        ("data", "Data and splits", _data),
        ("training", "Training", _training),
        ("performance", "Performance", _performance),
        ("decisions", "From probability to decision", decisions),
        ("calibration", "Calibration", _calibration),
        ("subgroups", "Subgroups", subgroups),
        ("corruptions", "Corrupted images", corruptions),
        ("ood", "Unusual images", unusual),
        ("explanations", "Explanations and whether to trust them", explanations),
        ("failures", "Errors", failures),
        ("limits", "Limits", _limits),
    )
    sections = [Section(key, title, tuple(make(study))) for key, title, make in makers]
    sections = [section for section in sections if section.blocks]
    present = {section.key for section in sections} | {"external" if study.external else "internal"}
    present |= {"patients"} if any(study.dataset.patients) else set()
    titles = {section.key: f"{i} {section.title}" for i, section in enumerate(sections, 1)}
    for name in checklists.CHECKLISTS:
        found = checklists.answers(name, present, statements.get(name, {}))
        sections.append(Section(name.lower().replace("+", "-"), name, tuple(_checklist(name, found, titles))))
    return sections


def _summary(study: Study) -> list[Block]:
    e = study.scored.evaluation
    who = f"{e.n_images} images" + (f" of {e.n_patients} {e.unit}s" if e.n_patients is not None else "")
    kind = "another source than its training data" if study.external else "the data it was developed with"
    used = ", an external test" if study.external else ""
    items = [
        f"Aim: to evaluate a trained classifier of {len(e.classes)} classes on images of {kind}{used}. No model was "
        "developed or changed for this report.",
        f"Evaluated on {who}, split {study.split!r} of {study.index.name}. {_how(study)}",
        f"Balanced accuracy {e.overall['balanced_accuracy']}, AUROC {e.overall['auroc']}, accuracy "
        f"{e.overall['accuracy']}; expected calibration error {e.overall['ece']}.",
    ]
    if found := study.scored.subgroups:
        items.append(f"Subgroups ({', '.join(found.columns)}): {found.summary()}")
    if c := study.corruptions:
        items.append(f"Corrupted images: balanced error {c.clean} without and {c.mean} with corruption.")
    if share := flagged_text(study):
        items.append(f"Unusual images: {share}")
    items += [note.removeprefix("warning: ").capitalize() for note in study.notes]
    return [Bullets(items)]


def _how(study: Study) -> str:
    e = study.scored.evaluation
    if not e.resamples:
        return "No intervals."
    by = "image" if e.resampled_by == "image" else e.unit
    how = f"{e.resamples} resamples by {by}, seed {e.seed}"
    text = f"Intervals in brackets are {e.level:.0%} bootstrap intervals ({how})"
    return f"{text}, those of proportions of 0 and 1 Wilson's." if e.has_wilson else f"{text}."


def _model(study: Study) -> list[Block]:
    facts, config = study.facts, study.facts.config
    of = f" of {facts.entry.modality}" if facts.entry else ""
    task = (
        "Several classes can apply to one image." if config.task == "multilabel" else "One class applies to an image."
    )
    return [
        Text(
            f"MedMamba-{config.architecture}, a neural network (deep learning) with "
            f"{parameters(facts) / 1e6:.1f} million parameters: convolutions and a four-direction selective scan side "
            f"by side (arXiv:2403.03849). It classifies images{of}. {task} It outputs a probability for each class: a "
            "softmax (for several labels a "
            "sigmoid) of the calibrated logits."
        ),
        Text(
            f"{input_text(facts)} The prediction of a new image: medmamba predict --model {study.name} IMAGE, or "
            "MedMamba.from_pretrained(...).predict(image) in Python. Weights: SHA-256 "
            f"{study.weights}."
        ),
        Text(f"Classes: {'; '.join(config.labels)}."),
        Text(f"{NOTICE} Intended for research and teaching. Not for diagnosis, triage, screening or treatment."),
    ]


def _data(study: Study) -> list[Block]:
    facts, index, whole = study.facts, study.index, study.dataset
    training = facts.config.training
    source = f"{facts.entry.title}, {facts.entry.source.url}" if facts.entry else facts.dataset
    blocks: list[Block] = [
        Text(f"Training data, as recorded with the model: {source}. Split: {training.get('split', 'not recorded')}."),
    ]
    names = list(whole.split_sizes)
    counts = {name: _class_counts(whole.with_records([r for r in whole.records if r.split == name])) for name in names}
    sizes = training.get("split_sizes") or {}
    rows = [
        ["images", *(str(n) for n in whole.split_sizes.values())],
        ["patients or other groups", *(_patients(whole, name) for name in names)],
        *([label, *(str(counts[name][i]) for name in names)] for i, label in enumerate(whole.classes)),
    ]
    header = ["Images by split", *(str(name or "no split") for name in names)]
    blocks.append(Table(header, rows, f"The data given for this report ({whole.name})"))
    if sizes and not study.external:
        recorded = ", ".join(f"{n} {split}" for split, n in sizes.items())
        blocks.append(Text(f"Recorded at training: {recorded} images."))
    leaks = find_leakage(whole, duplicates=False)
    known = any(whole.patients)
    if len(names) < 2:
        text = "The data have one split, so nothing can be said about their separation from the training images."
    elif not known:
        text = "Patients are not known, so it cannot be checked whether the splits separate them."
    elif leaks.patients:
        text = f"{len(leaks.patients)} patients (or other groups) are in several splits: figures may be too high."
    else:
        text = "No patient (or other group) has images in several splits; splits are disjoint at that level."
    blocks.append(Text(text))
    if facts.entry:
        blocks.append(Text(f"About the published split: {facts.entry.split_rule.note}"))
    notes = [*index.notes, *(study.scored.subgroups.notes if study.scored.subgroups else ())]
    if notes:
        blocks += [Text("What was passed over, merged or missing when the data were read:"), Bullets(notes)]
    return blocks


def _class_counts(dataset) -> np.ndarray:
    return dataset.class_counts if len(dataset) else np.zeros(len(dataset.classes), int)


def _patients(dataset, split: str | None) -> str:
    found = {record.patient for record in dataset.records if record.split == split and record.patient is not None}
    return str(len(found)) if found else "not known"


def _training(study: Study) -> list[Block]:
    t = study.facts.config.training
    if not t.get("recipe"):
        return []
    settings = t.get("settings", {})
    versions = ", ".join(f"{name} {version}" for name, version in t.get("versions", {}).items())
    mixing = [f"{name} {settings[name]}" for name in ("mixup", "cutmix", "label_smoothing") if settings.get(name)]
    rows = [
        ["recipe", str(t["recipe"])],
        ["starting weights", str(t.get("init") or "random")],
        ["epochs; best", f"{t.get('epochs')}; {t.get('best_epoch')}"],
        ["selection on validation by", ", then ".join(t.get("selected_by", []))],
        [
            "optimiser",
            f"{settings.get('optimizer')}, learning rate {settings.get('lr')}, batch {settings.get('batch_size')}",
        ],
        [
            "class imbalance",
            {"none": "no reweighting or resampling"}.get(settings.get("balance"), str(settings.get("balance"))),
        ],
        ["regularisation", ", ".join(mixing) or "none recorded"],
        [
            "ensembles",
            "none: one network; " + (f"weights averaged, {settings['ema']}" if settings.get("ema") else "no averaging"),
        ],
        ["seed", str(t.get("seed"))],
        ["device, precision", f"{t.get('device')}, {t.get('precision')}"],
        ["software", f"{versions}. Source code: Apache-2.0"],
    ]
    return [
        Table(["Setting", "Value"], rows),
        Text("All settings are in config.json and results.json of the model folder."),
    ]


def _performance(study: Study) -> list[Block]:
    e = study.scored.evaluation
    overall = [[TITLES[name], *_cells(value)] for name, value in e.overall.items()]
    header = ["Measure", "Value", f"{e.level:.0%} interval"]
    text = (
        "Precision, sensitivity, specificity, F1, AUROC and AUPRC are means over the classes, each against the rest. "
        f"Intervals reflect other {'images' if e.resampled_by == 'image' else e.unit + 's'} of the same kind; between "
        "hospitals and devices results vary more."
    )
    columns = [name for name in ("sensitivity", "specificity", "precision", "npv", "auroc") if e.per_class]
    rows = [[row.name, str(row.support), *(str(row.scores[name]) for name in columns)] for row in e.per_class]
    blocks: list[Block] = [
        Text(text),
        Table(header, overall, "All images"),
        Table(["Class", "Images", *(TITLES[name] for name in columns)], rows, "By class", small=True),
    ]
    drawn = figures(study.scored)
    if "confusion" in drawn:
        width = 62 if len(e.classes) > 3 else 45
        blocks.append(
            picture(drawn["confusion"], "Confusion matrix: counts, and shares of the true class as colour.", width)
        )
    blocks.append(picture(drawn["roc"], "ROC curves, each class against the rest.", 58))
    if e.notes:
        blocks.append(Bullets(list(e.notes)))
    return blocks


def _cells(value: Estimate) -> list[str]:
    if math.isnan(value.value):
        return ["n/a", ""]
    return [f"{value.value:.3f}", "" if math.isnan(value.low) else f"{value.low:.3f} to {value.high:.3f}"]


def _calibration(study: Study) -> list[Block]:
    e, before = study.scored.evaluation, study.scored.uncalibrated
    temperature = e.context["temperature"]
    if before is None:
        errors = f"Expected calibration error {e.overall['ece']}, Brier score {e.overall['brier']}."
        text = f"The model has no calibration. {errors}"
    else:
        text = (
            f"Logits are divided by {temperature:.3f}, fitted on validation images. Expected calibration error "
            f"{before['ece']:.3f} without and {e.overall['ece']} with it; Brier score {before['brier']:.3f} and "
            f"{e.overall['brier']}; log loss {before['nll']:.3f} and {e.overall['nll']}."
        )
    drawn = figures(study.scored)["reliability"]
    return [Text(text), picture(drawn, "Reliability: accuracy against confidence, above the number of images.", 52)]


def _limits(study: Study) -> list[Block]:
    e, t = study.scored.evaluation, study.facts.config.training
    items = [
        "Research only: no prospective test, no clinical use, no regulatory clearance.",
        "Results hold for images like these; other devices, sites, protocols and populations can differ much."
        if not study.external
        else "One external source: others can differ much.",
    ]
    if t.get("seed") is not None:
        items.append("One training run: another seed gives somewhat different results.")
    if e.n_patients is None:
        items.append(
            "Patients are not known: intervals treat images as independent, and are too narrow if they are not."
        )
    rare = [f"{row.name} ({row.support})" for row in e.per_class if row.support < 30]
    if rare:
        items.append(f"Fewer than 30 images of {', '.join(rare)}: the figures of these classes are uncertain.")
    if study.scored.subgroups is None:
        items.append("Subgroups were not analysed: nothing is known about fairness.")
    elif any(group.warnings for group in study.scored.subgroups.groups):
        items.append("Some subgroups are small: a real difference may have been missed.")
    if study.corruptions is None:
        items.append("Robustness to image quality was not measured.")
    if not study.explained:
        items.append("Explanations were not checked.")
    if study.facts.terms.non_commercial:
        items.append("The training data may not be used commercially.")
    if detector := study.model.unusual:
        share = float(detector.is_unusual(study.signatures).mean())
        if share > 2 * (1 - detector.coverage):
            items.append(f"{share:.0%} of the images are unlike the training images, and results differ for these.")
    return [Bullets(items)]


_SHOWN_IN = {"internal": "performance", "external": "performance", "patients": "data"}


def _checklist(name: str, found: list[checklists.Answer], titles: dict[str, str]) -> list[Block]:
    counts = {status: sum(a.status == status for a in found) for status in dict.fromkeys(a.status for a in found)}
    said = ", ".join(f"{n} {status}" for status, n in counts.items())
    rows = []
    for answer in found:
        where = ", ".join(dict.fromkeys(titles[_SHOWN_IN.get(key, key)] for key in answer.sections))
        rows.append([answer.number, answer.topic, answer.status, where, answer.note])
    text = (
        f"{checklists.SOURCES[name]}. Topics are paraphrased, numbers are those of the checklist. Of "
        f"{len(found)} items: {said}. This table says what this report contains; it does not "
        "replace the authors' own checklist."
    )
    return [Text(text), Table(["Item", "Topic", "In this report", "Section", "Missing, or stated"], rows, small=True)]
