"""Evaluates a model of hub/models for masks on the images of `hub.segment`, as `medmamba segment evaluate` does.

    python -m hub.segment_evaluate --data DATA --model hub/models/pad-lesions [--split val] [--flips] [--by-folder]

It is for datasets whose masks lie apart from their images, such as PAD-UFES-20, and shows each class of such images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import medmamba
from medmamba.imaging import ImageError
from medmamba.metrics.segmentation import SegmentationEvaluation
from medmamba.pretrained import PretrainedError
from medmamba.segmentation.evaluate import evaluate_segmenter
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

from .segment import DATASETS, load


def evaluate(
    folder: Path, data: Path, split: str = "test", flips: bool = False, by_folder: bool = False
) -> dict[str, SegmentationEvaluation]:
    """Evaluates a model on a split of the dataset that it was trained on.

    Args:
        folder: of the model; `training.dataset` in its config.json names the dataset.
        data: as for `hub.segment`.
        split: "train", "val" or "test".
        flips: averages over reflections.
        by_folder: each folder of images apart, which is a class of lesions in PAD-UFES-20.

    Returns:
        The evaluation of all images as "all", or of the images of each folder by its name.

    Raises:
        ValueError: the model was trained on another dataset.
    """
    model = medmamba.MedMambaSegmenter.from_pretrained(folder).fuse()
    name = str(model.config.training.get("dataset"))
    if name not in DATASETS:
        raise ValueError(f"{folder} was trained on {name}; here are {', '.join(DATASETS)}")
    dataset = load(data, name).split(split)
    groups = {"all": dataset.examples}
    if by_folder:
        names = sorted({pair.image.parent.name for pair in dataset.examples})
        groups = {key: tuple(pair for pair in dataset.examples if pair.image.parent.name == key) for key in names}
    return {
        key: evaluate_segmenter(model, replace(dataset, examples=pairs), flips=flips) for key, pairs in groups.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.segment_evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets, see hub.segment")
    parser.add_argument("--model", type=Path, required=True, help="such as hub/models/pad-lesions")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--flips", action="store_true", help="average over reflections, in four times the time")
    parser.add_argument("--by-folder", action="store_true", help="each folder of images apart")
    parser.add_argument("--out", metavar="FILE", help="write the metrics to this JSON file")
    chosen = parser.parse_args(arguments)
    try:
        found = evaluate(chosen.model, chosen.data, chosen.split, chosen.flips, chosen.by_folder)
    except (ValueError, OSError, ImageError, PretrainedError) as error:
        print(f"hub.segment_evaluate: {error}", file=sys.stderr)
        return 2
    for key, evaluation in found.items():
        print(f"{key}: {evaluation.n} images, 95 % intervals over {evaluation.units}\n{evaluation.table()}\n")
    if chosen.out:
        write_text(chosen.out, json_text({key: each.to_dict() for key, each in found.items()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
