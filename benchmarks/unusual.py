"""How well a model's warning tells unusual images from its own: AUROC against other datasets.

    python benchmarks/unusual.py MODEL OWN NAME=OTHER [NAME=OTHER ...] [--images 600]

MODEL is a folder or name, OWN the dataset it was trained on, OTHER further datasets (anything that
`medmamba.data.open_dataset` takes); their test images are used. Writes `unusual.json` into the model's folder, which
the web app shows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medmamba import MedMamba
from medmamba.calibrate import Calibration, ood_auroc
from medmamba.data import ImageDataset, open_dataset
from medmamba.predict import Prediction, iter_predict
from medmamba.pretrained import fetch

NAME = "unusual.json"


def measure(model: MedMamba, own: ImageDataset, others: dict[str, ImageDataset], images: int) -> dict[str, Any]:
    """AUROC of the score and share of images called unusual, for each other dataset.

    Args:
        images: at most this many of each, drawn with a fixed seed.
    """
    config = model.config
    ood = Calibration.from_dict(config.calibration, config.task).ood
    if ood is None:
        raise SystemExit("the model has no threshold for unusual images; calibrate it first")
    usual = logits_of(model, own, images)
    found: dict[str, Any] = {
        "score": ood.score,
        "threshold": ood.threshold,
        "own": {"n": len(usual), "called_unusual": float(ood.is_unusual(usual, config.task).mean())},
        "auroc": {},
    }
    for name, dataset in others.items():
        foreign = logits_of(model, dataset, images)
        found["auroc"][name] = {
            "auroc": ood_auroc(usual, foreign, ood.score, config.task),
            "n": len(foreign),
            "called_unusual": float(ood.is_unusual(foreign, config.task).mean()),
        }
    return found


def logits_of(model: MedMamba, dataset: ImageDataset, images: int) -> np.ndarray:
    """(N, num_classes) for test images drawn at random."""
    part = dataset.split("test") if dataset.split_sizes.get("test") else dataset
    chosen = np.sort(np.random.default_rng(0).permutation(len(part))[:images])
    read = (part.reader.read(part.records[i]) for i in tqdm(chosen, part.name, unit="img"))
    results = iter_predict(model, read)
    return np.array([result.logits for result in results if isinstance(result, Prediction)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("own")
    parser.add_argument("others", nargs="+", metavar="NAME=OTHER")
    parser.add_argument("--images", type=int, default=600, help="of each dataset, at most (%(default)s)")
    args = parser.parse_args()
    others = {name: open_dataset(path) for name, _, path in (text.partition("=") for text in args.others)}
    folder = fetch(args.model)
    found = measure(MedMamba.from_pretrained(folder).fuse(), open_dataset(args.own), others, args.images)
    Path(folder, NAME).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
