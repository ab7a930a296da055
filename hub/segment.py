"""Trains the segmentation models of this project, and peers in the same trainer, from one table of runs.

    python -m hub.segment list
    python -m hub.segment train --data DATA --out RUNS --only kvasir_seg-nano-0
    python -m hub.segment table [RUNS]

DATA holds `kvasir_seg`, `pad_ufes_20` and `pad_ufes_20_masks`, laid out as train, val and test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmamba.imaging import expand_inputs
from medmamba.segmentation.dataset import Pair, SegmentationDataset, mask_from_file, pair_by_name
from medmamba.segmentation.open import open_segmentation
from medmamba.training.segmentation_run import train_segmenter

from .dense_runs import Run, command_line, finished, runs, start_of
from .segment_peers import PEERS, load_run, peer

DATASETS = {"kvasir_seg": "polyp", "pad_ufes_20": "lesion"}
RUNS = runs(tuple(DATASETS), ("nano", "tiny", "nano-scratch", *PEERS))


def load(data: Path, name: str) -> SegmentationDataset:
    """Opens a dataset: `pad_ufes_20` has its images by class, and its masks in a folder of their own."""
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


def train(run: Run, data: Path, out: Path, models: Path, **settings: Any) -> dict[str, Any]:
    """Trains one run; returns its results. A finished one is returned as it is, an unfinished one resumed."""
    dataset = load(data, run.dataset)
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
