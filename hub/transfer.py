"""python -m hub.transfer: how well starting points transfer to other data sets.

    python -m hub.transfer --data DATA --out transfer --sets breastmnist pad_ufes_20 \
        --starts scratch medmamba/bloodmnist runs/tiny-medical

For each start, set and seed: a linear probe on frozen features (regularisation chosen on val), fine-tuning on ten
images a class, and fine-tuning on the whole training split, the last two with the recipe `finetune`. Only the
epoch or regularisation chosen on val is evaluated on test, once. Each result is a JSON file and is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmamba import MedMamba
from medmamba.data import ImageDataset, open_dataset
from medmamba.imaging.preprocess import preprocess
from medmamba.inference.predict import predict_features
from medmamba.metrics import evaluate
from medmamba.training import train

WAYS = ("probe", "ten", "full")
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisation of the linear probe
ALLOWED = {"breastmnist": ("duplicates",), "pneumoniamnist": ("duplicates",)}  # known, see docs/results.md


def probe(start: MedMamba, index: ImageDataset, device: str, seed: int) -> dict[str, float]:
    """A logistic regression on the pooled features of a frozen backbone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    start = start.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")).eval()
    features, labels = {}, {}
    for split in ("train", "val", "test"):
        part = index.split(split)
        rows = []
        for first in range(0, len(part), 64):
            batch = [
                preprocess(part.image(i), start.config.preprocess, start.config.in_chans)
                for i in range(first, min(first + 64, len(part)))
            ]
            rows.append(predict_features(start, torch.stack(batch))[0])
        features[split], labels[split] = torch.cat(rows).numpy(), part.labels
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
    scaled = {split: (values - mean) / std for split, values in features.items()}
    found = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced", random_state=seed)
        model.fit(scaled["train"], labels["train"])
        score = balanced_accuracy_score(labels["val"], model.predict(scaled["val"]))
        found.append((score, -strength, model))
    best = max(found, key=lambda item: item[:2])
    return _scores(best[2].predict_proba(scaled["test"]), labels["test"], index) | {"strength": -best[1]}


def fine_tune(start: str, index: ImageDataset, out: Path, device: str, seed: int, variant: str) -> dict[str, float]:
    """The documented command, `medmamba train --recipe finetune --from START`."""
    options: dict[str, Any] = dict(seed=seed, device=device, check_duplicates=False, progress=False, half=True)
    if start == "scratch":  # the first layers must learn as fast as the last
        result = train(index, out, "finetune", variant, allow_leakage=("duplicates",), layer_decay=1.0, **options)
    else:
        result = train(index, out, "finetune", init=start, allow_leakage=("duplicates",), **options)
    assert result.test is not None and result.val is not None
    overall = result.test.overall
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


def measure(
    data: Path,
    out: Path,
    sets: list[str],
    starts: list[str],
    ways: list[str],
    seeds: list[int],
    device: str,
    variant: str,
) -> None:
    """Writes one JSON per start, set, way and seed into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name in sets:
            index = open_dataset(data / name)
            for start in starts:
                for way in ways:
                    if way == "probe" and (start == "scratch" or seed):
                        continue  # nothing learnt to probe; nothing random in it
                    tag = f"{Path(start).name}-{name}-{way}-{seed}"
                    file = out / f"{tag}.json"
                    if file.is_file():
                        continue
                    if way == "probe":
                        scores = probe(MedMamba.from_pretrained(start), index, device, seed)
                    else:
                        part = ten_per_class(index, seed) if way == "ten" else index
                        scores = fine_tune(start, part, out / "runs" / tag, device, seed, variant)
                    record = dict(start=start, set=name, way=way, seed=seed, variant=variant, **scores)
                    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
                    print(json.dumps(record), flush=True)


def _scores(probabilities: np.ndarray, labels: np.ndarray, index: ImageDataset) -> dict[str, float]:
    overall = evaluate(labels, probabilities, index.classes, resamples=1).overall
    return {name: overall[name].value for name in ("accuracy", "balanced_accuracy", "auroc")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="hub.transfer", description="How well starting points transfer.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--starts", nargs="+", required=True, help="'scratch', names or folders of models")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variant", default="tiny", help="of 'scratch'")
    measure(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
