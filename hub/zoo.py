"""python -m hub.zoo: trains the models that ship, one command each, and the baselines beside them.

pretrain    one model for all classes of the datasets in JOINT (recipe zoo-joint)
train       a dataset from those weights (recipe zoo-DATASET)
baseline    a dataset from scratch by the published recipe, with MedMamba or a model of timm
decode      only decodes the images into --cache, for a faster start of the others, and looks for doubles in the splits
all         all of these, on all GPUs there are

    python -m hub.zoo pretrain --data DATA --out runs/joint
    python -m hub.zoo train breastmnist --data DATA --out runs/breastmnist-0 --init runs/joint --seed 0
    python -m hub.zoo all --data DATA --out runs

DATA holds one folder per dataset, arranged as DATASET/SPLIT/CLASS/IMAGE. The same command goes on after an
interruption; exit code 3: stopped by --max-seconds or SIGTERM, to be continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medmamba import MedMamba
from medmamba.cli.train import STOPPED
from medmamba.data import ImageDataset, check_leakage, open_dataset
from medmamba.data.dataset import Record
from medmamba.data.files import FolderReader
from medmamba.training import TrainResult, train
from medmamba.training.checkpoint import write_text
from medmamba.training.cuda_graphs import GRAPHS
from medmamba.training.recipe import parse_setting
from medmamba.training.run import fingerprint

from .job_queue import Job, Queue

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
QUICK = ("breastmnist", "pneumoniamnist")  # so few images that more than one seed of a baseline is cheap
SMALL_RECIPE = "zoo-bloodmnist-nano"  # of the small model, from which others start: it must not know their images
DECODED = "decoded.json"  # in the cache of a dataset: what `decode` has done


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
    index = open_one(data, name)
    if checked := doubles_checked(index, options.get("cache")):
        options["check_duplicates"], notes["duplicates_checked"] = False, checked
    options.setdefault("allow_leakage", DATASETS[name])
    return train(index, out, recipe or f"zoo-{name}", init=source, dataset=name, notes=notes, **options)


def decode(name: str, data: str | Path, cache: Path, sizes: Sequence[int], processes: int = 1) -> None:
    """Decodes all splits of a dataset, or of "joint", to where the other commands look with the same --cache, and looks
    for identical images in several splits, which these then need not.

    Raises:
        LeakageError: there are such images, other than those that `DATASETS` allows.
    """
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
    if name != "joint":
        check_leakage(index, allow=DATASETS[name])
    write_text(cache / name / DECODED, json.dumps({"data": fingerprint(index), "sizes": list(sizes)}))


def doubles_checked(index: ImageDataset, cache: Path | None) -> str | None:
    """How it is known that `index` has no doubles across splits; None: it is not."""
    try:
        found = json.loads((cache / DECODED).read_text()) if cache else {}
    except (OSError, ValueError):
        return None
    return "by hub.zoo decode" if found.get("data") == fingerprint(index) else None


def wait_for(init: Path, device: str) -> None:
    """Returns when the model in `init` is complete; whatever takes time to start is started before."""
    from medmamba.pretrained.mixin import CONFIG_NAME, WEIGHTS_NAME
    from medmamba.training.setup import make_accelerator

    torch.zeros(1, device=make_accelerator(device).device)
    while not ((init / CONFIG_NAME).is_file() and (init / WEIGHTS_NAME).is_file()):
        time.sleep(0.2)


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """What `all` runs, what is needed most first."""
    out, cache = args.out, args.cache or args.out / "cache"
    place = ["--data", str(args.data), "--cache", str(cache)]
    seeds = range(args.seeds)

    def decoding(name: str, *sizes: int) -> Job:
        words = ("-m", "hub.zoo", "decode", name, "--size", *map(str, sizes), "--processes", str(args.processes))
        return Job(f"decode-{name}", (*words, *place), cache / name / DECODED, gpu=False)

    def training(name: str, *words: str, after: Sequence[str] = ()) -> Job:
        command = ["-m", "hub.zoo", *words, *place, "--out", str(out / name), "--device", args.device, "--quiet"]
        settings = ["--set", *args.set] if args.set else []
        return Job(name, (*command, *settings), out / name / "results.json", tuple(after))

    def ours(dataset: str, seed: int) -> Job:
        words = ("train", dataset, "--init", str(out / "joint"), "--seed", str(seed))
        return training(f"{dataset}-{seed}", *words, after=["joint", f"decode-{dataset}"])

    def small(dataset: str, seed: int) -> Job:
        words = ("train", dataset, "--recipe", SMALL_RECIPE, "--variant", args.small, "--seed", str(seed))
        return training(f"nano-{dataset}-{seed}", *words, after=[f"decode-{dataset}"])

    def baseline(dataset: str, seed: int, model: str) -> Job:
        words = ("baseline", dataset, "--seed", str(seed), "--model", model)
        label = "paper" if model == "medmamba" else model
        return training(f"{dataset}-{label}-{seed}", *words, after=[f"decode-{dataset}"])

    jobs = [decoding("joint", args.size[0]), *(decoding(name, *args.size) for name in DATASETS)]
    jobs.append(training("joint", "pretrain", "--variant", args.variant, after=["decode-joint"]))
    jobs += [ours(name, seed) for seed in seeds for name in DATASETS]
    jobs += [small("bloodmnist", seed) for seed in seeds]
    for name in DATASETS:  # the smaller ones first, in which a seed more is cheap
        for seed in seeds if name in QUICK else seeds[:1]:
            jobs += [baseline(name, seed, "medmamba"), baseline(name, seed, "resnet50")]
    wanted = set(args.only or [job.name for job in jobs])
    while more := {need for job in jobs if job.name in wanted for need in job.after} - wanted:
        wanted |= more
    if unknown := wanted - {job.name for job in jobs}:
        raise SystemExit(f"no run {', '.join(sorted(unknown))}; there are {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if job.name in wanted]


def run_all(args: argparse.Namespace) -> int:
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is not a folder; it should hold one folder per dataset")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    devices = args.gpus or [str(i) for i in range(gpus)] or [""]
    return Queue(all_jobs(args), devices, args.per_gpu, args.out / "logs", args.max_seconds).run()


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "all":
        return run_all(args)
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
    base.add_argument("--model", default="medmamba", help="medmamba or a name in timm, such as resnet50")
    every = commands.add_parser("all", parents=[common], help="all models and baselines, on all GPUs there are")
    every.add_argument("--out", type=Path, required=True, help="folder for the folders of the runs")
    every.add_argument("--only", nargs="+", metavar="RUN", help="these, and what they need")
    every.add_argument("--seeds", type=int, default=3, help="per dataset (%(default)s)")
    every.add_argument("--gpus", nargs="+", metavar="ID", help="as in CUDA_VISIBLE_DEVICES; default: all")
    every.add_argument("--per-gpu", type=int, default=2, help="runs at a time on each (%(default)s)")
    every.add_argument("--max-seconds", type=float, help="stop then, in good order; the same command goes on")
    every.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that decode (%(default)s)")
    every.add_argument("--device", default="auto")
    every.add_argument("--size", type=int, nargs=2, default=[128, 224], metavar=("JOINT", "OTHERS"))
    every.add_argument("--variant", default="tiny", help="(%(default)s)")
    every.add_argument("--small", default="nano", help="the second, smaller model (%(default)s)")
    every.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of all recipes")
    only = commands.add_parser("decode", parents=[common], help="decode images into --cache")
    only.add_argument("dataset", nargs="+", choices=[*DATASETS, "joint"])
    only.add_argument("--size", type=int, nargs="+", default=[224])
    only.add_argument("--processes", type=int, default=1, help="forks that decode, for many cores (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
