"""Trains the segmentation models of this project, and peers in the same trainer, from one table of runs.

    python -m hub.segment list
    python -m hub.segment train --data DATA --out RUNS --only kvasir_seg-nano-0
    python -m hub.segment table RUNS

DATA holds `kvasir_seg`, `pad_ufes_20` and `pad_ufes_20_masks`, laid out as train, val and test.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.imaging import expand_inputs
from medmamba.segmentation.dataset import Pair, SegmentationDataset, mask_from_file, pair_by_name
from medmamba.segmentation.open import open_segmentation
from medmamba.training.segmentation_run import train_segmenter

from .segment_peers import PEERS, peer

SEEDS = (0, 1, 2)
DATASETS = {"kvasir_seg": "polyp", "pad_ufes_20": "lesion"}
STARTS = {"nano": "nano-medical", "tiny": "tiny-medical"}


@dataclass(frozen=True)
class Run:
    """One training: a dataset, an encoder ("nano", "tiny", "nano-scratch") or a peer, and a seed."""

    dataset: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.model}-{self.seed}"


RUNS = [
    Run(dataset, model, seed)
    for dataset in DATASETS
    for model in ("nano", "tiny", "nano-scratch", *PEERS)
    for seed in SEEDS
]


def load(data: Path, name: str) -> SegmentationDataset:
    """Opens a dataset: `pad_ufes_20` has its images by class, and its masks in a folder of their own."""
    if name == "kvasir_seg":
        return open_segmentation(data / name, (DATASETS[name],))
    pairs: list[Pair] = []
    for split in ("train", "val", "test"):
        masks = expand_inputs(data / "pad_ufes_20_masks" / split)
        wanted = {path.stem for path in masks}
        images = [path for path in expand_inputs(data / name / split) if path.stem in wanted]  # some have no mask
        for image, mask in pair_by_name(images, masks, f"{name}/{split}"):
            patient = "_".join(image.stem.split("_")[:2])
            pairs.append(Pair(image, str(mask), mask, mask_from_file(mask, 1), split, patient))
    return SegmentationDataset(name, (DATASETS[name],), tuple(pairs))


def train(run: Run, data: Path, out: Path, models: Path, **settings: Any) -> dict[str, Any]:
    """Trains one run; returns its results. A finished one is returned as it is, an unfinished one resumed."""
    dataset = load(data, run.dataset)
    options: dict[str, Any] = dict(seed=run.seed, progress=False, **settings)
    if run.model in PEERS:
        options["init"] = peer(run.model, dataset.classes, options.get("size") or 352)
        options.setdefault("layer_decay", 1.0)
    elif run.model in STARTS:
        options["init"] = models / STARTS[run.model]
    else:
        options |= {"variant": run.model.removesuffix("-scratch"), "layer_decay": 1.0}
    result = train_segmenter(dataset, out / run.name, dataset.classes, **options)
    if not result.finished:
        raise SystemExit(f"{run.name} was stopped after epoch {result.epoch}; the same command resumes it")
    return json.loads((out / run.name / "results.json").read_text(encoding="utf-8"))


def table(folder: Path) -> str:
    """Returns mean and standard deviation over the seeds of every model, as Markdown."""
    rows = ["| dataset | model | seeds | Dice (test) | IoU (test) | Dice (val) |", "|---|---|---|---|---|---|"]
    for dataset in DATASETS:
        for model in dict.fromkeys(run.model for run in RUNS):
            files = sorted(folder.glob(f"{dataset}-{model}-[0-9]*/results.json"))
            found = [json.loads(file.read_text(encoding="utf-8"))["splits"] for file in files]
            if found:
                cells = [
                    _mean([_value(result[split], metric) for result in found])
                    for split, metric in (("test", "dice"), ("test", "iou"), ("val", "dice"))
                ]
                rows.append(f"| {dataset} | {model} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _value(split: dict[str, Any], metric: str) -> float:
    return float(split["metrics"][split["classes"][0]][metric]["value"])


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m hub.segment", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the runs")
    training = commands.add_parser("train", help="train runs, one after the other")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--models", type=Path, default=Path("hub/models"), help="folder of the pretrained encoders")
    training.add_argument("--only", nargs="+", required=True, help="names of runs, see list")
    training.add_argument("--set", nargs="*", default=[], help="settings of the recipe, such as epochs=10")
    shown = commands.add_parser("table", help="the results of a folder of runs")
    shown.add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        print("\n".join(run.name for run in RUNS))
    elif chosen.command == "table":
        print(table(chosen.folder))
    else:
        from medmamba.training.recipe import parse_setting

        settings = dict(parse_setting(text) for text in chosen.set)
        known = {run.name: run for run in RUNS}
        if unknown := [name for name in chosen.only if name not in known]:
            parser.error(f"no runs {', '.join(unknown)}; see: python -m hub.segment list")
        for name in chosen.only:
            found = train(known[name], chosen.data, chosen.out, chosen.models, **settings)
            print(name, f"test Dice {_value(found['splits']['test'], 'dice'):.4f}", flush=True)


if __name__ == "__main__":
    main()
