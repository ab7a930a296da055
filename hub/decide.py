"""python -m hub.decide --data DATA: fits the decisions of the released models on validation, checks them on test.

Writes decisions into config.json, their check into decisions.json, and the card of each model. What a model says of the
images is kept in --cache by the checksum of its weights, in parts, so that an interrupted run goes on and a second one
takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import MedMamba, MedMambaConfig
from medmamba.cards import write_card
from medmamba.data import ImageDataset, open_dataset
from medmamba.decision import DecisionError, Decisions, Rule
from medmamba.evaluation.classes import match_classes
from medmamba.evaluation.decide import bound, check_decisions, fit_decisions, write_decisions
from medmamba.evaluation.observed import Observed, observe
from medmamba.inference.ood import NAME as UNUSUAL_NAME
from medmamba.pretrained import read_config
from medmamba.utils.checksums import WEIGHTS_NAME, file_hash
from medmamba.utils.devices import pick_device

MODELS = Path(__file__).resolve().parent / "models"
PART = 400  # images between two saves
COVERAGE, ANSWER_SHARE = 0.95, 0.9
# What is worth deciding about each dataset: classes of which any makes an image positive, by the name of its operating
# points. Others: each class.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "breastmnist": {"malignant": ("malignant",)},
    "pneumoniamnist": {"pneumonia": ("pneumonia",)},
    "dermamnist": {
        "cancer-or-precursor": (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "melanoma",
        ),
        "melanoma": ("melanoma",),
    },
    "pad-ufes-20": {"cancer": ("basal cell carcinoma", "melanoma", "squamous cell carcinoma")},
}
# Above what the most probable class finds of most classes on validation: a lower target would only miss more.
SENSITIVITY = {"bloodmnist": 0.98, "cpn-xray": 0.98}
OTHER_RULES = (Rule("specificity", 0.9), Rule("youden"))


def observed(folder: Path, data: ImageDataset, split: str, cache: Path, device: str = "auto") -> Observed:
    """Returns what a model says of a split, from the cache as far as it is there."""
    config = read_config(folder)
    index = match_classes(data.split(split), config)
    key = cache_key(folder, config, index)
    cache.mkdir(parents=True, exist_ok=True)
    model: Any = None
    parts = []
    for start in range(0, len(index), PART):
        path = cache / f"{folder.name}-{split}-{key}-{start}.npz"
        if not path.is_file():
            if model is None:
                model = MedMamba.from_pretrained(folder).to(pick_device(device))
            rows = np.arange(start, min(start + PART, len(index)))
            observe(model, index.subset(rows), None).save(path)
            print(f"  {folder.name} {split}: {rows[-1] + 1} of {len(index)}", flush=True)
        parts.append(Observed.load(path))
    return replace(
        parts[0],
        logits=np.concatenate([part.logits for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        patients=tuple(patient for part in parts for patient in part.patients),
        unusual=None
        if parts[0].unusual is None
        else np.concatenate([p.unusual for p in parts if p.unusual is not None]),
        temperature=float(config.calibration.get("temperature", 1.0)),
        split=split,
    )


def located(root: Path, dataset: str) -> Path | None:
    """Returns the images of a dataset: its folder, also spelled with underscores, or the index.csv in that."""
    for name in (dataset, dataset.replace("-", "_")):
        if (root / name).is_dir():
            index = root / name / "index.csv"
            return index if index.is_file() else root / name
    return None


def cache_key(folder: Path, config: MedMambaConfig, index: ImageDataset) -> str:
    """Returns a checksum of what the cached answers depend on: weights, detector, preprocessing and images."""
    files = [file_hash(folder / name) for name in (WEIGHTS_NAME, UNUSUAL_NAME) if (folder / name).is_file()]
    about = f"{files} {config.preprocess} {[record.source for record in index.records]}"
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def decide(val: Observed, dataset: str) -> Decisions:
    """Returns the decisions for a dataset; rules for which a class has too few images are left out and reported."""
    groups = GROUPS.get(dataset) or {name: (name,) for name in val.classes}
    found = fit_decisions(val, coverage=COVERAGE, answer_share=ANSWER_SHARE)
    first = Rule("sensitivity", SENSITIVITY.get(dataset, 0.9))
    for group, classes in groups.items():
        for rule in (first, *OTHER_RULES) if dataset in GROUPS else (first,):
            name = f"{group}-{rule.kind}" + ("" if rule.value is None else f"-{rule.value:g}")
            try:
                found = found.with_entries(*fit_decisions(val, [(classes, rule)], name=name).entries)
            except DecisionError as error:
                print(f"  left out: {error}", file=sys.stderr)
    return found


def run(folder: Path, root: Path, cache: Path, device: str, resamples: int, only_cache: bool = False) -> None:
    """Fits, checks and stores the decisions of one model."""
    config = read_config(folder)
    name = str(config.training["dataset"])
    path = located(root, name)
    assert path is not None  # main has looked
    data = open_dataset(path, dataset=name)
    seen = {split: observed(folder, data, split, cache, device) for split in ("val", "test")}
    if only_cache:
        return
    found = bound(decide(seen["val"], name), config, keep=False)
    checked = check_decisions(found, seen["test"], resamples=resamples)
    write_decisions(folder, found, checked)
    write_card(folder)
    print(f"{folder.name}: {', '.join(found.names)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hub.decide", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per dataset")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of model folders (default: hub/models)")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="names of model folders (default: all classifiers)")
    parser.add_argument("--cache", type=Path, default=Path("build/decide"), help="default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--predict-only", action="store_true", help="only fill the cache")
    args = parser.parse_args(argv)
    for path in sorted(args.models.glob("*/config.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        dataset = record.get("training", {}).get("dataset")
        if not record.get("num_classes") or (args.only and path.parent.name not in args.only):
            continue
        if located(args.data, str(dataset)) is None:
            print(f"{path.parent.name}: no images of {dataset} in {args.data}", file=sys.stderr)
            continue
        try:
            run(path.parent, args.data, args.cache, args.device, args.resamples, args.predict_only)
        except (ValueError, OSError) as error:
            print(f"hub.decide: {path.parent.name}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
