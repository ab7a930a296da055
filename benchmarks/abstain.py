"""python benchmarks/abstain.py --data DATA MODEL ...: does abstaining keep back images of another kind?

Mixes test images of a model's own dataset with as many of other datasets, to which any answer is wrong, and compares
two abstentions, both chosen on val to answer nine of ten images: by the probability alone, and by the probability after
the flag of the out-of-distribution detector. DATA holds one folder per dataset, arranged as DATASET/SPLIT/CLASS/IMAGE.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import MedMamba
from medmamba.data import open_dataset
from medmamba.decision import choose_abstention, confidence_of, errors_of, risk_coverage
from medmamba.evaluation import match_classes
from medmamba.evaluation.corruptions.run import proportional
from medmamba.evaluation.observed import Observed, observe
from medmamba.inference.predict import iter_predict
from medmamba.utils.devices import pick_device

SETS = ("bloodmnist", "breastmnist", "dermamnist", "pneumoniamnist", "kvasir_seg")
SHARE = 0.9
RULES = {"probability alone": False, "flag, then probability": True}


def foreign(model: MedMamba, files: list[Path], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probabilities (N, K) and flags (N,) of images that show none of the classes."""
    found = list(iter_predict(model, files, top_k=classes))
    order = [model.config.id2label[i] for i in range(classes)]
    p = [[dict(one.top)[name] for name in order] for one in found]  # type: ignore[union-attr]
    return np.array(p), np.array([bool(one.unusual) for one in found])  # type: ignore[union-attr]


def drawn(folder: Path, most: int) -> list[Path]:
    """Returns at most `most` image files under a folder, drawn with a fixed seed."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    chosen = np.random.default_rng(0).permutation(len(files))[:most]
    return [files[i] for i in np.sort(chosen)]


def rows_of(folder: Path, data: Path, images: int, device: str) -> list[str]:
    """Measures one model; returns rows of a Markdown table."""
    model: Any = MedMamba.from_pretrained(folder).to(pick_device(device))
    name = str(model.config.training["dataset"])
    seen: dict[str, Observed] = {}
    for split in ("val", "test"):
        part = match_classes(open_dataset(data / name, dataset=name).split(split), model.config)
        seen[split] = observe(model, part.subset(proportional(part, images, 0)), None)
    own = seen["test"]
    others = [one for one in SETS if one != name and (data / one).is_dir()]
    each = max(1, len(own) // len(others))
    strange = {}
    for one in others:
        place = data / one / "test"
        strange[one] = foreign(model, drawn(place if place.is_dir() else data / one, each), len(own.classes))
    p = np.concatenate([own.probabilities, *(found[0] for found in strange.values())])
    flags = np.concatenate([_flags(own), *(found[1] for found in strange.values())])
    errors = np.concatenate([errors_of(own.probabilities, own.labels), np.ones(len(p) - len(own))])
    rows = []
    for rule, flagged in RULES.items():
        val = seen["val"]
        sure = confidence_of(val.probabilities, _flags(val) if flagged else None)
        chosen = choose_abstention(errors_of(val.probabilities, val.labels), sure, coverage=SHARE)
        confidence = confidence_of(p, flags if flagged else None)
        answered = confidence >= chosen.threshold
        start, kept = len(own), []
        for one, found in strange.items():
            stop = start + len(found[0])
            kept.append(f"{one} {answered[start:stop].mean():.0%}")
            start = stop
        share, wrong = answered[: len(own)].mean(), errors[: len(own)][answered[: len(own)]].mean()
        area = risk_coverage(errors, confidence).aurc
        cells = [folder.name, rule, f"{share:.0%}", f"{wrong:.3f}", ", ".join(kept)]
        rows.append(f"| {' | '.join([*cells, f'{errors[answered].mean():.3f}', f'{area:.3f}'])} |")
    print(f"{folder.name}: {len(own)} own test images, {len(p) - len(own)} others", file=sys.stderr)
    return rows


def _flags(seen: Observed) -> np.ndarray:
    return np.zeros(len(seen), bool) if seen.unusual is None else seen.unusual


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model folders")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400, help="own per split, and as many others (%(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    head = ("model", "abstains by", "own answered", "of which wrong", "others answered", "wrong in all", "AURC")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for folder in args.models:
        lines += rows_of(folder, args.data, args.images, args.device)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
