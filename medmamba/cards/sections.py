"""The sections of a model card, as Markdown."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch

from ..config import MedMambaConfig
from ..data import registry
from ..data.registry import DatasetEntry
from ..metrics import PAPER_COLUMNS, TITLES
from .decisions import decisions_section
from .reproduce import how_to_reproduce

if TYPE_CHECKING:
    from .facts import ModelFacts

PAPER = """@article{yue2024medmamba,
  title   = {MedMamba: Vision Mamba for Medical Image Classification},
  author  = {Yue, Yubiao and Li, Zhenzhang},
  journal = {arXiv preprint arXiv:2403.03849},
  year    = {2024}
}"""


def sections(facts: ModelFacts, repo_id: str) -> list[tuple[str, str]]:
    """Returns title and text of every section, in order; the text is empty where a section does not apply."""
    return [
        ("Model", _model(facts)),
        ("How to use", _use(facts, repo_id)),
        ("Intended use", _intended(facts)),
        ("Where the weights come from", _origin(facts)),
        ("Training data", _data(facts)),
        ("Evaluation", _evaluation(facts)),
        ("How much of this is the source", _shortcuts(facts)),
        ("Calibration", _calibration(facts)),
        ("Corrupted images", _corruptions(facts)),
        ("Decisions", decisions_section(facts)),
        ("Out-of-distribution images", _unusual(facts)),
        ("What the model looks at", _attribution(facts)),
        ("Limits", _limits(facts)),
        ("How to reproduce", how_to_reproduce(facts)),
        ("Licence", licence(facts)),
        ("Citation", citation(facts)),
    ]


def _model(facts: ModelFacts) -> str:
    c = facts.config
    modality = f" of {facts.entry.modality}" if facts.entry else ""
    classes = "\n".join(f"{i}. {label}" for i, label in enumerate(c.labels))
    task = {
        "multilabel": "Several labels can apply to one image, or none.",
        "ordinal": "The classes are grades in ascending order, of which one applies to an image.",
    }.get(c.task, "One class applies to an image.")
    return (
        f"MedMamba-{c.architecture}, {parameters(facts) / 1e6:.1f}M parameters: convolutions and a four-direction "
        f"selective scan side by side (arXiv 2403.03849), in the `medmamba` implementation. It classifies images"
        f"{modality}. {task}\n\n"
        f"{input_text(facts)} `model.predict` does this for you.\n\nClasses, numbered from 0:\n\n{classes}"
    )


def input_text(facts: ModelFacts) -> str:
    """Returns what the network expects: channels, size, cropping, normalisation."""
    c, p = facts.config, facts.config.preprocess
    return (
        f"Input: {_channels(c.in_chans)}, {p.input_size[1]}x{p.input_size[0]} pixels, {_crop(p.crop_mode)}, "
        f"normalised by mean {_numbers(p.mean)} and standard deviation {_numbers(p.std)}."
    )


def _use(facts: ModelFacts, repo_id: str) -> str:
    return (
        "```python\n"
        "from medmamba import MedMamba  # pip install medmamba\n\n"
        f'model = MedMamba.from_pretrained("{repo_id}")\n'
        'print(model.predict("image.png"))\n'
        "```\n\n" + usage_in_timm(repo_id)
    )


def usage_in_timm(repo_id: str) -> str:
    """Returns how to load the feature maps through timm."""
    return (
        "As a backbone in timm, with a pyramid of four feature maps:\n\n"
        "```python\n"
        "import medmamba, timm\n\n"
        f'backbone = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)\n'
        "```"
    )


def _intended(facts: ModelFacts) -> str:
    of = facts.entry.modality if facts.entry else "the kind it was trained on"
    return (
        f"Research and teaching: as a baseline, as a start for fine-tuning, and for studying attribution, on images of "
        f"{of}.\n\n"
        "Not for clinical use: not for diagnosis, triage, screening or treatment, and not as a second opinion. It is "
        "not a medical device, has no regulatory clearance, and was never tested prospectively or on images of another "
        "site. Images of other kinds are also assigned a class, with meaningless probabilities."
    )


def _origin(facts: ModelFacts) -> str:
    origin = facts.config.training.get("origin")
    if not origin:
        return ""
    check = origin["check"]
    moved = origin.get("class_order")
    order = f" Its outputs were reordered to the official class order; output k was class {moved}." if moved else ""
    return (
        f"Converted from a checkpoint of the published code, `{origin['file']}` (SHA-256 `{origin['sha256']}`), by "
        f"`python -m hub.convert`. The weights were trained and are owned by their authors: {origin['url']}. Nobody "
        f"connected with this repository trained them.{order}\n\n"
        f"The converted model was compared with a separate implementation of the published network that reads the "
        f"original tensors: the logits differ by at most {check['largest_difference']:.1e} on {check['images']} random "
        f"images, where they reach {check['largest_logit']:.2g}."
    )


def _data(facts: ModelFacts) -> str:
    t, entry = facts.config.training, facts.entry
    name = f"[{entry.title}]({entry.source.url})" if entry else f"{facts.dataset}"
    lines = [f"{name}." if entry else f"{name}, which is not in the registry of medmamba."]
    if entry and entry.source.doi:
        lines[0] = f"{name}, doi:{entry.source.doi}."
    if t.get("origin"):
        lines.append("According to the authors; the checkpoint does not say which split it was trained on.")
    elif sizes := t.get("split_sizes"):
        lines.append(f"Images: {', '.join(f'{n} {split}' for split, n in sizes.items())}. Split: {t.get('split')}.")
        if entry and entry.splits and dict(entry.splits) != sizes:
            official = ", ".join(f"{n} {split}" for split, n in entry.splits.items())
            lines.append(f"This is not the published split ({official}): compare metrics with care.")
    if entry:
        lines.append(f"About the published split: {entry.split_rule.note}")
        if not entry.group_pattern and entry.n_patients is None:
            lines.append("Patients are not identified in these data, so the split may not separate them.")
    if t.get("note"):
        lines.append(str(t["note"]))
    if t.get("init"):
        sets = [_title(name) for name in t.get("pretraining", [])]
        trained = f", trained on {', '.join(sets[:-1]) + ' and ' if sets[:-1] else ''}{sets[-1]}" if sets else ""
        lines.append(f"The weights started from {t['init']}{trained}.")
    return " ".join(line.strip() for line in lines if line)


def _evaluation(facts: ModelFacts) -> str:
    if not facts.split:
        quoted = _published_row(facts)
        said = "Not evaluated for this card: the checkpoint comes without predictions and without its test images."
        return f"{said}\n\n{quoted}" if facts.config.training.get("origin") else "Not evaluated."
    evaluation = facts.evaluations[facts.split]
    by = "images" if evaluation.resampled_by == "image" else f"{evaluation.unit}s"
    text = [
        f"On the {facts.split} split, in float32. The intervals say how much the metrics would vary with other {by} of "
        "the same kind; they vary more between hospitals and devices, which was not measured.",
        "{metrics}",
    ]
    if "confusion.png" in facts.pictures:
        text.append("![Confusion matrix](confusion.png)")
    if "roc.png" in facts.pictures:
        text.append("![ROC curves](roc.png)")
    return "\n\n".join([*text, _published_row(facts)]).strip()


def _published_row(facts: ModelFacts) -> str:
    published = facts.entry.published.get(facts.config.architecture) if facts.entry else None
    if published is None:
        return ""
    names = {name: "auc" if name == "auroc" else name for name in PAPER_COLUMNS}
    values = [getattr(published, field) for field in names.values()]
    rows = [["published", *("" if v is None else f"{v:.3f}" for v in values)]]
    if facts.split:
        overall = facts.evaluations[facts.split].overall
        rows.append(["these weights", *(f"{overall[name].value:.3f}" if name in overall else "" for name in names)])
    header = ["", *(TITLES[name] for name in names)]
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    return f"Published for MedMamba-{facts.config.architecture} ({published.quoted_from}):\n\n{table}"


def _shortcuts(facts: ModelFacts) -> str:
    """Returns what classifiers reach that see no more than the source of an image, beside the model."""
    if not facts.shortcuts:
        return ""
    classes = next(iter(facts.shortcuts["this model"].values()))["sensitivity"]
    lines = [["Classifier", "Images", "Number", "Accuracy", "AUROC", *(f"Sensitivity: {name}" for name in classes)]]
    lines.append(["---"] * len(lines[0]))
    for name, places in facts.shortcuts.items():
        for place, row in places.items():
            numbers = [f"{value:.3f}" for value in (row["accuracy"], row["auroc"], *row["sensitivity"].values())]
            lines.append([name, place, str(row["images"]), *numbers])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        "Where each class comes from its own source, recognising the source looks like recognising the disease. Two "
        "linear classifiers were fitted to the same training images (`python -m hub.shortcuts`): one sees thumbnails "
        "of 8x8 grey values, one the outer tenth of the image. What they reach is no evidence of diagnosis, and the "
        "drop on external images, of other sources, shows how far a result holds. Internal: the test split.\n\n"
        f"{table}\n\nTo check your own dataset, run the same command on it."
    )


def _calibration(facts: ModelFacts) -> str:
    calibration = facts.config.calibration
    if not calibration.get("temperature"):
        kind = "sigmoids" if facts.config.task == "multilabel" else "a softmax"
        return f"Not calibrated: the probabilities are {kind} of the logits, which is usually overconfident."
    text = f"Logits are divided by {calibration['temperature']:.3f}, fitted on the validation split"
    before = facts.results.get("splits", {}).get(facts.split, {}).get("uncalibrated", {}).get("ece")
    if facts.split and before is not None:
        after = facts.evaluations[facts.split]["ece"]
        text += f"; on {facts.split}, the expected calibration error is {before:.3f} without and {after:.3f} with it"
    text += "."
    if limits := calibration.get("thresholds"):
        text += (
            " A label counts as present above its own threshold, which gives the largest F1 on the validation split: "
            + ", ".join(f"{label} {limit:.3g}" for label, limit in zip(facts.config.labels, limits, strict=True))
            + "."
        )
    if calibration.get("ood") and not facts.unusual:
        ood = calibration["ood"]
        text += (
            f" Images whose {ood['score']} score is above {ood['threshold']:.3g} ({1 - ood['coverage']:.0%} of the "
            "validation images) are reported as unusual (out of distribution): a heuristic, not a guarantee."
        )
    return text + ("\n\n![Reliability diagram](reliability.png)" if "reliability.png" in facts.pictures else "")


def _corruptions(facts: ModelFacts) -> str:
    found = facts.corruptions
    if found is None:
        return ""
    command = f"python -m hub.corruptions --data DATA --models hub/models/{found.context.get('model', 'NAME')}"
    command += "" if found.n_images == found.n_available else f" --images {found.context.get('images', found.n_images)}"
    return f"{found.to_markdown().strip()}\n\nMeasured by `{command}`."


def _unusual(facts: ModelFacts) -> str:
    if facts.unusual is None:
        return ""
    basis = "pixels and features" if facts.unusual.combined else "features"
    rule = (
        f"Out-of-distribution (OOD) detection: `predict` and the web app flag an image as unusual if its {basis} are "
        f"less like those of the training images than those of {facts.unusual.coverage:.0%} of the validation images "
        "are (`unusual.json`, `medmamba.inference`)"
    )
    limit = "An image that is not flagged may still belong to none of the classes."
    if not _others(facts):
        return f"{rule}. Its detection rate was not measured. {limit}"
    own = {**facts.unusual.measured["own"], "name": f"{facts.dataset}, its own test images"}
    rows = [own, *({**row, "name": name} for name, row in _others(facts).items())]
    same = facts.unusual.measured.get("same_kind", {})
    rows += [{**row, "name": f"{name} (another collection of this kind)"} for name, row in same.items()]
    far = all("called_far" in row for row in rows)
    header = ["Images", "Number", "Flagged as unusual", *(["Far: refused by the web app"] if far else [])]
    lines = [[*header, "AUROC against its own test images"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        shares = [f"{row[key]:.1%}" for key in ("called_unusual", *(["called_far"] if far else []))]
        lines.append([row["name"], str(row["n"]), *shares, f"{row['auroc']:.3f}" if "auroc" in row else ""])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    kind = (
        " Other collections of the same kind of image are not foreign, and differ in device and people." if same else ""
    )
    return f"{rule}. Measured:\n\n{table}\n\n{_energy(facts)}{limit}{kind}"


def _energy(facts: ModelFacts) -> str:
    found = [row["energy"] for row in _others(facts).values() if "energy" in row]
    if not found or min(found) >= 0.7:
        return ""
    return (
        "The common energy score of the logits is unreliable on these images: its AUROC is "
        f"{min(found):.2f} to {max(found):.2f}.\n\n"
    )


def _others(facts: ModelFacts) -> dict[str, Any]:
    """Returns OOD metrics by dataset; {} where none were measured."""
    return dict(facts.unusual.measured.get("auroc", {})) if facts.unusual else {}


def _title(dataset: str) -> str:
    try:
        return registry.get(dataset).title
    except registry.RegistryError:
        return dataset


def _attribution(facts: ModelFacts) -> str:
    if "attribution.png" not in facts.pictures:
        return ""
    return (
        "![Attribution example](attribution.png)\n\n"
        "One image, explained by several methods of `medmamba.explain`. An attribution map shows what influenced the "
        f"output of this model, not where a disease is.{f' Image: {facts.example}.' if facts.example else ''}"
    )


def _limits(facts: ModelFacts) -> str:
    entry = facts.entry
    limits = [
        "Trained on one collection: expect lower performance on other devices, sites, protocols and populations.",
        "Performance was not analysed by subgroup (age, sex, skin tone, ...).",
    ]
    if entry and entry.group_unit and entry.group_pattern:
        limits.append(
            f"Images of one {entry.group_unit} resemble each other; a split that mixes them inflates the metrics."
        )
    if facts.split:
        limits += list(facts.evaluations[facts.split].notes)
        if facts.config.training.get("seed") is not None:
            limits.append("The metrics are from one training run; other seeds give other results.")
    if facts.terms.non_commercial:
        limits.append("The data may not be used commercially.")
    return "\n".join(f"- {limit}" for limit in limits)


def licence(facts: ModelFacts) -> str:
    terms = facts.terms
    name = terms.name or terms.licence
    text = f"Weights: [{name}]({terms.link})" if terms.link else f"Weights: {name}"
    text += f" ({terms.reason})." if terms.reason else "."
    if terms.needs_permission:
        text += " You may not redistribute these weights without their permission."
    return f"{text} Code: Apache-2.0."


def citation(facts: ModelFacts) -> str:
    data: DatasetEntry | None = facts.entry
    cited = "\n".join(f"- {source}" for source in data.citation) if data else ""
    return f"The architecture:\n\n```bibtex\n{PAPER}\n```" + (f"\n\nThe images:\n\n{cited}" if cited else "")


def parameters(facts: ModelFacts) -> int:
    return _parameters(json.dumps(facts.config.to_dict(), sort_keys=True))


@functools.lru_cache(maxsize=32)  # a card names the number several times, and building the model takes 0.1 s
def _parameters(config: str) -> int:
    from ..model import MedMamba

    with torch.device("meta"):
        return sum(p.numel() for p in MedMamba(MedMambaConfig.from_dict(json.loads(config))).parameters())


def _channels(count: int) -> str:
    return {1: "grey", 3: "RGB"}.get(count, f"{count} channels")


def _crop(mode: str) -> str:
    return {
        "squash": "resized without keeping the aspect ratio",
        "center": "short side resized, then cropped in the middle",
        "pad": "long side resized, then padded with black",
    }[mode]


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:g}" for v in values)
