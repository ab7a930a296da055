"""python -m hub.zoo: trains the released models, one command each, and the baselines to compare them with.

pretrain    one model for all classes of the datasets in JOINT (recipe zoo-joint)
train       one dataset, starting from those weights (recipe zoo-DATASET)
baseline    one dataset from scratch with the published recipe, with MedMamba or a timm model
decode      only decodes the images into --cache, so that the other commands start faster, and checks the splits for
            duplicates
all         all of these, on all available GPUs

    python -m hub.zoo pretrain --data DATA --out runs/joint
    python -m hub.zoo train breastmnist --data DATA --out runs/breastmnist-0 --init runs/joint --seed 0
    python -m hub.zoo all --data DATA --out runs

DATA holds one folder per dataset, arranged as DATASET/SPLIT/CLASS/IMAGE. After an interruption, rerun the same command
to resume; exit code 3 means stopped by --max-seconds or SIGTERM before the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medmamba import MedMamba
from medmamba.cli.training_options import STOPPED
from medmamba.config import BACKBONES, ORGANISATION
from medmamba.data import registry
from medmamba.training import TrainResult, train
from medmamba.training.graphed_step import GRAPHS
from medmamba.training.recipe import parse_setting
from medmamba.utils.checksums import CONFIG_NAME, WEIGHTS_NAME
from medmamba.utils.devices import make_accelerator

from .baseline import train_baseline
from .job_queue import Job, Queue
from .teacher import described, load_teachers
from .zoo_data import DATASETS, DECODED, JOINT, NOTES, decode, duplicates_checked, open_joint, open_one

FROM_BACKBONE = ("pad_ufes_20", "cpn_xray")  # the others start from the joint model
QUICK = ("breastmnist", "pneumoniamnist")  # small enough to train baselines with several seeds
SMALL_RECIPE = "zoo-bloodmnist-nano"  # of the small model, a starting point for others: trained on one dataset alone


def pretrain(data: str | Path, out: str | Path, recipe: str = "zoo-joint", **options: Any) -> TrainResult:
    """Trains the joint model. `options` are passed to `medmamba.train`."""
    notes = {"datasets": list(JOINT)}
    options.setdefault("allow_leakage", ("duplicates",))
    return train(open_joint(data), out, recipe, notes=notes, **options)


def train_one(
    name: str,
    data: str | Path,
    out: str | Path,
    recipe: str | None = None,
    init: str | Path | None = None,
    teachers: Sequence[str | Path] = (),
    **options: Any,
) -> TrainResult:
    """Trains on one dataset, from the weights in the folder `init` or from scratch.

    Args:
        recipe: default zoo-`name`.
        teachers: folders of fine-tuned teachers, or MedMamba models, see `hub.teacher`.
        options: passed to `medmamba.train`.
    """
    notes: dict[str, Any] = {"note": NOTES[name]} if name in NOTES else {}
    source: MedMamba | None = None
    if init is not None:
        source = MedMamba.from_pretrained(init)
        earlier = source.config.training
        backbone = Path(init).name if not source.config.num_classes else None
        options["init_name"] = backbone or f"{earlier.get('recipe')}, seed {earlier.get('seed')}"
        notes |= {"pretraining": earlier.get("datasets", [])}
        notes |= {"base_model": f"{ORGANISATION}/{backbone}"} if backbone else {}
    index = open_one(data, name)
    if checked := duplicates_checked(index, options.get("cache")):
        options["check_duplicates"], notes["duplicates_checked"] = False, checked
    options.setdefault("allow_leakage", DATASETS[name])
    if teachers:
        options["teacher"] = load_teachers(teachers, list(registry.get(name).id2label.values()))
        notes["teacher"] = described(teachers)
    return train(index, out, recipe or f"zoo-{name}", init=source, dataset=name, notes=notes, **options)


def wait_for(init: Path, device: str) -> None:
    """Waits until the model in `init` is complete; initialises the device meanwhile."""
    torch.zeros(1, device=make_accelerator(device).device)
    while not ((init / CONFIG_NAME).is_file() and (init / WEIGHTS_NAME).is_file()):
        time.sleep(0.2)


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """Lists the jobs of `all`, in order of priority."""
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

    def fine_tuned(dataset: str, seed: int) -> Job:
        start = BACKBONES[0] if dataset in FROM_BACKBONE else str(out / "joint")
        words = ("train", dataset, "--init", start, "--seed", str(seed))
        needed = [*([] if dataset in FROM_BACKBONE else ["joint"]), f"decode-{dataset}"]
        return training(f"{dataset}-{seed}", *words, after=needed)

    def small(dataset: str, seed: int) -> Job:
        words = ("train", dataset, "--recipe", SMALL_RECIPE, "--variant", args.small, "--seed", str(seed))
        return training(f"nano-{dataset}-{seed}", *words, after=[f"decode-{dataset}"])

    def baseline(dataset: str, seed: int, model: str) -> Job:
        words = ("baseline", dataset, "--seed", str(seed), "--model", model)
        label = "paper" if model == "medmamba" else model
        return training(f"{dataset}-{label}-{seed}", *words, after=[f"decode-{dataset}"])

    jobs = [decoding("joint", args.size[0]), *(decoding(name, *args.size) for name in DATASETS)]
    jobs.append(training("joint", "pretrain", "--variant", args.variant, after=["decode-joint"]))
    jobs += [fine_tuned(name, seed) for seed in seeds for name in DATASETS]
    jobs += [small("bloodmnist", seed) for seed in seeds]
    for name in DATASETS:  # small ones first, where an extra seed is cheap
        for seed in seeds if name in QUICK else seeds[:1]:
            jobs += [baseline(name, seed, "medmamba"), baseline(name, seed, "resnet50")]
    wanted = set(args.only or [job.name for job in jobs])
    while more := {need for job in jobs if job.name in wanted for need in job.after} - wanted:
        wanted |= more
    if unknown := wanted - {job.name for job in jobs}:
        raise SystemExit(f"no run {', '.join(sorted(unknown))}; runs are {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if job.name in wanted]


def run_all(args: argparse.Namespace) -> int:
    """Runs the `all` command; returns the exit code."""
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is not a folder; it should hold one folder per dataset")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    devices = args.gpus or [str(i) for i in range(gpus)] or [""]
    return Queue(all_jobs(args), devices, args.per_gpu, args.out / "logs", args.max_seconds).run()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
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
        finished = train_baseline(args.model, args.dataset, args.data, args.out, args.recipe, **options, **settings)
    else:
        options |= {"variant": args.variant, "checkpoint_seconds": args.checkpoint_seconds, **settings}
        if args.command == "pretrain":
            result = pretrain(args.data, args.out, args.recipe, **options)
        else:
            init = args.init if args.command == "train" else None
            if init and args.wait:
                wait_for(init, args.device)
            options["finish_early"] = args.finish_early
            result = train_one(args.dataset, args.data, args.out, args.recipe, init, args.teacher, **options)
        finished = result.finished
    if not finished:
        print("stopped; rerun the same command to resume")
        return STOPPED
    print(f"finished: {args.out}")
    return 0


def _folder(name: str) -> str:
    """Returns the folder of a dataset, which has an underscore where the registry has a hyphen."""
    return name.replace("-", "_")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    common.add_argument("--cache", type=Path, help="folder for decoded images")
    run = argparse.ArgumentParser(add_help=False, parents=[common])
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--variant", default="tiny", help="size of a new MedMamba (%(default)s)")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="recipe settings")
    run.add_argument("--device", default="auto")
    run.add_argument("--graphs", default="auto", choices=GRAPHS, help="CUDA graphs (%(default)s)")
    run.add_argument("--max-seconds", type=float)
    run.add_argument("--checkpoint-seconds", type=float, default=60.0)
    run.add_argument("--quiet", action="store_true")

    parser = argparse.ArgumentParser(
        prog="python -m hub.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    joint = commands.add_parser("pretrain", parents=[run], help="train the joint model")
    joint.add_argument("--recipe", default="zoo-joint")
    one = commands.add_parser("train", parents=[run], help="train on one dataset with the recipe of this project")
    one.add_argument("dataset", type=_folder, choices=DATASETS)
    one.add_argument("--recipe", help="default: zoo-DATASET")
    one.add_argument("--init", type=Path, help="folder of the joint model; default: from scratch")
    one.add_argument(
        "--teacher", type=Path, nargs="+", default=[], metavar="DIR", help="runs of hub.teacher to learn from"
    )
    one.add_argument("--finish-early", action="store_true", help="with --max-seconds: keep the best epoch so far")
    one.add_argument("--wait", action="store_true", help="wait until the model in --init exists")
    base = commands.add_parser(
        "baseline", parents=[run], help="train on one dataset with the published recipe, from scratch"
    )
    base.add_argument("dataset", type=_folder, choices=DATASETS)
    base.add_argument("--recipe", default="paper-medmnist")
    base.add_argument("--model", default="medmamba", help="medmamba, efficientnet-lite2 or a timm model")
    base.set_defaults(finish_early=False, teacher=[])  # options of `train`, which also trains MedMamba here
    every = commands.add_parser("all", parents=[common], help="train all models and baselines, on all available GPUs")
    every.add_argument("--out", type=Path, required=True, help="parent folder of the runs")
    every.add_argument("--only", nargs="+", metavar="RUN", help="only these runs and their dependencies")
    every.add_argument("--seeds", type=int, default=3, help="per dataset (%(default)s)")
    every.add_argument("--gpus", nargs="+", metavar="ID", help="values for CUDA_VISIBLE_DEVICES; default: all")
    every.add_argument("--per-gpu", type=int, default=2, help="concurrent runs per GPU (%(default)s)")
    every.add_argument("--max-seconds", type=float, help="stop cleanly after this time; rerun to resume")
    every.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="processes for decoding (%(default)s)"
    )
    every.add_argument("--device", default="auto")
    every.add_argument("--size", type=int, nargs=2, default=[128, 224], metavar=("JOINT", "OTHERS"))
    every.add_argument("--variant", default="tiny", help="(%(default)s)")
    every.add_argument("--small", default="nano", help="variant of the second, smaller model (%(default)s)")
    every.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings for all recipes"
    )
    only = commands.add_parser("decode", parents=[common], help="decode images into --cache")
    only.add_argument("dataset", type=_folder, nargs="+", choices=[*DATASETS, "joint"])
    only.add_argument("--size", type=int, nargs="+", default=[224])
    only.add_argument("--processes", type=int, default=1, help="processes for decoding (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
