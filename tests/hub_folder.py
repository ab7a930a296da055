"""A finished model folder, as training leaves it, without the training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from medmamba import create_model
from medmamba.data import registry
from medmamba.evaluation import score, write_results
from medmamba.metrics.calibration import fit_calibration


def finished_model(folder: Path, dataset: str = "bloodmnist", seed: int = 0, **record) -> Path:
    """Random weights of the test variant, with real scores of made-up predictions."""
    entry = registry.get(dataset)
    torch.manual_seed(seed)
    model = create_model("test", num_classes=entry.num_classes, id2label=entry.id2label).eval()
    rng = np.random.default_rng(seed)
    scored = {}
    for split, size in (("val", 120), ("test", 160)):
        labels = np.arange(size) % entry.num_classes
        logits = rng.normal(size=(size, entry.num_classes)) + 2.5 * np.eye(entry.num_classes)[labels]
        if split == "val":
            model.config.calibration = fit_calibration(logits, labels, "multiclass").to_dict()
        images: Any = SimpleNamespace(name="images", labels=labels, patients=[None] * size, notes=())
        scored[split] = score(torch.from_numpy(logits), images, model.config, resamples=50, context={"split": split})
    model.config.training = training(dataset, seed, **record)
    write_results(folder, scored, training=model.config.training, calibration=model.config.calibration)
    return model.save_pretrained(folder, dtype=torch.float16)


def training(dataset: str, seed: int = 0, /, **record) -> dict[str, Any]:
    """What config.json and results.json say of a training run."""
    entry = registry.get(dataset)
    return {
        "dataset": entry.name,
        "source": entry.source.url,
        "licence": entry.licence.id,
        "split": "as the data are arranged",
        "split_sizes": {"train": 900, "val": 120, "test": 160},
        "recipe": "default",
        "settings": {},
        "init": "",
        "seed": seed,
        "epochs": 3,
        "best_epoch": 2,
        "selected_by": ["accuracy", "loss"],
        "seconds": 12.5,
        "device": "cpu",
        "precision": "no",
        "versions": {"medmamba": "0.1.0"},
        **record,
    }
