"""python -m hub.shortcuts: how much of a model's accuracy can be had without looking at the organ.

    python -m hub.shortcuts --data DATA/cpn_xray/index.csv --external DATA/cpn_xray_external --dataset cpn-xray \
        --out hub/models/cpn-xray --results internal/results.json external/results.json

If each class comes from a source of its own, a classifier can recognise the source: its exposure, its borders, its
scanner. Two linear classifiers see only that: thumbnails of 8x8 grey values, and the outer frame of the image. What
they reach is no evidence that disease was recognised. They are fitted on train, their regularisation is chosen on val,
and they are scored on test and on images of other sources, beside the results of the model itself (`medmamba
evaluate`). Writes shortcuts.json, which the model's card shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.cards import SHORTCUTS_NAME
from medmamba.data import ImageDataset, open_dataset
from medmamba.metrics import evaluate
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

SIDE, FRAME = 64, 6  # of the grey images from which the frame is taken; its width, about a tenth
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation
Features = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def thumbnails(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns 8x8 means of grey images (N, 64, 64), as (N, 64)."""
    return grey.reshape(len(grey), 8, SIDE // 8, 8, SIDE // 8).mean((2, 4)).reshape(len(grey), -1)


def frames(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the outer frame of grey images (N, 64, 64), as (N, pixels)."""
    inside = np.zeros((SIDE, SIDE), bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return grey[:, ~inside]


WAYS: dict[str, Features] = {"8x8 thumbnails": thumbnails, "outer tenth of the image": frames}


def grey_images(dataset: ImageDataset) -> NDArray[np.float32]:
    """Returns all images as grey values (N, 64, 64) in [0, 1], aspect not kept."""
    from PIL import Image

    found = [
        dataset.image(i).to_pil().convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for i in range(len(dataset))
    ]
    return np.stack([np.asarray(image, np.float32) / 255 for image in found])


def measure(index: ImageDataset, external: ImageDataset | None) -> dict[str, dict[str, Any]]:
    """Returns the scores of each way of `WAYS` on "internal" (the test split) and, if given, "external"."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = {name: index.split(name) for name in ("train", "val", "test")}
    pixels = {name: grey_images(part) for name, part in parts.items()}
    if external is not None:
        parts["external"], pixels["external"] = external, grey_images(external)
    found: dict[str, dict[str, Any]] = {}
    for way, features in WAYS.items():
        seen = {name: features(images) for name, images in pixels.items()}
        fitted = []
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
            model.fit(seen["train"], parts["train"].labels)
            fitted.append((model.score(seen["val"], parts["val"].labels), -strength, model))
        best = max(fitted, key=lambda item: item[:2])[2]
        found[way] = {
            where: summary(evaluate(part.labels, best.predict_proba(seen[name]), index.classes, resamples=0).to_dict())
            for where, name in (("internal", "test"), ("external", "external"))
            if (part := parts.get(name)) is not None
        }
    return found


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Returns accuracy, AUROC and the sensitivity of each class, of an evaluation as in results.json."""
    overall = {name: round(evaluation["overall"][name]["value"], 4) for name in ("accuracy", "auroc")}
    classes = {row["name"]: round(row["scores"]["sensitivity"]["value"], 4) for row in evaluation["per_class"]}
    return {"images": evaluation["n_images"], **overall, "sensitivity": classes}


def of_model(results: Path) -> dict[str, Any]:
    """Returns the summary of the only split, or of test, in a results.json of `medmamba evaluate`."""
    splits = json.loads(results.read_text(encoding="utf-8"))["splits"]
    return summary(splits.get("test") or next(iter(splits.values())))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.shortcuts", description="What a source alone gives away.")
    parser.add_argument("--data", required=True, help="the dataset, with splits train, val and test")
    parser.add_argument("--external", help="images of other sources")
    parser.add_argument("--dataset", help="name in the registry")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="of the model: on test, and on --external")
    parser.add_argument("--out", type=Path, required=True, help="model folder")
    args = parser.parse_args(argv)
    index = open_dataset(args.data, dataset=args.dataset)
    external = open_dataset(args.external, dataset=args.dataset) if args.external else None
    rows = {"this model": dict(zip(("internal", "external"), map(of_model, args.results), strict=False))}
    rows |= measure(index, external)
    write_text(args.out / SHORTCUTS_NAME, json_text({"rows": rows}, indent=1) + "\n")
    print(json_text(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
