"""Figures of all runs, and what is made from them: docs/results.md, and the list of models in README.md.

    python -m hub.results add runs/breastmnist-*     keeps the figures of finished runs in hub/results
    python -m hub.results                            writes both
    python -m hub.results --check                    fails where one is not what the figures give
    python -m hub.results best runs/*                which seed of each model ships: the best on validation

Every run is kept, also those that do not ship, so that a mean is over all of them and not over the good ones.
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

from medmamba.data import registry
from medmamba.training.checkpoint import write_text

HUB = Path(__file__).parent
RESULTS, MODELS, DOCUMENT = HUB / "results", HUB / "models", HUB.parent / "docs" / "results.md"
README, MARKERS = HUB.parent / "README.md", ("<!-- models: python -m hub.results -->", "<!-- end of models -->")
BASELINES = "tiny", "timm resnet50"
METRICS = ("accuracy", "auroc", "balanced_accuracy", "f1", "ece")

# Of the record of a run.
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

# What the splits are that these figures were measured on, against those of the published figures.
CAVEATS = {
    "breastmnist": "The official split, recovered by matching the 28-pixel images to their originals. Images were "
    "squashed to a square, MedMNIST crops them. One picture stands in train and in test, under different labels. One "
    "of the 156 test images is 0.64 points.",
    "pneumoniamnist": "Official sizes; the test folder of the source, of which 557 of 624 images are known to be in "
    "the official test set. That folder differs from the one which train and val are from: figures on val are much "
    "higher and say little about test. Eight identical pictures stand in more than one split.",
    "dermamnist": "Split by lesion: all images of a lesion are in one split. The official split is by image and has "
    "lesions in several splits, so figures here are expected to be lower than published ones. Non-commercial images.",
    "bloodmnist": "The official images in another random split, 70/10/20 within each class, without 18 doubles.",
}


@dataclass(frozen=True)
class Run:
    """The figures of one run, as `hub/results` keeps them."""

    data: dict[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        return self.data["dataset"], self.data["recipe"], self.data["architecture"]

    @property
    def seed(self) -> int:
        return self.data["seed"]

    def test(self, metric: str) -> float:
        return self.data["test"][metric]["value"]

    @property
    def path(self) -> Path:
        dataset, recipe, architecture = self.group
        return RESULTS / dataset / f"{recipe}-{architecture.replace(' ', '-')}-seed{self.seed}.json"

    @classmethod
    def of_folder(cls, folder: Path) -> Run:
        """Of the folder that a finished run left."""
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        training, splits = results["training"], results["splits"]
        data: dict[str, Any] = {key: training[key] for key in KEPT if key in training}
        data["settings"] = {key: v for key, v in data["settings"].items() if key not in ("name", "description")}
        data["architecture"] = training["identity"]["model"]
        with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        best = [row for row in rows if row["best"] == "True"][-1]
        # What decided about the epoch, and decides about the seed.
        data["selection"] = {name: float(best[f"val_{name}"]) for name in training["selected_by"]}
        for split, found in splits.items():
            data[split] = {"n": found["n_images"], **{name: found["overall"][name] for name in METRICS}}
        return cls(data)


def load_runs() -> list[Run]:
    return [Run(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*/*.json"))]


def add(folders: Iterable[Path]) -> list[Path]:
    """Keeps the figures of finished runs.

    Raises:
        FileNotFoundError: a folder without results.
    """
    written = []
    for folder in folders:
        run = Run.of_folder(folder)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(run.path, json.dumps(run.data, indent=1, ensure_ascii=False) + "\n")
        written.append(run.path)
    return written


def chosen(runs: Sequence[Run]) -> Run:
    """The seed that ships: best on validation by the measures that chose its epoch."""

    def score(run: Run) -> list[float]:
        return [-value if name == "loss" else value for name, value in run.data["selection"].items()]

    return max(sorted(runs, key=lambda run: run.seed), key=score)


def best(folders: Iterable[Path]) -> list[Path]:
    """Of the folders with a finished model, the one to ship of each dataset, recipe and architecture."""
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
    """The models of a dataset in hub/models: folder to recipe, architecture and seed; the larger ones first."""
    found = {}
    for path in MODELS.glob("*/config.json"):
        training = json.loads(path.read_text(encoding="utf-8"))["training"]
        if training["dataset"] == dataset:
            found[path.parent.name] = training["recipe"], training["identity"]["model"], training["seed"]
    return dict(sorted(found.items(), key=lambda item: (item[1][1] == "nano", item[0])))


def document(runs: Sequence[Run]) -> str:
    """docs/results.md."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if "test" in run.data:
            groups.setdefault(run.group, []).append(run)
    datasets = [name for name in registry.names() if any(key[0] == name for key in groups)]
    lines = [
        "# Results",
        "",
        "Written by `python -m hub.results` from `hub/results`, which holds the figures of every run, also of those",
        "that did not ship. Test images decided nothing: epoch and seed were chosen on validation. Intervals are 95 %,",
        "by bootstrap over the test images; ± is the standard deviation over seeds. Published figures are those of the",
        "official splits; what the splits here are, and so what a comparison is worth, is said above each table. Pairs",
        "are accuracy / AUROC. The published recipe was run here from scratch, on the same images; means of its seeds.",
        "",
        "| dataset | model in `hub/` | accuracy | AUROC | published recipe, here | ResNet-50 by it, here "
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
        lines += ["| model | recipe | seeds | accuracy | AUROC | balanced accuracy | from |", "| --- " * 7 + "|"]
        for key in sorted(groups):
            if key[0] == name:
                lines.append(_row(key, groups[key]))
        for label, published in [("MedMamba-T", entry.published.get("tiny")), ("best other", entry.best_elsewhere)]:
            if published:
                title = f"{label}: {published.model}" if published.model else label
                lines.append(f"| {title}, published | | | {_plain(published.accuracy)} | {_plain(published.auc)} | | |")
        for ours in shipped(name).values():
            lines += _reproduce(name, ours, groups)
        lines += ["", "Every run, accuracy / AUROC on test:", ""]
        for key in sorted(groups):
            if key[0] == name:
                shown = ", ".join(
                    f"seed {run.seed} {run.test('accuracy'):.3f} / {run.test('auroc'):.3f}"
                    for run in sorted(groups[key], key=lambda run: run.seed)
                )
                lines.append(f"- {key[1]}, {key[2]}: {shown}")
    return "\n".join(lines) + "\n"


def _find(runs: Sequence[Run], dataset: str, ours: tuple[str, str, int]) -> Run | None:
    """The run of a model as `shipped` names it."""
    return next((run for run in runs if (*run.group, run.seed) == (dataset, *ours)), None)


def readme(runs: Sequence[Run], text: str) -> str:
    """README.md with its list of models, which stands between MARKERS, as hub/models and the figures give it."""
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
            cells += [entry.licence.id or ""]
            rows.append("| " + " | ".join(cells) + " |")
    before, first, rest = text.partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"{README} has lost its markers {MARKERS}")
    return "\n".join([before + first, "", *rows, "", last + after])


def _summary(name: str, runs: Sequence[Run]) -> list[str]:
    entry = registry.get(name)
    published, elsewhere = entry.published.get("tiny"), entry.best_elsewhere
    baselines = [[run for run in runs if run.group == (name, "paper-medmnist", kind)] for kind in BASELINES]
    rows = []
    for ours in shipped(name).values() or [None]:
        run = _find(runs, name, ours) if ours else None
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
    figures = [_spread([run.test(metric) for run in runs]) for metric in ("accuracy", "auroc", "balanced_accuracy")]
    start = runs[0].data.get("init") or "scratch"
    return f"| {key[2]} | {key[1]} | {len(runs)} | {' | '.join(figures)} | {start.split(', seed')[0].split(':')[0]} |"


def _joint(run: Run) -> str:
    data = run.data
    names = ", ".join(data.get("datasets") or ["several datasets"])
    return (
        f"`{data['recipe']}` ({data['architecture']}), seed {run.seed}, from which our recipes start, was trained on "
        f"the training images of {names}: {data['split_sizes']['train']:,} images of all their classes, "
        f"{data['epochs']} epochs at "
        f"{data['settings']['size']} pixels, {data['seconds']:.0f} s on {data['device']}; accuracy on the validation "
        f"images together {data['val']['accuracy']['value']:.3f}."
    )


def _reproduce(name: str, ours: tuple[str, str, int], groups: dict[tuple[str, str, str], list[Run]]) -> list[str]:
    recipe, architecture, seed = ours
    group = groups.get((name, recipe, architecture))
    suffix, prefix = ("", "") if architecture == "tiny" else (f"-{architecture}", f"{architecture}-")
    if not group or recipe != f"zoo-{name}{suffix}":
        return []
    measures = ", ".join(chosen(group).data["selected_by"])
    return [
        "",
        f"Shipped of {architecture}: seed {seed}, best of {len(group)} on validation ({measures}). Again:",
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
    parser = argparse.ArgumentParser(
        prog="python -m hub.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="keep the figures of finished runs")
    adding.add_argument("run", nargs="+", type=Path)
    choosing = commands.add_parser("best", help="which seed of each model ships")
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
        print(*(f"{path.name} is not what hub/results gives" for path in stale), sep="\n")
        return 1 if stale else 0
    for path, text in texts.items():
        write_text(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
