"""Fits a model's detector of unusual images, and measures how well it works: images of other datasets that it flags.

    python benchmarks/unusual.py MODEL OWN NAME=OTHER [...] [--same-kind NAME=OTHER ...] [--images TRAIN VAL TEST OTHER]

MODEL is a folder, OWN the dataset it was trained on with splits train, val and test. OTHER are further datasets
(anything that `medmamba.data.open_dataset` takes), whose test images are used, or folders of images without labels.
Collections of the kind of image that the model knows are given as `--same-kind`, and reported apart: that an X-ray of
the chest is from elsewhere does not make it foreign. Writes `unusual.json` into the model's folder. The scores of the
logits are measured beside it. `--cache` keeps what the network says, so that another fit takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import MedMamba
from medmamba.data import DatasetError, open_dataset
from medmamba.imaging.load import find_images
from medmamba.inference.fingerprint import fingerprint
from medmamba.inference.fitted import body
from medmamba.inference.ood import Unusual, fit_signatures
from medmamba.inference.ood_fit import Seen, look, look_altered, look_at, sample
from medmamba.metrics import scores
from medmamba.metrics.calibration import OOD_SCORES, ood_auroc
from medmamba.utils.text import json_text


def measure(warning: Unusual, own: Seen, others: dict[str, Seen], task: str) -> dict[str, dict[str, float]]:
    """AUROC of the detector and of the scores of the logits, and shares of images flagged and called far."""

    def auroc(usual: np.ndarray, foreign: np.ndarray) -> float:
        values = np.concatenate([usual, foreign])
        labels = np.arange(len(values)) >= len(usual)
        return float(scores.auroc_and_auprc(labels, scores.rank(values), np.ones((1, len(values))))[0][0])

    return {
        name: {
            "auroc": round(auroc(warning.score(own.signatures), warning.score(seen.signatures)), 4),
            **shares(warning, seen),
            **{score: round(ood_auroc(own.logits, seen.logits, score, task), 4) for score in OOD_SCORES},
        }
        for name, seen in others.items()
    }


def shares(warning: Unusual, seen: Seen) -> dict[str, float]:
    """Number of images, and the shares that are flagged and called far."""
    levels = warning.levels(seen.signatures)
    return {
        "n": len(levels),
        "called_unusual": round(sum(level is not None for level in levels) / len(levels), 4),
        "called_far": round(sum(level == "far" for level in levels) / len(levels), 4),
    }


def kept(cache: Path | None, name: str, make: Callable[[], Seen]) -> Seen:
    """Returns what was seen, from the cache where it is there."""
    file = None if cache is None else cache / f"{name}.npz"
    if file is not None and file.is_file():
        with np.load(file) as found:
            return Seen(**{field.name: found[field.name] for field in dataclasses.fields(Seen)})
    seen = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{field.name: getattr(seen, field.name) for field in dataclasses.fields(Seen)})
    return seen


def look_elsewhere(model: Any, path: str, images: int) -> Seen:
    """Predicts test images of another dataset, or images of a folder."""
    try:
        other = open_dataset(path)
        return look(model, other, "test" if other.split_sizes.get("test") else None, images)
    except DatasetError:
        paths = find_images([path]).paths
        seen, logits = look_at(model, [paths[i] for i in sample(len(paths), images)])
        return Seen(seen[:, -model.config.dims[-1] :], logits, np.zeros(len(seen), np.int64), seen)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("own")
    parser.add_argument("others", nargs="+", metavar="NAME=OTHER")
    parser.add_argument("--same-kind", nargs="+", default=[], metavar="NAME=OTHER")
    parser.add_argument(
        "--images", nargs=4, type=int, default=[600] * 4, metavar="N", help="of train, val, test and others, at most"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps what the network says of the images")
    args = parser.parse_args(arguments)
    model, dataset = MedMamba.from_pretrained(args.model).fuse(), open_dataset(args.own)
    cache = args.cache / args.model.name if args.cache else None
    own = {
        split: kept(cache, f"{split}-{most}", lambda split=split, most=most: look(model, dataset, split, most))
        for split, most in zip(("train", "val", "test"), args.images, strict=False)
    }
    slightly = look_altered(model, dataset)
    seen_in = own["train"].signatures, own["train"].labels, own["val"].signatures
    warning = fit_signatures(*seen_in, model.config, altered=slightly)
    found = []
    for given in (args.others, args.same_kind):
        seen, most = {}, args.images[3]
        for name, _, path in (text.partition("=") for text in given):
            seen[name] = kept(cache, f"{name}-{most}", lambda path=path, most=most: look_elsewhere(model, path, most))
        found.append(measure(warning, own["test"], seen, model.config.task))
    measured = {"own": shares(warning, own["test"]), "auroc": found[0], "same_kind": found[1]}
    weights = fingerprint(body(MedMamba.from_pretrained(args.model).state_dict()))
    dataclasses.replace(warning, measured=measured, weights=weights).save(args.model)
    print(json_text(measured, indent=2))


if __name__ == "__main__":
    main()
