"""Which attribution method to trust: method x faithfulness x time over test images, and the tables of docs/explain.md.

    python benchmarks/explain.py run --models FOLDER --data FOLDER --out FOLDER [--device cuda --deadline SECONDS]
    python benchmarks/explain.py speed --device cuda --json FILE
    python benchmarks/explain.py docs FILE...

`run` takes every dataset of which --models has a model, <dataset>/config.json, and --data has test images,
<dataset>/test/<class>/<image>. It explains the predicted class of images drawn evenly from the classes, times each
method alone on the first few, and then shares the checks among processes. It writes <out>/<dataset>.json all the time,
ends at the deadline with what it has, and goes on from there when called again. `speed` times `tiny` with random
weights. `docs` writes the tables of these files into docs/explain.md.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explain_controls
import explain_report
import explain_workers
import torch

import medmamba
from medmamba.explain import explain
from medmamba.explain.comparison import parse_method
from medmamba.explain.methods import METHODS as ALL_METHODS
from medmamba.imaging.load import expand_inputs, load_image
from medmamba.utils.text import json_text

METHODS = (
    "integrated_gradients",
    "gradient_shap",
    "input_x_gradient",
    "saliency",
    "smoothgrad",
    "gradcam:stage4",
    "gradcam:stage3",
    "gradcam:stage3.conv",
    "gradcam:stage3.scan",
    "gradcam:stage2",
    "occlusion",
    "feature_ablation",
)
CHECKS = {  # settings of the checks; those not named are the defaults of `Assessor`
    "removal": "blur",
    "perturbations": 40,
    "random_orders": 5,
    "steps": 14,
    "repeats": 3,
    "random_models": 3,
}
FIRST = {"faithfulness": 8, "randomisation": 8, "sensitivity": 4}
"""Images that get each check before any gets more, so that a run that is cut off has some of all."""


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    settings = {"seed": args.seed, "methods": args.methods or [*METHODS, *explain_controls.CONTROLS], "checks": CHECKS}
    goals = {
        "faithfulness": args.images,
        "randomisation": args.randomisation_images,
        "sensitivity": args.sensitivity_images,
    }
    jobs, results = [], {}
    for name in args.datasets or datasets(args.models, args.data):
        images = sample(args.data / name / "test", max(goals.values()), args.seed)
        results[name] = load_results(args.out / f"{name}.json", name, settings, args)
        jobs.append(explain_workers.Job(name, str(args.models / name), [str(p) for p in images]))
    if not jobs:
        raise SystemExit(f"no dataset has both {args.models}/<dataset>/config.json and {args.data}/<dataset>/test")
    deadline = started + args.deadline if args.deadline else None
    with tempfile.TemporaryDirectory() as scratch:
        team = explain_workers.Team(jobs, settings, args.device, args.batch_size, args.fuse, scratch, args.workers)
        team.start()
        try:
            team.wait()  # so that nothing else runs while this process measures
            for job in jobs:
                if len(results[job.dataset]["seconds"]) < args.timed_images:
                    results[job.dataset]["seconds"] = time_methods(job, settings, args, warm_up=job is jobs[0])
                    save(args.out, results[job.dataset])
            tasks = schedule(jobs, results, goals)
            print(f"{time.monotonic() - started:.0f} s: {len(tasks)} tasks", flush=True)
            for count, (dataset, key, record) in enumerate(team.work(tasks, deadline), 1):
                merge(results[dataset]["images"].setdefault(key, {"methods": {}}), record)
                save(args.out, results[dataset])
                if count % 20 == 0:
                    print(f"{time.monotonic() - started:.0f} s: {count} of {len(tasks)}", flush=True)
        finally:
            team.stop()
    for result in results.values():
        counts = {check: explain_report.count(result, check) for check in goals}
        print(f"\n{result['dataset']}: images {counts}\n\n{explain_report.table(result)}")
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if team.failures:
        raise SystemExit(f"{team.failures} tasks failed, as said above; the same command tries them again")


def datasets(models: Path, data: Path) -> list[str]:
    """Those with a model and test images."""
    return sorted(p.parent.name for p in models.glob("*/config.json") if (data / p.parent.name / "test").is_dir())


def load_results(path: Path, dataset: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of the same settings left, or an empty record."""
    config = json.loads((args.models / dataset / "config.json").read_text())
    height, width = config["preprocess"]["input_size"]
    new: dict[str, Any] = {
        "dataset": dataset,
        "model": f"{config.get('variant') or 'MedMamba'} at {height}x{width} pixels",
        "machine": machine(args.device),
        "settings": settings,
        "seconds": [],
        "images": {},
    }
    if not path.exists():
        return new
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{path} holds a run with other settings, {found['settings']}; choose another --out")
    return found


def save(folder: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{result['dataset']}.part"
    part.write_text(json_text(result))
    os.replace(part, folder / f"{result['dataset']}.json")


def merge(record: dict[str, Any], part: dict[str, Any]) -> None:
    """Adds the outcome of one check to what is known of an image."""
    for name, values in part.pop("methods").items():
        record["methods"].setdefault(name, {}).update(values)
    record.update(part)


def schedule(
    jobs: list[explain_workers.Job], results: dict[str, Any], goals: dict[str, int]
) -> list[explain_workers.Task]:
    """What is still to do, the datasets in turn: a few images of everything, then the most important first."""
    tasks = []
    for first in (True, False):
        for check, goal in goals.items():
            for i in range(goal):
                for number, job in enumerate(jobs):
                    if i >= len(job.images) or (i < FIRST[check]) != first:
                        continue
                    known = results[job.dataset]["images"].get(explain_workers.key(job.images[i]), {"methods": {}})
                    if not explain_report.has(known, check):
                        tasks.append(explain_workers.Task(number, i, check))
    return tasks


def sample(folder: Path, n: int, seed: int) -> list[Path]:
    """n images, as evenly from the class folders as their sizes allow. The choice of a smaller n, or from a folder that
    holds nothing but this choice, is the beginning of the same list."""
    by_class: dict[str, list[Path]] = {}
    for path in expand_inputs(folder):
        by_class.setdefault(path.parent.name, []).append(path)
    for paths in by_class.values():
        paths.sort(key=lambda path: hashlib.sha256(f"{seed}/{path.parent.name}/{path.name}".encode()).digest())
    classes = [by_class[name] for name in sorted(by_class)]
    order = [paths[i] for i in range(max(map(len, classes))) for paths in classes if i < len(paths)]
    return order[:n]


def time_methods(
    job: explain_workers.Job, settings: dict[str, Any], args: argparse.Namespace, warm_up: bool
) -> list[dict[str, float]]:
    """Seconds by method for each of the first images, nothing else running."""
    model = explain_workers.load(job.model, args.device, args.fuse)
    batch_size = args.batch_size
    rows: list[dict[str, float]] = []
    for path in [*job.images[: int(warm_up)], *job.images[: args.timed_images]]:
        image, row, target = load_image(path), {}, None
        for name in settings["methods"]:
            method, options = explain_controls.parse(name)
            e = explain(model, image, method, target, seed=settings["seed"], batch_size=batch_size, **options)
            row[name], target = round(e.seconds, 5), e.target
        rows.append(row)
    return rows[int(warm_up) :]


def speed(args: argparse.Namespace) -> None:
    """`tiny` at 224 pixels: a forward pass, integrated gradients with 50 points, Grad-CAM, and the other methods, in
    turns, so that other work on the machine slows all of them."""
    torch.manual_seed(0)
    model = medmamba.create_model("tiny", num_classes=8).eval().to(args.device)
    image = load_image(torch.rand(224, 224, 3).numpy())
    x = torch.randn(1, 3, 224, 224, device=args.device)

    def forward() -> None:
        with torch.no_grad():
            model(x).cpu()

    def method(name: str) -> Callable[[], Any]:
        kind, options = parse_method(name)
        # Random weights never add up within 1%, which would measure 400 points.
        options |= {"n_steps": 50, "max_steps": 50} if kind == "integrated_gradients" else {}
        return lambda: explain(model, image, kind, 0, batch_size=args.batch_size, **options)

    layers = ("stage4", "stage3", "stage3.conv", "stage3.scan", "stage1")
    names = [*(f"gradcam:{layer}" for layer in layers), *(name for name in ALL_METHODS if name != "gradcam")]
    calls = {"one forward pass": forward} | {name: method(name) for name in names}
    slow = {"occlusion", "feature_ablation", "integrated_gradients", "gradient_shap", "smoothgrad"}
    times: dict[str, list[float]] = {name: [] for name in calls}
    load = os.getloadavg()[0]
    for i in range(args.rounds):
        for name, call in calls.items():
            for _ in range(1 if name in slow else 5):
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
        if i == 0 and args.rounds > 1:
            times = {name: [] for name in calls}  # warming up
    rows = {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}
    result = {"speed": rows, "machine": machine(args.device), "rounds": args.rounds, "load": load}
    Path(args.json).write_text(json_text(result, indent=1))
    print(explain_report.speed_section([result]))


def machine(device: str) -> str:
    """Device, scan backend and torch version."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if where.type == "cpu" else ""
    backend = medmamba.kernels.resolve_backend(where, torch.float32)
    return f"{name}{threads}, torch {torch.__version__.partition('+')[0]}, scan backend {backend}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--models", required=True, type=Path, metavar="FOLDER", help="<dataset>/config.json")
    command.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="<dataset>/test/<class>/<image>")
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    command.add_argument("--datasets", nargs="+", metavar="NAME")
    command.add_argument("--images", type=int, default=100, help="for infidelity, deletion and insertion (%(default)s)")
    command.add_argument("--randomisation-images", type=int, default=40, help="(%(default)s)")
    command.add_argument("--sensitivity-images", type=int, default=10, help="(%(default)s)")
    command.add_argument("--timed-images", type=int, default=5, help="to time each method on (%(default)s)")
    command.add_argument("--methods", nargs="+")
    command.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    command.add_argument("--fuse", action="store_true", help="explain model.fuse(), if it gives the same logits")
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="after the start, to end with what there is")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(function=run)
    fast = commands.add_parser("speed")
    fast.add_argument("--rounds", type=int, default=4, help="the first warms up (%(default)s)")
    fast.add_argument("--json", required=True, metavar="FILE")
    fast.set_defaults(function=speed)
    for c in (command, fast):
        c.add_argument("--device", default="cpu")
        c.add_argument("--batch-size", type=int, metavar="N", help="default: as explain() chooses")
    write = commands.add_parser("docs")
    write.add_argument("files", nargs="+", type=Path, metavar="FILE")
    write.set_defaults(function=lambda args: explain_report.write([json.loads(p.read_text()) for p in args.files]))
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
