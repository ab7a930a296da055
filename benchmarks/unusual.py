"""Fits a model's warning for unusual images, and measures how well it works: AUROC against other datasets.

    python benchmarks/unusual.py MODEL OWN NAME=OTHER [NAME=OTHER ...] [--images 600]

MODEL is a folder, OWN the dataset it was trained on with splits train, val and test, OTHER further datasets (anything
that `medmamba.data.open_dataset` takes), whose test images are used. Writes `unusual.json` into the model's folder,
which the web app reads. The scores of the logits are measured beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import MedMamba
from medmamba.data import open_dataset
from medmamba.inference.ood import Unusual
from medmamba.inference.ood_fit import Seen, learn_unusual, look
from medmamba.metrics import scores
from medmamba.metrics.calibration import OOD_SCORES, ood_auroc
from medmamba.utils.text import json_text


def measure(warning: Unusual, own: Seen, others: dict[str, Seen], task: str) -> dict[str, Any]:
    """AUROC of the warning and of the scores of the logits, and shares of images called unusual."""

    def auroc(usual: np.ndarray, foreign: np.ndarray) -> float:
        values = np.concatenate([usual, foreign])
        labels = np.arange(len(values)) >= len(usual)
        return float(scores.auroc_and_auprc(labels, scores.rank(values), np.ones((1, len(values))))[0][0])

    return {
        "own": {"n": len(own.labels), "called_unusual": round(float(warning.is_unusual(own.features).mean()), 4)},
        "auroc": {
            name: {
                "auroc": round(auroc(warning.score(own.features), warning.score(seen.features)), 4),
                "n": len(seen.labels),
                "called_unusual": round(float(warning.is_unusual(seen.features).mean()), 4),
                **{score: round(ood_auroc(own.logits, seen.logits, score, task), 4) for score in OOD_SCORES},
            }
            for name, seen in others.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("own")
    parser.add_argument("others", nargs="+", metavar="NAME=OTHER")
    parser.add_argument("--images", type=int, default=600, help="of each split, at most (%(default)s)")
    args = parser.parse_args()
    model, dataset = MedMamba.from_pretrained(args.model).fuse(), open_dataset(args.own)
    warning = learn_unusual(model, dataset, args.images)
    test = look(model, dataset, "test", args.images)
    others = {}
    for name, _, path in (text.partition("=") for text in args.others):
        other = open_dataset(path)
        others[name] = look(model, other, "test" if other.split_sizes.get("test") else None, args.images)
    measured = measure(warning, test, others, model.config.task)
    dataclasses.replace(warning, measured=measured).save(args.model)
    print(json_text(measured, indent=2))


if __name__ == "__main__":
    main()
