"""Trains the segmentation models of this project, and peers in the same trainer, from one table of runs.

    python -m hub.segment list
    python -m hub.segment train --data DATA --out RUNS --only kvasir_seg-nano-0
    python -m hub.segment table [RUNS]

DATA holds `kvasir_seg`, `pad_ufes_20` and `pad_ufes_20_masks`, laid out as train, val and test, and `busi_masks`, which
has no splits and is cross-validated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmamba.imaging import expand_inputs
from medmamba.segmentation.dataset import Pair, SegmentationDataset, mask_from_file, pair_by_name
from medmamba.segmentation.open import open_segmentation
from medmamba.training.segmentation_run import train_segmenter

from .dense_runs import Run, command_line, finished, runs, start_of
from .segment_peers import PEERS, load_run, peer

DATASETS = {"kvasir_seg": "polyp", "pad_ufes_20": "lesion", "busi_masks": "lesion"}
FOLDS = 4  # of busi_masks; no near-duplicates are in two of them, which the test of its folds checks
RUNS = [
    *runs(("kvasir_seg", "pad_ufes_20"), ("nano", "tiny", "nano-scratch", *PEERS)),
    # Cross-validation: the number of a run is its fold. nano-medical has seen these images, bloodmnist-nano has not.
    *runs(("busi_masks",), ("nano-blood", "nano-scratch", *PEERS), range(FOLDS)),
]


def load(data: Path, name: str, fold: int = 0) -> SegmentationDataset:
    """Opens a dataset: `pad_ufes_20` has its images by class, and its masks in a folder of their own."""
    if name == "busi_masks":
        return folded(open_segmentation(data / name, (DATASETS[name],)), fold)
    if name == "kvasir_seg":
        return open_segmentation(data / name, (DATASETS[name],))
    pairs: list[Pair] = []
    for split in ("train", "val", "test"):
        masks = expand_inputs(data / "pad_ufes_20_masks" / split)
        wanted = {path.stem for path in masks}
        images = [path for path in expand_inputs(data / name / split) if path.stem in wanted]  # some have no mask
        for image, mask in pair_by_name(images, masks, f"{name}/{split}"):
            patient = "_".join(image.stem.split("_")[:2])
            pairs.append(Pair(image, str(mask), mask, mask_from_file(mask, 1), split, patient))
    return SegmentationDataset(name, (DATASETS[name],), tuple(pairs))


def folded(dataset: SegmentationDataset, fold: int) -> SegmentationDataset:
    """Divides a dataset for cross-validation: one fold is test, the next is val, the others are train.

    Every fold has the same share of each class, which file names such as "benign_12.png" begin with, and neighbouring
    numbers, since they may be views of one lesion.
    """
    kinds: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(dataset.examples, key=lambda pair: (len(pair.image.stem), pair.image.stem)):
        kinds[pair.image.stem.rpartition("_")[0]].append(pair)
    pairs: list[Pair] = []
    for found in kinds.values():
        for i, pair in enumerate(found):
            away = (i * FOLDS // len(found) - fold) % FOLDS
            pairs.append(replace(pair, split={0: "test", 1: "val"}.get(away, "train")))
    return replace(dataset, examples=tuple(pairs))


def train(run: Run, data: Path, out: Path, models: Path, **settings: Any) -> dict[str, Any]:
    """Trains one run; returns its results. A finished one is returned as it is, an unfinished one resumed."""
    dataset = load(data, run.dataset, run.seed)
    options: dict[str, Any] = dict(seed=run.seed, progress=False, **settings)
    if "teacher" in options:  # the folder of another run, with distill=WEIGHT
        options["teacher"] = load_run(options["teacher"])
    if run.model in PEERS:
        options["init"] = peer(run.model, dataset.classes, options.get("size") or 352)
        options.setdefault("layer_decay", 1.0)
    else:
        options |= start_of(run, models)
    return finished(train_segmenter(dataset, out / run.name, dataset.classes, **options), run, out)


def _value(split: dict[str, Any], metric: str) -> float:
    return float(split["metrics"][split["classes"][0]][metric]["value"])


METRICS = (("Dice", lambda split: _value(split, "dice")), ("IoU", lambda split: _value(split, "iou")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    command_line("hub.segment", __doc__, RUNS, train, METRICS, arguments)


if __name__ == "__main__":
    main()
