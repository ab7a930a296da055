"""Segmentation models and detectors for hub/models: made from a training run, checked like the classifiers.

    python -m hub.dense_models runs/pad_ufes_20-nano-* hub/models/pad-lesions [--beside runs/pad_ufes_20-resnet34-*]

Of several runs, which differ in their seed, the best on validation images is taken; the card names the others. A model
that was made before may stand for the runs, so that its card names other peers:

    python -m hub.dense_models hub/models/pad-lesions hub/models/pad-lesions --beside hub/results/dense/pad_ufes_20-*-*
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import medmamba
from medmamba.cards import CARD_NAME, CardError, LicenceError, check_dense_card, read_dense_facts, write_dense_card
from medmamba.cards.facts import RESULTS_NAME
from medmamba.config import ORGANISATION, ConfigError
from medmamba.pretrained import PretrainedError, model_kind
from medmamba.pretrained.folder import LOADERS
from medmamba.utils.checksums import CHECKSUM_KEY, CONFIG_NAME
from medmamba.utils.files import staged
from medmamba.utils.text import json_text

from .dense_runs import read_results
from .golden import GOLDEN_NAME, HEIGHT, WIDTH, GoldenError, golden_image

GRID = 8  # golden probabilities are means over GRID x GRID cells
TOLERANCE = 5e-3
PEERS = {
    "resnet34": "U-Net with ResNet-34 of segmentation_models_pytorch, from random weights",
    "efficientnet-lite2": "U-Net with EfficientNet-Lite2 of segmentation_models_pytorch, from ImageNet weights",
    "tiny": "this network with the larger encoder `tiny`, from tiny-medical, which is not released",
}
"""How a card names the models of `hub.segment_peers`."""
UNLICENSED_START = (
    "from nano-medical, an encoder that has also seen images of the COVID-19 Radiography Database, which have no "
    "standard licence"
)
SOURCES: dict[str, dict[str, Any]] = {
    "pad_ufes_20": {
        "title": "lesions of PAD-UFES-20",
        "licence": "other",
        "licence_name": "mixed-see-card",
        "licence_link": "README.md",
        "licence_reason": f"trained on PAD-UFES-20, whose images are under CC BY 4.0, {UNLICENSED_START}",
        "non_commercial": False,
        "split": "by patient, of a third of the set that was not drawn at random",
        "notes": "Images are smartphone photographs of skin. The masks were drawn by students and are not official.",
        "limits": [
            "434 of the 446 training images show a single lesion, nearly all of them near the middle, so it looks for "
            "one there; skin without a lesion was not among them, and what it says of such skin is not known.",
            "Actinic keratoses (ACK), which have no sharp edge, are outlined far worse than other lesions: Dice on "
            "test images 0.55, beside 0.86 to 0.96 for the other five diagnoses, in the model released first (seed 2; "
            "`python -m hub.segment_evaluate --by-folder` measures another).",
            "How well people agree on the outlines was not measured; it bounds what any figure here can be.",
        ],
        "citation": [
            "Pacheco et al., PAD-UFES-20: A skin lesion dataset composed of patient data and clinical images collected "
            "from smartphones, Data in Brief 32:106221 (2020), doi:10.1016/j.dib.2020.106221"
        ],
    },
    "kvasir_seg": {
        "title": "polyps of Kvasir-SEG",
        "licence": "other",
        "licence_name": "research-and-education-only",
        "licence_link": "README.md",
        "licence_reason": "trained on Kvasir-SEG, whose images may be used for research and education only, "
        + UNLICENSED_START,
        "non_commercial": True,
        "split": "800 / 100 / 100, not the authors', near-duplicates on one side; no patient ids exist",
        "notes": "Every image shows at least one polyp.",
        "limits": ["Frames without a polyp were not among the images: false alarms on them were not measured."],
        "citation": [
            "Jha et al., Kvasir-SEG: A segmented polyp dataset, MultiMedia Modeling 2020, "
            "doi:10.1007/978-3-030-37734-2_37"
        ],
    },
    "bccd": {
        "title": "blood cells of BCCD",
        "licence": "other",
        "licence_name": "mixed-see-card",
        "licence_link": "README.md",
        "licence_reason": f"trained on BCCD, whose images are under the MIT licence, {UNLICENSED_START}",
        "non_commercial": False,
        "split": "official: 205 / 87 / 72; two boxes without extent were dropped",
        "notes": "Many red cells are not boxed, most of all where they overlap.",
        "limits": ["Red cells that nobody boxed count as false alarms, which lowers the figures of that class."],
        "citation": ["BCCD dataset, https://github.com/Shenggan/BCCD_Dataset (MIT licence)"],
    },
}
"""What is to be said of each dataset, as entries of `config.training`."""


def make(runs: Path | Sequence[Path], folder: Path, beside: Sequence[Path] = ()) -> Path:
    """Writes a folder for hub/models from those of finished runs of `hub.segment` or `hub.detect`.

    Args:
        runs: hold config.json, model.safetensors and results.json each, and differ in their seed. That with the best
            validation metric is taken; it is stored in float16. Or one model that was made before.
        folder: gets all files together at the end; a run that fails leaves it as it was.
        beside: runs of peers, whose results.json is enough, for the card.

    Raises:
        ValueError: the run is of a dataset that `SOURCES` does not know, or the runs are of several.
    """
    found = {run: read_results(run) for run in ([runs] if isinstance(runs, Path) else runs)}
    if len(datasets := {results["training"]["dataset"] for results in found.values()}) > 1:
        raise ValueError(f"the runs are of several datasets: {', '.join(sorted(datasets))}")
    run = max(found, key=lambda run: _selected(found[run])["val"])  # the first of equal ones
    results, training = found[run], dict(found[run]["training"])
    if training["dataset"] not in SOURCES:
        raise ValueError(f"nothing is known of the dataset {training['dataset']!r}; add it to SOURCES")
    training |= SOURCES[training["dataset"]]
    training.setdefault("command", command(training, run.name))  # a model that was made before has it
    asked = training["identity"]["recipe"]["epochs"]
    if training["epochs"] < asked:
        stopped = f"The run was ended after {training['epochs']} of {asked} epochs, when the time on the GPU was up."
        training["limits"] = [*training["limits"], stopped]
    if len(found) > 1:
        training["seeds"] = [_selected(each) for each in found.values()]
    if beside:
        training["beside"] = [{"model": PEERS[_model(path)], **_selected(read_results(path))} for path in beside]
    model = load(run)
    model.config = model.config.replace(training=training)
    text = json.dumps({**results, "training": training}, indent=2, ensure_ascii=False, allow_nan=False)
    with staged(folder, last=(CONFIG_NAME,)) as staging:
        model.save_pretrained(staging, torch.float16)
        (staging / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        write_golden(load(staging), staging)
        write_dense_card(staging, f"{ORGANISATION}/{folder.resolve().name}")
    return folder


def command(training: dict[str, Any], name: str) -> str:
    """Returns the command that trains a run again."""
    recipe = {**training["settings"], "epochs": training["identity"]["recipe"]["epochs"]}
    chosen = [f"{key}={recipe[key]}" for key in ("epochs", "size", "batch_size", "lr", "ema", "warmup_epochs")]
    if "loss" in training:
        chosen.append(f"loss={training['loss']}")
    if recipe["distill"]:  # teacher: the folder of a run of a peer, with the same settings
        chosen.append(f"teacher=RUN distill={recipe['distill']}")
    module = "hub.segment" if "loss" in training else "hub.detect"
    return f"python -m {module} train --data DATA --out RUNS --only {name} --set {' '.join(chosen)}"


def _model(run: Path) -> str:
    """Returns "resnet34" of "runs/kvasir_seg-resnet34-0"."""
    return run.name.partition("-")[2].rpartition("-")[0]


def _selected(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the seed of a run, the metric that selected its epoch, and its values on val and test."""
    metric = results["training"]["selected_by"][0]

    def value(split: str) -> float:
        found = results["splits"][split]
        scores = [found["metrics"]] if metric in found["metrics"] else list(found["metrics"].values())
        return sum(score[metric]["value"] for score in scores) / len(scores)

    return {"seed": results["training"]["seed"], "metric": metric, "val": value("val"), "test": value("test")}


def load(folder: str | Path) -> Any:
    """Loads a segmentation model or a detector."""
    return getattr(medmamba, LOADERS[model_kind(folder)]).from_pretrained(folder)


def write_golden(model: Any, folder: Path) -> dict[str, Any]:
    """Writes golden.json, what the model finds in `golden_image`; returns its content."""
    channels = model.config.in_chans
    golden = {
        "image": f"hub.golden.golden_image({channels}): uint8 ({HEIGHT}, {WIDTH}, {channels})",
        "classes": list(model.config.classes),
        **_found(model),
    }
    (folder / GOLDEN_NAME).write_text(json_text(golden, indent=2) + "\n", encoding="utf-8")
    return golden


def check_golden(model: Any, golden: dict[str, Any], where: str) -> float:
    """Returns the largest difference between what a model finds and what is recorded.

    Raises:
        GoldenError: it exceeds `TOLERANCE`, or the classes differ.
    """
    found = _found(model)
    names = list(model.config.classes)
    if golden["classes"] != names or len(golden["values"]) != len(found["values"]):
        raise GoldenError(f"{where}: the classes are {names}, but {GOLDEN_NAME} has {golden['classes']}")
    difference = max((abs(a - b) for a, b in zip(golden["values"], found["values"], strict=True)), default=0.0)
    if not difference <= TOLERANCE:
        raise GoldenError(
            f"{where}: the golden prediction is not reproduced: it differs by {difference:.2g}. Either the weights or "
            f"the code changed; if that was intended, delete {GOLDEN_NAME} and publish again"
        )
    return difference


def _found(model: Any) -> dict[str, Any]:
    pixels = golden_image(model.config.in_chans)
    if model_kind_of(model) == "medmamba-detector":
        scores = [box.score for box in model.predict(pixels, score=0.0).boxes[:GRID]]
        return {"values": [round(score, 5) for score in scores]}
    maps = model.predict(pixels).probabilities
    cells = maps.reshape(len(maps), GRID, HEIGHT // GRID, GRID, WIDTH // GRID).mean((2, 4))
    return {"values": [round(float(value), 5) for value in cells.ravel()]}


def model_kind_of(model: Any) -> str:
    """Returns how `config.json` names the kind of a model."""
    return str(model.config.MODEL_TYPE)


def validate_dense(report: Any, repo_id: str, licence: str | None = None) -> None:
    """Fills a `hub.validate.Report` of a segmentation model or detector. Writes a missing card and golden.json.

    Args:
        report: its files were checked already.
        repo_id: under which it will be published.
        licence: see `read_dense_facts`.
    """
    folder: Path = report.folder
    try:
        model = load(folder)  # strict
        facts = read_dense_facts(folder, licence)
    except (ConfigError, PretrainedError, CardError, LicenceError) as error:
        report.problems.append(str(error))
        return
    if not facts.training.get("dataset"):
        report.problems.append("config.json does not say what the model was trained on: set training.dataset")
    if CHECKSUM_KEY not in json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")):
        report.problems.append(f"config.json has no {CHECKSUM_KEY}: save the model again with save_pretrained")
    if not facts.scores("test"):
        report.problems.append("results.json has no metrics of a test split: train with one")
    elif facts.results.get("training") != json.loads(json.dumps(facts.training)):
        report.problems.append("results.json and config.json are of different training runs: evaluate again")
    if not (folder / CARD_NAME).is_file():
        write_dense_card(folder, repo_id, licence)
        report.warnings.append(f"{CARD_NAME} was generated for {repo_id}: review it before others read it")
    report.card = (folder / CARD_NAME).read_text(encoding="utf-8")
    report.problems += check_dense_card(report.card, facts, repo_id)
    report.model = model
    if not (folder / GOLDEN_NAME).is_file():
        report.golden = write_golden(model, folder)
    else:
        report.golden = json.loads((folder / GOLDEN_NAME).read_text(encoding="utf-8"))
        try:
            check_golden(model, report.golden, str(folder / GOLDEN_NAME))
        except (GoldenError, KeyError, ValueError) as error:
            report.problems.append(str(error))
    report.files = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.dense_models", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of finished runs that differ in their seed, or of one model"
    )
    parser.add_argument("folder", type=Path, help="such as hub/models/pad-lesions")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="RUN", help="runs of peers, for the card")
    chosen = parser.parse_args(arguments)
    try:
        print(make(chosen.runs, chosen.folder, chosen.beside))
    except (ValueError, OSError) as error:
        print(f"hub.dense_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
