"""The sections of the card of a backbone, a model without a classifier; see `medmamba.cards.card`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..utils.text import json_text
from .sections import citation, input_text, licence, parameters, usage_in_timm

if TYPE_CHECKING:
    from .facts import ModelFacts

WAYS = {
    "probe": "linear probe",
    "ten": "ten images per class",
    "full": "all training images",
    "full-weights": "all training images, `balance=loss`",
}
METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


def sections(facts: ModelFacts, repo_id: str) -> list[tuple[str, str]]:
    """Returns title and text of every section, in order; a text is empty where there is nothing to say."""
    return [
        ("Model", _model(facts)),
        ("How to use", _use(facts, repo_id)),
        ("Intended use", _intended()),
        ("Training data", _data(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Limits", _limits(facts)),
        ("How to reproduce", _reproduce(facts)),
        ("Licence", _licence(facts)),
        ("Citation", citation(facts)),
    ]


def transfer_tables(rows: Sequence[dict[str, Any]], level: int) -> str:
    """Returns one Markdown table for each variant and dataset, under headings of `level`.

    Args:
        rows: as `transfer.json` holds them, see `hub.transfer_table.summary`.
    """
    texts = []
    for variant, name in dict.fromkeys((row["variant"], row["set"]) for row in rows):
        found = [row for row in rows if (row["variant"], row["set"]) == (variant, name)]
        lines = [["protocol", "training images", "initial weights", "pixels", "seeds", *METRICS.values()]]
        lines.append(["---"] * len(lines[0]))
        for row in found:
            scores = [_score(row[metric]) for metric in METRICS]
            start = [f"`{row['start']}`", str(row["size"]), str(row["seeds"])]
            lines.append([WAYS[row["way"]], str(row["train"]), *start, *scores])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        pool = "training images and labels are in the pool" if found[0]["in_pool"] else "not in the pool"
        title = f"{'#' * level} {name}, {variant}"
        texts.append(f"{title}\n\n{found[0]['test']} test images; {pool}.\n\n{table}")
    return "\n\n".join(texts)


def _score(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value.get("std") is not None else "")


def _model(facts: ModelFacts) -> str:
    return (
        f"MedMamba-{facts.config.architecture}, {parameters(facts) / 1e6:.1f}M parameters, without a classifier: an "
        "initialisation for training on your own images, or a feature extractor. Convolutions and a four-direction "
        f"selective scan side by side (arXiv 2403.03849), in the `medmamba` implementation.\n\n{input_text(facts)}"
    )


def _use(facts: ModelFacts, repo_id: str) -> str:
    return (
        "```bash\n"
        f"medmamba train --data FOLDER --out OUT --recipe finetune --from {repo_id}\n"
        "```\n\n"
        "```python\n"
        "from medmamba import MedMamba  # pip install medmamba\n\n"
        f'model = MedMamba.from_pretrained("{repo_id}")\n'
        "maps = model.forward_pyramid(images)  # four feature maps\n"
        "model.reset_classifier(5)  # then train\n"
        "```\n\n"
        "It has no classifier, so `predict` raises an error.\n\n" + usage_in_timm(repo_id)
    )


def _intended() -> str:
    return (
        "Research and teaching: as an initialisation for fine-tuning, in particular with few labelled images, and as a "
        "frozen feature extractor.\n\n"
        "Not for clinical use: not for diagnosis, triage, screening or treatment. It is not a medical device and has "
        "no regulatory clearance. Models trained from it need their own evaluation."
    )


def _data(facts: ModelFacts) -> str:
    t = facts.config.training
    sources: dict[str, dict[str, Any]] = t.get("sources") or {}
    if not sources:
        return f"{facts.dataset}."
    lines = [["Dataset", "Source", "Licence of the images", "Training images", "Excluded as near-duplicates"]]
    lines.append(["---"] * len(lines[0]))
    for name, s in sources.items():
        labels = "" if name in t["labels_of"] else " (no labels)"
        lines.append([f"`{name}`{labels}", s["title"], s["licence"], f"{s['images']:,}", f"{s['excluded']:,}"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{t['images']:,} training images:\n\n{table}\n\n"
        f"Near-duplicates were excluded: images with a {t['near_duplicates']} of any dataset, also of "
        "datasets outside the pool. No validation or test image was used for training. Rotated, mirrored or "
        f"differently cropped copies are not detected.\n\n{' '.join(_objectives(t))}"
    )


def _objectives(t: dict[str, Any]) -> list[str]:
    """Returns a sentence or two for each objective of the pretraining."""
    said = []
    if "teacher" in t:
        said.append(
            f"Teacher: {t['teacher']}, from the package {t['teacher_wheel']}. The backbone learnt to predict the "
            "teacher's last feature maps."
        )
    if t.get("contrast_weight"):
        said.append("The backbone learnt to tell two views of an image from all other images (SimCLR).")
    if t.get("masked_weight"):
        said.append("The backbone learnt to fill in hidden parts of images (SimMIM).")
    if t["labels_of"]:
        labelled = ", ".join(f"`{name}`" for name in t["labels_of"])
        said.append(
            f"The labels of the training images of {labelled} were used too, with weight {t['label_weight']:g}: "
            "results on those datasets are **not** transfer to unseen data."
        )
    return said


def _evaluation(facts: ModelFacts) -> str:
    if not facts.transfer:
        return "Nothing was measured for this card."
    unseen = [row for row in facts.transfer if not row["in_pool"]]
    names = ", ".join(dict.fromkeys(f"`{row['set']}`" for row in unseen))
    seen = ", ".join(dict.fromkeys(f"`{row['set']}`" for row in facts.transfer if row["in_pool"]))
    honest = f"Transfer to a dataset that was not in the pool was measured on {names}." if names else (
        "Transfer to a dataset that was not in the pool has not been measured."
    )  # fmt: skip
    caveat = f" The backbone has seen the training images and labels of {seen}; read those tables with that in mind."
    return (
        f"{honest}{caveat if seen else ''} Means and standard deviations over seeds, on test images, of models trained "
        "from each start: a linear probe on frozen features, fine-tuning on ten images per class, and fine-tuning on "
        f"all training images. `scratch` is random weights.\n\n{transfer_tables(facts.transfer, 3)}"
    )


def _limits(facts: ModelFacts) -> str:
    sources = facts.config.training.get("sources") or {}
    limits = [f"{len(sources)} collections of images: of other kinds of images it may know little."] if sources else []
    if sources and (most := max(sources.values(), key=lambda s: s["images"])):
        share = most["images"] / sum(s["images"] for s in sources.values())
        limits.append(f"{share:.0%} of the images are of one collection: {most['title'].partition(',')[0]}.")
    if "cpn_xray" in sources:
        limits.append(
            "In `cpn_xray`, sources are confounded with classes: every COVID image is of an adult from other hospitals "
            "than the children with pneumonia. The features may carry traits of the source instead of the disease."
        )
    limits.append("One training run; other seeds were not tried.")
    limits.append("Groups of patients (age, sex, skin tone, ...) were not analysed separately.")
    return "\n".join(f"- {limit}" for limit in limits)


def _licence(facts: ModelFacts) -> str:
    sources = facts.config.training.get("sources") or {}
    other = [f"`{name}` ({s['licence']})" for name, s in sources.items() if not s["licence"].startswith(("CC", "MIT"))]
    text = licence(facts)
    if other:
        text += (
            f" Images without a standard licence are among those it was trained on: {', '.join(other)}. No image is "
            "part of the weights; whether that matters for your use is yours to judge."
        )
    return text


def _reproduce(facts: ModelFacts) -> str:
    t = facts.config.training
    if t.get("recipe") != "hub.pretrain":
        return ""
    return (
        "```bash\n"
        "python -m hub.pretrain_pool --data DATA --out pool.npz\n"
        f"python -m hub.pretrain train --pool pool.npz --variant {facts.config.architecture} --out OUT "
        f"{_length(t)} --size {t['size']} --label-weight {t['label_weight']:g} --seed {t['seed']}{_options(t)}\n"
        "```\n\n"
        f"It saw {t['views']:,} augmented views of {t['size']} pixels in {t['seconds']} s on one GPU. The course of "
        "the loss is in `pretrain.json`."
    )


def _length(t: dict[str, Any]) -> str:
    return f"--views {t['views']}" if "settings" in t else f"--epochs {t['views'] / t['images']:.0f}"


def _options(t: dict[str, Any]) -> str:
    """Returns the options that the earliest backbones were trained without."""
    words = [
        f" --{name}-weight {t[f'{name}_weight']:g}"
        for name, usual in (("teacher", 1), ("contrast", 0), ("masked", 0))
        if t.get(f"{name}_weight", usual) != usual
    ]
    words += [" --non-commercial"] if t["non_commercial"] else []
    words += [" --without " + " ".join(t["without"])] if t.get("without") else []
    settings = t.get("settings") or {}
    words += [" --set " + " ".join(f"{key}={json_text(value)}" for key, value in settings.items())] if settings else []
    return "".join(words)
