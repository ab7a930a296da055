"""python -m hub.robust --data DATA --out DIR: what the recipe finetune-robust gains on corrupted images, and costs.

Trains nano from nano-medical with each recipe on the same part of the training images, once for each seed, and measures
the balanced error on clean and on corrupted images of val and of test. The recipe to be recommended is the one with the
lowest mean error on the corrupted images of val; the figures to report are those of test. Trained models, and the
logits of each kind of corruption, are kept in DIR, so that a later run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import MedMamba
from medmamba.data import ImageDataset, open_dataset
from medmamba.evaluation import match_classes
from medmamba.evaluation.corruptions import Corruptions, evaluate_corruptions
from medmamba.evaluation.corruptions.run import proportional
from medmamba.training import train
from medmamba.utils.checksums import WEIGHTS_NAME, file_hash
from medmamba.utils.devices import make_accelerator
from medmamba.utils.modes import frozen_view

from .transfer import limit_training

START = Path(__file__).resolve().parent / "models" / "nano-medical"
RECIPES = ("finetune", "finetune-robust")


def trained(index: ImageDataset, out: Path, recipe: str, seed: int, device: str, settings: dict[str, Any]) -> Path:
    """Trains a model unless it is there; returns its folder."""
    folder = out / f"{Path(recipe).stem}-{seed}"
    if not (folder / "results.json").is_file():
        result = train(
            index,
            folder,
            recipe,
            init=START,
            dataset=index.name,
            seed=seed,
            device=device,
            cache=out / "cache",
            check_duplicates=False,
            allow_leakage=("duplicates",),
            progress=False,
            **settings,
        )
        if not result.finished:
            raise SystemExit(f"{folder}: stopped; rerun the same command to resume")
    return folder


def measured(folder: Path, part: ImageDataset, images: int, device: str, resamples: int) -> Corruptions:
    """Measures a model on clean and corrupted images, from the logits that are kept as far as they are there."""
    model = MedMamba.from_pretrained(folder)
    accelerator = make_accelerator(device, "fp32")
    return evaluate_corruptions(
        frozen_view(model, device=accelerator.device),
        match_classes(part, model.config),
        accelerator,
        images=images,
        resamples=resamples,
        keep=folder / "corrupted",
        weights=file_hash(folder / WEIGHTS_NAME),
        context={"model": folder.name, "data": part.name, "images": images},
    )


def few(index: ImageDataset, training: int, validation: int) -> ImageDataset:
    """Returns the dataset with so many training and validation images, stratified by class; test is unchanged."""
    index = limit_training(index, training)
    rows = np.flatnonzero([split == "val" for split in index.splits])
    kept = set(rows[proportional(index.split("val"), validation, 0)].tolist())
    return index.subset([i for i, split in enumerate(index.splits) if split != "val" or i in kept])


def table(found: dict[str, dict[str, list[Corruptions]]]) -> str:
    """Returns the errors of each recipe as a Markdown table: means over seeds, and in brackets those of each."""

    def cell(runs: list[Corruptions], name: str) -> str:
        values = [getattr(run, name).value for run in runs]
        return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"

    lines = ["| recipe | split | images | clean | corrupted | increase |", "| --- " * 6 + "|"]
    for recipe, splits in found.items():
        for split, runs in splits.items():
            cells = [cell(runs, name) for name in ("clean", "mean", "excess")]
            lines.append(f"| {Path(recipe).stem} | {split} | {runs[0].n_images} | {' | '.join(cells)} |")
    kinds = [
        "",
        "| kind, on test | " + " | ".join(Path(recipe).stem for recipe in found) + " |",
        "| --- " * (1 + len(found)) + "|",
    ]
    runs_of = [splits["test"] for splits in found.values()]
    for kind in runs_of[0][0].errors:
        means = [np.mean([run.errors[kind] for run in runs]) for runs in runs_of]
        kinds.append(f"| {kind.replace('_', ' ')} | {' | '.join(f'{value:.3f}' for value in means)} |")
    return "\n".join([*lines, *kinds]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hub.robust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--dataset", default="bloodmnist", help="default: %(default)s")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME", help="names or .json files")
    parser.add_argument("--train-images", type=int, default=1600, metavar="N", help="default: %(default)s")
    parser.add_argument("--val-images", type=int, default=600, metavar="N", help="that choose the epoch (%(default)s)")
    parser.add_argument(
        "--images", type=int, nargs=2, default=(60, 150), metavar="N", help="corrupted, of val and test"
    )
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--resamples", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    index = few(open_dataset(args.data / args.dataset, dataset=args.dataset), args.train_images, args.val_images)
    settings = {"epochs": args.epochs, "size": args.size}
    found: dict[str, dict[str, list[Corruptions]]] = {recipe: {"val": [], "test": []} for recipe in args.recipes}
    folders = {
        (recipe, seed): trained(index, args.out, recipe, seed, args.device, settings)
        for seed in range(args.seeds)
        for recipe in args.recipes
    }
    for (recipe, _), folder in folders.items():
        for split, images in zip(("val", "test"), args.images, strict=True):
            one = measured(folder, index.split(split), images, args.device, args.resamples)
            found[recipe][split].append(one)
            print(f"{folder.name} {split}: clean {one.clean}, corrupted {one.mean}", flush=True)
    chosen = min(args.recipes, key=lambda recipe: float(np.mean([run.mean.value for run in found[recipe]["val"]])))
    text = f"{table(found)}\nChosen on val: {chosen}\n"
    (args.out / "robust.md").write_text(text, encoding="utf-8")
    record = {
        recipe: {split: [run.to_dict() for run in runs] for split, runs in of.items()} for recipe, of in found.items()
    }
    (args.out / "robust.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
