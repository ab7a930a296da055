"""What the tables of runs of `hub.segment` and `hub.detect` share: names, the command line and the table of results."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "dense"
STARTS = {"nano": "nano-medical", "tiny": "tiny-medical", "nano-blood": "bloodmnist-nano"}


@dataclass(frozen=True)
class Run:
    """One training: a dataset, an encoder ("nano", "tiny", "nano-scratch", ...) or a peer, and a seed (or fold)."""

    dataset: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.model}-{self.seed}"


Trains = Callable[..., dict[str, Any]]
"""Takes a run, the folders of data, output and pretrained encoders, and settings; returns what results.json holds."""
Metric = tuple[str, Callable[[dict[str, Any]], float]]
"""Title of a column, and its value in the results of a split."""


def runs(datasets: Sequence[str], models: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Returns the runs of every dataset, model and seed."""
    return [Run(dataset, model, seed) for dataset in datasets for model in models for seed in seeds]


def start_of(run: Run, models: Path) -> dict[str, Any]:
    """Returns what a trainer needs to start the encoder of a run: `init`, or a new one of its variant."""
    if run.model in STARTS:
        return {"init": models / STARTS[run.model]}
    return {"variant": run.model.removesuffix("-scratch"), "layer_decay": 1.0}


def finished(result: Any, run: Run, out: Path) -> dict[str, Any]:
    """Returns the content of results.json.

    Raises:
        SystemExit: the run was stopped; the message says how to go on.
    """
    if not result.finished:
        raise SystemExit(f"{run.name} was stopped after epoch {result.epoch}; the same command resumes it")
    return json.loads((out / run.name / "results.json").read_text(encoding="utf-8"))


def read_results(run: Path) -> dict[str, Any]:
    """Returns what results.json of a run holds, without paths of the machine that it ran on."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    training = {**results["training"], "init": Path(str(results["training"]["init"])).name}
    return {"splits": results["splits"], "training": training}


def store(folders: Sequence[Path], target: Path = RESULTS) -> list[Path]:
    """Stores the results of finished runs; returns the files written.

    Raises:
        FileNotFoundError: a folder has no results.
    """
    found = {target / folder.name / "results.json": read_results(folder) for folder in folders}
    for path, results in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json_text(results, indent=1) + "\n")
    return list(found)


def table(folder: Path, known: Sequence[Run], metrics: Sequence[Metric]) -> str:
    """Returns mean and standard deviation over the seeds of every model, as Markdown."""
    columns = [(split, *metric) for split in ("test", "val") for metric in metrics]
    header = ["dataset", "model", "seeds", *(f"{title} ({split})" for split, title, _ in columns)]
    rows = [header, ["---"] * len(header)]
    for dataset, model in dict.fromkeys((run.dataset, run.model) for run in known):
        files = sorted(folder.glob(f"{dataset}-{model}-[0-9]*/results.json"))
        found = [json.loads(file.read_text(encoding="utf-8"))["splits"] for file in files]
        if found:
            cells = [mean([value(result[split]) for result in found]) for split, _, value in columns]
            rows.append([dataset, model, str(len(found)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean(values: Sequence[float]) -> str:
    """Formats mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def command_line(
    module: str,
    doc: str,
    known: Sequence[Run],
    train: Trains,
    metrics: Sequence[Metric],
    arguments: Sequence[str] | None = None,
) -> None:
    """Runs `list`, `train`, `table` and `store`.

    Args:
        module: such as "hub.segment".
        doc: its first line describes the command.
        known: all runs.
        train: trains one; a finished one is returned as it is, an unfinished one resumed.
        metrics: columns of the table; the first is printed after a training.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the runs")
    training = commands.add_parser("train", help="train runs, one after the other")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--models", type=Path, default=Path("hub/models"), help="folder of the pretrained encoders")
    training.add_argument("--only", nargs="+", required=True, help="names of runs, see list")
    training.add_argument("--set", nargs="*", default=[], help="settings of the recipe, such as epochs=10")
    shown = commands.add_parser("table", help="the results of a folder of runs")
    shown.add_argument(
        "folder", type=Path, nargs="?", default=RESULTS, help="default: the stored ones, hub/results/dense"
    )
    storing = commands.add_parser("store", help="copy the results of finished runs into hub/results/dense")
    storing.add_argument("folders", type=Path, nargs="+")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        print("\n".join(run.name for run in known))
    elif chosen.command == "table":
        print(table(chosen.folder, known, metrics))
    elif chosen.command == "store":
        print("\n".join(map(str, store(chosen.folders))))
    else:
        from medmamba.training.recipe import parse_setting

        settings = dict(parse_setting(text) for text in chosen.set)
        by_name = {run.name: run for run in known}
        if unknown := [name for name in chosen.only if name not in by_name]:
            parser.error(f"no runs {', '.join(unknown)}; see: python -m {module} list")
        title, value = metrics[0]
        for name in chosen.only:
            found = train(by_name[name], chosen.data, chosen.out, chosen.models, **settings)
            print(name, f"test {title} {value(found['splits']['test']):.4f}", flush=True)
