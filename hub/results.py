"""Results of all training runs; generates docs/results.md and the model table in README.md from them.

    python -m hub.results add runs/breastmnist-*     stores the results of finished runs in hub/results
    python -m hub.results                            writes both documents
    python -m hub.results --check                    fails if one is out of date
    python -m hub.results best runs/*                prints the run to release per model: the best on validation

Every run is kept, including unreleased ones, so that means are over all seeds and not over selected ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.cards import is_dense, read_dense_facts, terms_of
from medmamba.data import registry
from medmamba.pretrained import read_config
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

HUB = Path(__file__).parent
RESULTS, MODELS, DOCUMENT = HUB / "results", HUB / "models", HUB.parent / "docs" / "results.md"
README, MARKERS = HUB.parent / "README.md", ("<!-- models: python -m hub.results -->", "<!-- end of models -->")
BASELINES = "tiny", "timm resnet50"
METRICS = ("accuracy", "auroc", "balanced_accuracy", "f1", "ece")

# Entries kept from the training record of a run.
KEPT: tuple[str, ...] = (
    "dataset",
    "recipe",
    "seed",
    "init",
    "pretraining",
    "datasets",
    "allowed_leakage",
    "split_sizes",
    "selected_by",
    "epochs",
)
KEPT += ("best_epoch", "seconds", "device", "precision", "versions", "settings")

# How the splits used here differ from those of the published results.
CAVEATS = {
    "breastmnist": "The official split, recovered by matching the 28-pixel images to their originals. Images were "
    "resized to a square without cropping; MedMNIST crops them. One image is in both train and test, with different "
    "labels. Each of the 156 test images corresponds to 0.64 percentage points.",
    "pneumoniamnist": "Official split sizes; the test split is the test folder of the source, of which 557 of 624 "
    "images are known to be in the official test set. That folder differs from the one that train and val come from: "
    "val results are much higher and do not predict test results. Eight identical images are in more than one split. "
    "The runs of zoo-pneumoniamnist-distilled were stopped after 5 of 7 epochs, when the GPU time was used up.",
    "dermamnist": "Split by lesion: all images of a lesion are in one split. The official split is by image and has "
    "lesions in several splits, so results here are expected to be lower than published ones. The licence of the "
    "images excludes commercial use. EfficientNet-Lite2 was fine-tuned for 7 epochs at 160 pixels and 3 at 224; those "
    "of seeds 0 and 1 taught the distilled runs.",
    "pad-ufes-20": "780 of the 2,298 images, not drawn at random, split by patient; the published split is by "
    "image and has patients in several splits. Each of the 238 test images corresponds to 0.42 percentage points. "
    "Seed 1 was stopped in epoch 34 of 45, after its best epoch. Seed 2 was distilled from the teachers of seeds 2 "
    "and 3, the others from those of seeds 0 and 1.",
    "cpn-xray": "A reconstruction, of the same size as the published dataset: COVID-19 Radiography Database (COVID, "
    "normal adults) and Kermany et al. (pneumonia, normal children). Classes are confounded with sources, so results "
    "say little about diagnosis: see the card. 87 of the patient numbers in test also occur in train or val. "
    "EfficientNet-Lite2 was fine-tuned for 12 epochs; those of seeds 0 and 1 taught the distilled runs.",
    "bloodmnist": "The official images in another random split, 70/10/20 per class, without 18 duplicates. "
    "EfficientNet-Lite2 was fine-tuned for 10 epochs at 128 pixels, the size of the small model.",
}


@dataclass(frozen=True)
class Run:
    """Results of one run, as stored in `hub/results`."""

    data: dict[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        """Dataset, recipe and architecture."""
        return self.data["dataset"], self.data["recipe"], self.data["architecture"]

    @property
    def seed(self) -> int:
        """Random seed of the run."""
        return self.data["seed"]

    def test(self, metric: str) -> float:
        """Returns a metric on the test split."""
        return self.data["test"][metric]["value"]

    @property
    def path(self) -> Path:
        """File in `hub/results`."""
        dataset, recipe, architecture = self.group
        return RESULTS / dataset / f"{recipe}-{architecture.replace(' ', '-')}-seed{self.seed}.json"

    @classmethod
    def of_folder(cls, folder: Path) -> Run:
        """Reads the output folder of a finished run."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        training, splits = results["training"], results["splits"]
        data: dict[str, Any] = {key: training[key] for key in KEPT if key in training}
        data["settings"] = {key: v for key, v in data["settings"].items() if key not in ("name", "description")}
        data["architecture"] = training["identity"]["model"]
        with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        best = [row for row in rows if row["best"] == "True"][-1]
        # Validation metrics that selected the epoch, and select the seed to release.
        data["selection"] = {name: float(best[f"val_{name}"]) for name in training["selected_by"]}
        for split, found in splits.items():
            data[split] = {"n": found["n_images"], **{name: found["overall"][name] for name in METRICS}}
        return cls(data)


def load_runs() -> list[Run]:
    """Loads all stored runs."""
    return [Run(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*/*.json"))]


def add(folders: Iterable[Path]) -> list[Path]:
    """Stores the results of finished runs; returns the files written.

    Raises:
        FileNotFoundError: a folder has no results.
    """
    written = []
    for folder in folders:
        run = Run.of_folder(folder)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(run.path, json_text(run.data, indent=1) + "\n")
        written.append(run.path)
    return written


def chosen(runs: Sequence[Run]) -> Run:
    """Returns the run to release: the best on validation, by the metrics that selected its epoch."""

    def score(run: Run) -> list[float]:
        return [-value if name == "loss" else value for name, value in run.data["selection"].items()]

    return max(sorted(runs, key=lambda run: run.seed), key=score)


def best(folders: Iterable[Path]) -> list[Path]:
    """Returns the folder to release per dataset, recipe and architecture, among those with a finished model."""
    found: dict[tuple[str, str, str], list[tuple[Run, Path]]] = {}
    for folder in folders:
        if (folder / "results.json").is_file() and (folder / "model.safetensors").is_file():
            run = Run.of_folder(folder)
            found.setdefault(run.group, []).append((run, folder))
    paths = []
    for group in found.values():
        winner = chosen([run for run, _ in group])
        paths.append(next(folder for run, folder in group if run is winner))
    return paths


def shipped(dataset: str) -> dict[str, tuple[str, str, int]]:
    """Maps the folders of a dataset in hub/models to (recipe, architecture, seed), larger models first."""
    found = {}
    for path in MODELS.glob("*/config.json"):
        training = json.loads(path.read_text(encoding="utf-8"))["training"]
        if training["dataset"] == dataset:
            found[path.parent.name] = training["recipe"], training["identity"]["model"], training["seed"]
    return dict(sorted(found.items(), key=lambda item: (item[1][1] == "nano", item[0])))


def document(runs: Sequence[Run]) -> str:
    """Returns the Markdown of docs/results.md."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if "test" in run.data:
            groups.setdefault(run.group, []).append(run)
    datasets = [name for name in registry.names() if any(key[0] == name for key in groups)]
    lines = [
        "# Results",
        "",
        "Generated by `python -m hub.results` from `hub/results`, which holds the results of every run, including",
        "unreleased ones. Epoch and seed were selected on validation, never on test. Intervals are 95 % bootstrap",
        "intervals over the test images; ± is the standard deviation over seeds. Published results use the official",
        "splits; the note above each table states how the split used here differs, which limits the comparison. Pairs",
        "are accuracy / AUROC. The published recipe was rerun here from scratch on the same images (means over seeds).",
        "",
        "| dataset | model in `hub/` | accuracy | AUROC | published recipe, rerun | ResNet-50, same recipe "
        "| published MedMamba-T | best published |",
        "|" + " --- |" * 8,
    ]
    for name in datasets:
        lines += _summary(name, runs)
    for run in sorted((run for run in runs if run.data["dataset"] == "joint"), key=lambda run: run.group[2] == "nano"):
        lines += ["", _joint(run)]
    for name in datasets:
        entry = registry.get(name)
        lines += ["", f"## {entry.title}", "", CAVEATS.get(name, ""), ""]
        head = "| model | recipe | seeds | accuracy | AUROC | balanced accuracy | initial weights |"
        lines += [head, "| --- " * 7 + "|"]
        for key in sorted(groups):
            if key[0] == name:
                lines.append(_row(key, groups[key]))
        for label, published in [("MedMamba-T", entry.published.get("tiny")), ("best other", entry.best_elsewhere)]:
            if published:
                title = f"{label}: {published.model}" if published.model else label
                lines.append(f"| {title}, published | | | {_plain(published.accuracy)} | {_plain(published.auc)} | | |")
        for folder, model in shipped(name).items():
            lines += _reproduce(name, folder, model, groups)
        lines += ["", "All runs, accuracy / AUROC on test:", ""]
        for key in sorted(groups):
            if key[0] == name:
                shown = ", ".join(
                    f"seed {run.seed} {run.test('accuracy'):.3f} / {run.test('auroc'):.3f}"
                    for run in sorted(groups[key], key=lambda run: run.seed)
                )
                lines.append(f"- {key[1]}, {key[2]}: {shown}")
    return "\n".join(lines) + "\n"


def _find(runs: Sequence[Run], dataset: str, model: tuple[str, str, int]) -> Run | None:
    """Returns the run of a model in `shipped`."""
    return next((run for run in runs if (*run.group, run.seed) == (dataset, *model)), None)


def readme(runs: Sequence[Run], text: str) -> str:
    """Returns the text of README.md with the model table between MARKERS regenerated."""
    rows = ["| name | classifies | size | accuracy | AUROC | published MedMamba-T | licence |", "| --- " * 7 + "|"]
    for dataset in registry.names():
        entry = registry.get(dataset)
        published = entry.published.get("tiny")
        for folder, (recipe, architecture, seed) in shipped(dataset).items():
            run = _find(runs, dataset, (recipe, architecture, seed))
            if run is None:
                continue
            config = json.loads((MODELS / folder / "config.json").read_text(encoding="utf-8"))
            size = f"{architecture}, {config['preprocess']['input_size'][0]} px"
            cells = [f"[`medmamba/{folder}`](hub/models/{folder})", entry.modality, size]
            cells += [_interval(run.data["test"][metric]) for metric in ("accuracy", "auroc")]
            cells += [f"{_plain(published.accuracy)} / {_plain(published.auc)}" if published else ""]
            cells += [_licence(folder)]
            rows.append("| " + " | ".join(cells) + " |")
    rows += _dense() + _backbones()
    before, first, rest = text.partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"{README} lacks the markers {MARKERS}")
    return "\n".join([before + first, "", *rows, "", last + after])


def _licence(folder: str) -> str:
    """Returns the licence of released weights, as the table shows it."""
    config = read_config(MODELS / folder)
    return terms_of(config, registry.get(config.training["dataset"])).licence.upper()


def _dense() -> list[str]:
    """Rows of the models for masks and boxes, with the metric that selected their epoch, on test images."""
    rows = []
    for folder in sorted(path.parent for path in MODELS.glob("*/config.json")):
        if is_dense(folder):
            facts = read_dense_facts(folder)
            name = facts.training["selected_by"][0]
            score = dict(facts.scores("test"))[name]
            value = f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
            does = "outlines" if facts.task == "segmentation" else "finds"
            size = f"{facts.config.encoder.architecture}, {facts.config.preprocess.input_size[0]} px"
            link = f"[`medmamba/{folder.name}`](hub/models/{folder.name})"
            what = f"no classes: {does} {facts.dataset}, {name} {value}"
            rows.append(f"| {link} | {what} | {size} | | | | {facts.terms.licence.upper()} |")
    return rows


def _backbones() -> list[str]:
    """Rows of the models without a classifier."""
    rows = []
    for path in sorted(MODELS.glob("*/config.json"), reverse=True):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config.get("num_classes", 1):
            size = f"{config['variant']}, {config['preprocess']['input_size'][0]} px"
            what = "no classes: initial weights for `train --from`"
            link = f"[`medmamba/{path.parent.name}`](hub/models/{path.parent.name})"
            rows.append(f"| {link} | {what} | {size} | | | | {config['training']['licence'].upper()} |")
    return rows


def _summary(name: str, runs: Sequence[Run]) -> list[str]:
    entry = registry.get(name)
    published, elsewhere = entry.published.get("tiny"), entry.best_elsewhere
    baselines = [[run for run in runs if run.group == (name, "paper-medmnist", kind)] for kind in BASELINES]
    rows = []
    for model in shipped(name).values() or [None]:
        run = _find(runs, name, model) if model else None
        cells = [entry.title]
        cells += [f"{run.group[2]}, {run.group[1]}, seed {run.seed}" if run else "none yet"]
        cells += [_interval(run.data["test"][metric]) if run else "" for metric in ("accuracy", "auroc")]
        for found in baselines if run is None or run.group[2] == "tiny" else [[], []]:
            means = [statistics.mean(run.test(metric) for run in found) for metric in ("accuracy", "auroc") if found]
            cells.append(" / ".join(map(_plain, means)))
        cells += [f"{_plain(published.accuracy)} / {_plain(published.auc)}" if published else ""]
        cells += [f"{_plain(elsewhere.accuracy)} ({elsewhere.model})" if elsewhere else ""]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _row(key: tuple[str, str, str], runs: Sequence[Run]) -> str:
    values = [_spread([run.test(metric) for run in runs]) for metric in ("accuracy", "auroc", "balanced_accuracy")]
    start = runs[0].data.get("init") or "scratch"
    return f"| {key[2]} | {key[1]} | {len(runs)} | {' | '.join(values)} | {start.split(', seed')[0].split(':')[0]} |"


def _joint(run: Run) -> str:
    data = run.data
    names = ", ".join(data.get("datasets") or ["several datasets"])
    return (
        f"`{data['recipe']}` ({data['architecture']}), seed {run.seed}, the starting point of the other recipes, was "
        f"trained on the training images of {names}: {data['split_sizes']['train']:,} images of all their classes, "
        f"{data['epochs']} epochs at {data['settings']['size']} pixels, {data['seconds']:.0f} s on {data['device']}; "
        f"accuracy on the combined validation images {data['val']['accuracy']['value']:.3f}."
    )


def _reproduce(
    name: str, folder: str, model: tuple[str, str, int], groups: dict[tuple[str, str, str], list[Run]]
) -> list[str]:
    recipe, architecture, seed = model
    group = groups.get((name, recipe, architecture))
    suffix, prefix = ("", "") if architecture == "tiny" else (f"-{architecture}", f"{architecture}-")
    base = f"zoo-{name.replace('-', '_')}{suffix}"
    if not group or not recipe.startswith(base):
        return []
    best_run = chosen(group)
    measures = ", ".join(best_run.data["selected_by"])
    released = f"Released checkpoint: {architecture}, seed {seed} (best of {len(group)} by validation {measures})."
    if recipe != base or str(best_run.data["init"]).endswith("-medical"):
        return ["", f"{released} Its [card](../hub/models/{folder}) lists the commands that reproduce it."]
    return [
        "",
        f"{released} To reproduce:",
        "",
        "```",
        f"python -m hub.zoo all --data DATA --out runs --only {prefix}{name}-{seed}",
        "```",
    ]


def _interval(metric: dict[str, float | None]) -> str:
    value, low, high = (_plain(metric[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hub.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check that the documents are up to date")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="store the results of finished runs")
    adding.add_argument("run", nargs="+", type=Path)
    choosing = commands.add_parser("best", help="print the run to release per model")
    choosing.add_argument("run", nargs="+", type=Path)
    args = parser.parse_args(argv)
    if args.command == "best":
        print(*best(args.run), sep="\n")
        return 0
    if args.command == "add":
        for path in add(args.run):
            print(path)
    runs = load_runs()
    texts = {DOCUMENT: document(runs), README: readme(runs, README.read_text(encoding="utf-8"))}
    if args.check:
        stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        print(*(f"{path.name} is out of date; run python -m hub.results" for path in stale), sep="\n")
        return 1 if stale else 0
    for path, text in texts.items():
        write_text(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
