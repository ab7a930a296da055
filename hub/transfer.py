"""python -m hub.transfer: how well starting points transfer to other datasets.

    python -m hub.transfer measure --data DATA --out transfer --sets breastmnist pad_ufes_20 \
        --starts scratch medmamba/bloodmnist medmamba/tiny-medical
    python -m hub.transfer table transfer

`measure` runs, for each start, dataset and seed: a linear probe on frozen features (regularisation chosen on val),
fine-tuning on ten images per class, and fine-tuning on all training images, the last two with the recipe `finetune`.
Only the epoch or regularisation chosen on val is evaluated on test, once. Each result is a JSON file and is not
measured again. `table` copies results into hub/results/transfer and writes the tables of docs/backbones.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from medmamba import MedMamba, PreprocessConfig
from medmamba.config import ORGANISATION, variant_config
from medmamba.data import ImageDataset, open_dataset
from medmamba.imaging.preprocess import preprocess
from medmamba.inference.predict import predict_features
from medmamba.metrics import evaluate
from medmamba.pretrained import fetch, read_config
from medmamba.training import train
from medmamba.training.finalise import score_splits
from medmamba.training.recipe import load_recipe, parse_setting
from medmamba.training.setup import ImageCache
from medmamba.utils.devices import make_accelerator
from medmamba.utils.text import json_text

from . import teacher, transfer_table
from .baseline import fit

WAYS = ("probe", "ten", "full")
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisation of the linear probe


def own_size(start: str) -> int:
    """Returns the side in pixels of the images that a start was made for; its own name may stand for its folder."""
    if start in ("scratch", teacher.NAME):
        return PreprocessConfig().input_size[0]
    name = start if Path(start).is_dir() else f"{ORGANISATION}/{Path(start).name}"
    return read_config(fetch(name)).preprocess.input_size[0]


def probe(
    start: MedMamba | teacher.Lite2Classifier,
    index: ImageDataset,
    device: str,
    seed: int,
    size: int,
    split: str = "test",
) -> dict[str, float]:
    """A logistic regression on the pooled features of a frozen backbone, of images of `size` pixels.

    The regularisation is chosen on val, so that scores with `split="val"` are for comparing starts alone.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    start.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")).eval()
    settings = dataclasses.replace(start.config.preprocess, input_size=(size, size))
    features, labels = {}, {}
    for name in dict.fromkeys(("train", "val", split)):
        part = index.split(name)
        rows = []
        for first in range(0, len(part), 64):
            batch = [
                preprocess(part.image(i), settings, start.config.in_chans)
                for i in range(first, min(first + 64, len(part)))
            ]
            rows.append(_features(start, torch.stack(batch)))
        features[name], labels[name] = torch.cat(rows).numpy(), part.labels
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
    scaled = {name: (values - mean) / std for name, values in features.items()}
    found = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced", random_state=seed)
        model.fit(scaled["train"], labels["train"])
        score = balanced_accuracy_score(labels["val"], model.predict(scaled["val"]))
        found.append((score, -strength, model))
    best = max(found, key=lambda item: item[:2])
    return _scores(best[2].predict_proba(scaled[split]), labels[split], index) | {"strength": -best[1]}


def _features(start: MedMamba | teacher.Lite2Classifier, batch: Tensor) -> Tensor:
    return start.features(batch) if isinstance(start, teacher.Lite2Classifier) else predict_features(start, batch)[0]


def fine_tune(
    start: str,
    index: ImageDataset,
    out: Path,
    device: str,
    seed: int,
    variant: str,
    size: int,
    split: str = "test",
    cache: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The documented command, `medmamba train --recipe finetune --from START`, with `settings` for `--set`."""
    options: dict[str, Any] = dict(
        seed=seed, device=device, check_duplicates=False, progress=False, half=True, size=size, cache=cache
    ) | dict(settings or {})
    if start == teacher.NAME:
        return fine_tune_teacher(index, out, device, seed, size, split, settings)
    if start == "scratch":  # the first layers must learn as fast as the last
        options = {"layer_decay": 1.0} | options
        result = train(index, out, "finetune", variant, allow_leakage=("duplicates",), **options)
    else:
        result = train(index, out, "finetune", init=start, allow_leakage=("duplicates",), **options)
    scored = result.val if split == "val" else result.test
    assert scored is not None
    overall = scored.overall
    return {name: overall[name].value for name in ("accuracy", "balanced_accuracy", "auroc")}


def fine_tune_teacher(
    index: ImageDataset,
    out: Path,
    device: str,
    seed: int,
    size: int,
    split: str = "test",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The recipe `finetune` with EfficientNet-Lite2 from ImageNet, with `teacher.SETTINGS`, then `settings`."""
    chosen = load_recipe("finetune", **{"size": size} | teacher.SETTINGS | dict(settings or {}))
    torch.manual_seed(seed)
    labels = dict(enumerate(index.classes))
    config = variant_config("tiny", num_classes=len(labels), id2label=labels, preprocess={"input_size": (size, size)})
    network = teacher.Lite2Classifier(config.replace(architecture=teacher.NAME))
    accelerator = make_accelerator(device)
    out.mkdir(parents=True, exist_ok=True)
    images, model = ImageCache(index, config, accelerator), cast(MedMamba, network)
    if fit(model, chosen, images, accelerator, out, seed) is None:
        raise RuntimeError(f"{out}: the run did not finish")
    overall = score_splits(model, images, accelerator, index.name)[split].evaluation.overall
    return {name: overall[name].value for name in ("accuracy", "balanced_accuracy", "auroc")}


def ten_per_class(index: ImageDataset, seed: int) -> ImageDataset:
    """Ten training images of each class, drawn by the seed; val and test as they are."""
    rng = np.random.default_rng(seed)
    training = [i for i, split in enumerate(index.splits) if split == "train"]
    labels = index.labels
    chosen: set[int] = set()
    for label in range(len(index.classes)):
        mine = [i for i in training if labels[i] == label]
        chosen |= set(rng.permutation(mine)[:10].tolist())
    return index.subset([i for i, split in enumerate(index.splits) if split != "train" or i in chosen])


def limit_training(index: ImageDataset, count: int, seed: int = 0) -> ImageDataset:
    """Returns the dataset with `count` training images, stratified by class; val and test are unchanged.

    Each class keeps its share of the training images, but at least one. The draw depends on `seed` and on the order of
    the records alone. A dataset with no more than `count` training images is returned as it is.
    """
    training = np.array([i for i, split in enumerate(index.splits) if split == "train"])
    if len(training) <= count:
        return index
    rng = np.random.default_rng(seed)
    labels = index.labels[training]
    shares = np.bincount(labels, minlength=len(index.classes)) * count / len(training)
    takes = np.floor(shares).astype(int)
    remainders = np.argsort(takes - shares, kind="stable")
    takes[remainders[: count - takes.sum()]] += 1
    takes = np.where(shares > 0, np.maximum(takes, 1), 0)
    chosen: set[int] = set()
    for label, take in enumerate(takes):
        chosen |= set(rng.permutation(training[labels == label])[:take].tolist())
    return index.subset([i for i, split in enumerate(index.splits) if split != "train" or i in chosen])


def measure(
    data: Path,
    out: Path,
    sets: list[str],
    starts: list[str],
    ways: list[str],
    seeds: list[int],
    device: str,
    variant: str,
    train_images: int | None = None,
    size: int | None = None,
    split: str = "test",
    cache: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes one JSON per start, dataset, way and seed into `out`.

    Args:
        variant: of "scratch".
        train_images: use this many training images of each dataset, see `limit_training`; None: all.
        size: side of the images in pixels; None: that of each start.
        split: "val" compares starts without the test images, which are not even read. What was chosen on val (the
            epoch, the regularisation) is scored there too, for all starts alike.
        cache: folder for decoded images, shared by all starts.
        settings: of the recipe, where other ones than those of `finetune` are to be tried, for all starts.

    Raises:
        ValueError: `out` holds a result of another split, or of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    balance = load_recipe("finetune", **dict(settings or {})).balance  # fails now on settings that there are not
    for seed in seeds:
        for name in sets:
            index = open_dataset(data / name)
            if train_images:
                index = limit_training(index, train_images)
            if split == "val":
                index = index.subset([i for i, found in enumerate(index.splits) if found != "test"])
            for way in ways:
                for start in starts:
                    if way == "probe" and (start == "scratch" or seed):
                        continue  # scratch has nothing to probe; the probe does not depend on the seed
                    tag = f"{Path(start).name}-{name}-{way}-{seed}"
                    file = out / f"{tag}.json"
                    said: dict[str, Any] = {"split": split} if split != "test" else {}
                    said |= {"settings": dict(settings)} if settings and way != "probe" else {}
                    if file.is_file():
                        _check_same(file, said)
                        continue
                    part = ten_per_class(index, seed) if way == "ten" else index
                    side = size or own_size(start)
                    if way == "probe":
                        scores = probe(_frozen(start), part, device, seed, side, split)
                    else:
                        kept = cache / name / (f"ten-{seed}" if way == "ten" else "full") if cache else None
                        run = out / "runs" / tag
                        scores = fine_tune(start, part, run, device, seed, variant, side, split, kept, settings)
                    record = dict(start=start, set=name, way=way, seed=seed, variant=variant)
                    record |= said | ({"balance": balance} if way != "probe" else {})
                    record |= scores | {"images": part.split_sizes, "size": side}
                    file.write_text(json_text(record, indent=1), encoding="utf-8")
                    print(json_text(record), flush=True)


def _check_same(file: Path, said: Mapping[str, Any]) -> None:
    """Raises ValueError where a result is of another split or of other settings than what is `said`."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    for key, usual in (("split", "test"), ("settings", {})):
        if (found := kept.get(key, usual)) != (wanted := said.get(key, usual)):
            raise ValueError(f"{file} is of {key} {json_text(found)}, not {json_text(wanted)}; use another folder")


def _frozen(start: str) -> MedMamba | teacher.Lite2Classifier:
    if start == teacher.NAME:
        return teacher.Lite2Classifier(variant_config("tiny", num_classes=1))
    return MedMamba.from_pretrained(start)


def _scores(probabilities: np.ndarray, labels: np.ndarray, index: ImageDataset) -> dict[str, float]:
    overall = evaluate(labels, probabilities, index.classes, resamples=1).overall
    return {name: overall[name].value for name in ("accuracy", "balanced_accuracy", "auroc")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hub.transfer", description="How well starting points transfer.")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure starts on datasets; one JSON per result")
    measuring.add_argument("--data", type=Path, required=True)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--sets", nargs="+", required=True)
    measuring.add_argument("--starts", nargs="+", required=True, help="'scratch', names or folders of models")
    measuring.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    measuring.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    measuring.add_argument("--device", default="auto")
    measuring.add_argument("--variant", default="tiny", help="of 'scratch'")
    measuring.add_argument("--train-images", type=int, metavar="N", help="draw N training images, stratified by class")
    measuring.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (that of each start)")
    measuring.add_argument("--split", default="test", choices=("val", "test"), help="images to score (%(default)s)")
    measuring.add_argument("--cache", type=Path, metavar="DIR", help="folder for decoded images")
    measuring.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    table = commands.add_parser("table", help="write the tables of docs/backbones.md")
    table.add_argument("results", nargs="*", type=Path, metavar="DIR", help="results of `measure` to add first")
    table.add_argument("--data", type=Path, help="datasets, to count images where a result lacks the counts")
    table.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are out of date")
    args = vars(parser.parse_args(argv))
    if args.pop("command") == "measure":
        settings = dict(map(parse_setting, args.pop("set")))
        measure(**args, settings=settings)
        return 0
    if args["data"]:
        for folder in args["results"]:
            add_counts(folder, args["data"])
    transfer_table.keep(args["results"])
    return transfer_table.write(check=args["check"])


def add_counts(folder: Path, data: Path) -> None:
    """Adds the numbers and the size of images to results that were measured without them."""
    for file in folder.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not {"images", "size"} <= record.keys():
            index = open_dataset(data / record["set"])
            index = ten_per_class(index, record["seed"]) if record["way"] == "ten" else index
            record = {"images": index.split_sizes, "size": own_size(record["start"])} | record
            file.write_text(json_text(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
