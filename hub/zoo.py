"""python -m hub.zoo: trains the models that ship, one command each, and the baselines beside them.

pretrain    one model for all classes of the datasets in JOINT (recipe zoo-joint)
train       a dataset from those weights (recipe zoo-DATASET)
baseline    a dataset from scratch by the published recipe, with MedMamba or a model of timm
decode      only decodes the images into --cache, for a faster start of the others

    python -m hub.zoo pretrain --data DATA --out runs/joint
    python -m hub.zoo train breastmnist --data DATA --out runs/breastmnist-0 --init runs/joint --seed 0

DATA holds one folder per dataset, arranged as DATASET/SPLIT/CLASS/IMAGE. The same command goes on after an
interruption; exit code 3: stopped by --max-seconds or SIGTERM, to be continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medmamba import MedMamba
from medmamba.cli_train import STOPPED
from medmamba.data import ImageDataset, open_dataset
from medmamba.data.dataset import Record
from medmamba.data.files import FolderReader
from medmamba.training import TrainResult, train
from medmamba.training.graphs import GRAPHS
from medmamba.training.recipe import parse_setting

# What is known to stand in more than one split and is said with the figures: in breastmnist one picture in train and
# test, under different labels; in pneumoniamnist eight identical pictures.
DATASETS: dict[str, tuple[str, ...]] = {
    "breastmnist": ("duplicates",),
    "pneumoniamnist": ("duplicates",),
    "dermamnist": (),
    "bloodmnist": (),
}
# What the joint model learns from. Not dermamnist: its licence excludes commercial use, and so would all weights then.
JOINT = ("breastmnist", "pneumoniamnist", "bloodmnist")


def open_one(root: str | Path, name: str) -> ImageDataset:
    """One dataset in `root`, classes and patients as the registry knows them."""
    return open_dataset(Path(root) / name, dataset=name)


def open_joint(root: str | Path, names: Sequence[str] = JOINT) -> ImageDataset:
    """Train and val of several datasets as one, with all their classes; test images are left out."""
    records: list[Record] = []
    classes: list[str] = []
    for name in names:
        index = open_one(root, name)
        for record in index.records:
            if record.split in ("train", "val"):
                assert isinstance(record.label, int)
                source, label = f"{name}/{record.source}", len(classes) + record.label
                records.append(dataclasses.replace(record, source=source, label=label))
        classes += [f"{name}: {title}" for title in index.classes]
    return ImageDataset(records, classes, FolderReader(Path(root)), name="joint")


def pretrain(data: str | Path, out: str | Path, recipe: str = "zoo-joint", **options: Any) -> TrainResult:
    """The joint model. `options` are those of `medmamba.train`."""
    notes = {"datasets": list(JOINT)}
    options.setdefault("allow_leakage", ("duplicates",))
    return train(open_joint(data), out, recipe, notes=notes, **options)


def train_one(
    name: str,
    data: str | Path,
    out: str | Path,
    recipe: str | None = None,
    init: str | Path | None = None,
    **options: Any,
) -> TrainResult:
    """One dataset, from the weights in the folder `init` or from scratch. `options` are those of `medmamba.train`."""
    notes: dict[str, Any] = {}
    source: MedMamba | None = None
    if init is not None:
        source = MedMamba.from_pretrained(init)
        earlier = source.config.training
        options["init_name"] = f"{earlier.get('recipe')}, seed {earlier.get('seed')}"
        notes = {"pretraining": earlier.get("datasets", [])}
    options.setdefault("allow_leakage", DATASETS[name])
    return train(open_one(data, name), out, recipe or f"zoo-{name}", init=source, dataset=name, notes=notes, **options)


def decode(name: str, data: str | Path, cache: Path, sizes: Sequence[int], processes: int = 1) -> None:
    """Decodes all splits of a dataset, or of "joint", to where the other commands look with the same --cache."""
    from medmamba.config import PreprocessConfig
    from medmamba.data import cache_images

    index = open_joint(data) if name == "joint" else open_one(data, name)
    (cache / name).mkdir(parents=True, exist_ok=True)
    for size in sizes:
        config = PreprocessConfig(input_size=(size, size))
        for split, count in index.split_sizes.items():
            if split and count:
                file = cache / name / f"{split}-{size}.npy"
                cache_images(index.split(split), config, file=file, processes=processes)


def wait_for(init: Path, device: str) -> None:
    """Returns when the model in `init` is complete; whatever takes time to start is started before."""
    from medmamba.pretrained import CONFIG_NAME, WEIGHTS_NAME
    from medmamba.training.setup import make_accelerator

    torch.zeros(1, device=make_accelerator(device).device)
    while not ((init / CONFIG_NAME).is_file() and (init / WEIGHTS_NAME).is_file()):
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "decode":
        for name in args.dataset:
            decode(name, args.data, args.cache, args.size, args.processes)
        return 0
    settings = dict(parse_setting(text) for text in args.set)
    options: dict[str, Any] = {
        "seed": args.seed,
        "device": args.device,
        "max_seconds": args.max_seconds,
        "cache": args.cache / (args.dataset if args.command != "pretrain" else "joint") if args.cache else None,
        "graphs": args.graphs,
        "progress": not args.quiet,
    }
    if args.command != "pretrain":
        options["check_duplicates"] = not args.no_duplicate_check
    if args.command == "baseline" and args.model != "medmamba":
        from .baseline import train_baseline

        finished = train_baseline(args.model, args.dataset, args.data, args.out, args.recipe, **options, **settings)
    else:
        options |= {"variant": args.variant, "checkpoint_seconds": args.checkpoint_seconds, **settings}
        if args.command == "pretrain":
            result = pretrain(args.data, args.out, args.recipe, **options)
        else:
            init = args.init if args.command == "train" else None
            if init and args.wait:
                wait_for(init, args.device)
            result = train_one(args.dataset, args.data, args.out, args.recipe, init, **options)
        finished = result.finished
    if not finished:
        print("stopped; the same command goes on from there")
        return STOPPED
    print(f"finished: {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    common.add_argument("--cache", type=Path, help="keep decoded images here")
    run = argparse.ArgumentParser(add_help=False, parents=[common])
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--variant", default="tiny", help="size of a new MedMamba (%(default)s)")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the recipe")
    run.add_argument("--device", default="auto")
    run.add_argument("--graphs", default="auto", choices=GRAPHS, help="CUDA graphs (%(default)s)")
    run.add_argument("--max-seconds", type=float)
    run.add_argument("--checkpoint-seconds", type=float, default=60.0)
    run.add_argument("--quiet", action="store_true")

    parser = argparse.ArgumentParser(
        prog="python -m hub.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    joint = commands.add_parser("pretrain", parents=[run], help="the joint model")
    joint.add_argument("--recipe", default="zoo-joint")
    one = commands.add_parser("train", parents=[run], help="a dataset by our recipe")
    one.add_argument("dataset", choices=DATASETS)
    one.add_argument("--recipe", help="default: zoo-DATASET")
    one.add_argument("--init", type=Path, help="folder of the joint model; without: from scratch")
    one.add_argument("--wait", action="store_true", help="until the model in --init is there")
    base = commands.add_parser("baseline", parents=[run], help="a dataset by the published recipe, from scratch")
    base.add_argument("dataset", choices=DATASETS)
    base.add_argument("--recipe", default="paper-medmnist")
    for command in (one, base):
        unchecked = "an earlier run has found none; saves decoding every image"
        command.add_argument("--no-duplicate-check", action="store_true", help=unchecked)
    base.add_argument("--model", default="medmamba", help="medmamba or a name in timm, such as resnet50")
    only = commands.add_parser("decode", parents=[common], help="decode images into --cache")
    only.add_argument("dataset", nargs="+", choices=[*DATASETS, "joint"])
    only.add_argument("--size", type=int, nargs="+", default=[224])
    only.add_argument("--processes", type=int, default=1, help="forks that decode, for many cores (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
