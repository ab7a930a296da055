"""Trains the detectors of this project, and peers in the same trainer, from one table of runs.

    python -m hub.detect list
    python -m hub.detect train --data DATA --out RUNS --only bccd-nano-0
    python -m hub.detect table [RUNS]

DATA holds `bccd`, a Pascal VOC folder with its official split. Boxes without extent are dropped, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmamba.detection.dataset import DetectionDataset, open_detection
from medmamba.training.detection_run import train_detector

from .dense_runs import Run, command_line, finished, runs, start_of
from .detect_peers import peer
from .segment_peers import PEERS

DATASETS = {"bccd": ("RBC", "WBC", "Platelets")}
RUNS = runs(tuple(DATASETS), ("nano", "tiny", "nano-scratch", *PEERS))


def load(data: Path, name: str) -> DetectionDataset:
    """Opens a dataset."""
    return open_detection(data / name, DATASETS[name])


def train(run: Run, data: Path, out: Path, models: Path, **settings: Any) -> dict[str, Any]:
    """Trains one run; returns its results. A finished one is returned as it is, an unfinished one resumed."""
    dataset = load(data, run.dataset)
    options: dict[str, Any] = dict(seed=run.seed, progress=False, **settings)
    if run.model in PEERS:
        options["init"] = peer(run.model, dataset.classes, options.get("size") or 512)
        options.setdefault("layer_decay", 1.0)
    else:
        options |= start_of(run, models)
    return finished(train_detector(dataset, out / run.name, dataset.classes, **options), run, out)


def _value(split: dict[str, Any], metric: str) -> float:
    return float(split["metrics"][metric]["value"])


METRICS = (("mAP50", lambda split: _value(split, "map50")), ("mAP", lambda split: _value(split, "map")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    command_line("hub.detect", __doc__, RUNS, train, METRICS, arguments)


if __name__ == "__main__":
    main()
