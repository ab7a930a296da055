"""A model of timm through the same trainer, data, recipe and evaluation as MedMamba, from scratch, for comparison."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from medmamba import MedMamba
from medmamba.config import MedMambaConfig, variant_config
from medmamba.data import check_leakage
from medmamba.data.registry import get
from medmamba.evaluation.evaluate_model import RESULTS_NAME, score, write_results
from medmamba.metrics.calibration import fit_calibration
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.finalise import training_record
from medmamba.training.recipe import load_recipe
from medmamba.training.run import CHECKPOINTS, fingerprint
from medmamba.training.run_log import RunLog
from medmamba.training.setup import ImageCache, check_splits, make_accelerator
from medmamba.training.trainer import Trainer
from medmamba.training.validation import predict_logits, validation_batch


class TimmClassifier(nn.Module):
    """As much of MedMamba's interface as the trainer needs; recipes with layer decay or freezing need more."""

    def __init__(self, name: str, config: MedMambaConfig):
        import timm

        super().__init__()
        self.config = config
        self.net = timm.create_model(name, pretrained=False, num_classes=config.num_classes, in_chans=config.in_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def no_weight_decay(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}


def train_baseline(
    architecture: str,
    name: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    recipe: str = "paper-medmnist",
    *,
    seed: int = 0,
    device: str = "auto",
    max_seconds: float | None = None,
    cache: Path | None = None,
    graphs: str = "auto",
    progress: bool = True,
    **settings: Any,
) -> bool:
    """Trains on `data`/`name` and writes results and history to `out`; no weights. Call again to go on.

    Returns whether the run is finished.
    """
    from .zoo import DATASETS, doubles_checked, open_one

    started, out = time.monotonic(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    chosen, entry = load_recipe(recipe, **settings), get(name)
    if chosen.layer_decay < 1 or chosen.freeze:
        raise ValueError("layer_decay and freeze need the layers of MedMamba; baselines go without")
    index = open_one(Path(data), name)
    check_splits(index)
    accelerator = make_accelerator(device, "auto")
    config = variant_config(
        "tiny",
        num_classes=len(index.classes),
        id2label=entry.id2label,
        preprocess={"input_size": (chosen.evaluated_at, chosen.evaluated_at)},
    ).replace(architecture=f"timm {architecture}")
    identity = {
        "recipe": {key: value for key, value in chosen.to_dict().items() if key not in ("name", "description")},
        "seed": seed,
        "data": fingerprint(index),
        "model": config.architecture,
        "init": "",
        "in_chans": config.in_chans,
        "precision": accelerator.mixed_precision,
    }
    if (out / RESULTS_NAME).is_file():
        before = json.loads((out / RESULTS_NAME).read_text(encoding="utf-8"))
        if before["training"]["identity"] != json.loads(json.dumps(identity)):
            raise FileExistsError(f"{out} holds the results of another run; use another folder")
        return True
    checked = doubles_checked(index, cache)
    check_leakage(index, allow=DATASETS[name], duplicates=checked is None)
    torch.manual_seed(seed)
    model = cast(MedMamba, TimmClassifier(architecture, config))
    images = ImageCache(index, config, accelerator, cache, progress)
    store = CheckpointStore(out / CHECKPOINTS)
    trainer = Trainer(
        model,
        chosen,
        images,
        accelerator,
        store,
        RunLog(out, progress),
        seed=seed,
        identity=identity,
        deadline=None if max_seconds is None else started + max_seconds,
        graphs=graphs,
    )
    state = trainer.fit()
    if not state.finished(chosen) or state.best is None:
        return False
    model.load_state_dict(store.load_best(state.best["epoch"]))
    record = training_record(index, entry, chosen, identity, state, accelerator, "as the data are arranged")
    if DATASETS[name]:
        record["allowed_leakage"] = list(DATASETS[name])
    if checked:
        record["duplicates_checked"] = checked
    scored = {}
    for split in ("val", "test"):
        part = images(split, chosen.evaluated_at)
        batch = validation_batch(64, accelerator.device)
        logits = predict_logits(model, part, batch, accelerator, full_precision=True)
        if split == "val":
            config = config.replace(calibration=fit_calibration(logits.numpy(), part.index.labels).to_dict())
        context = {"data": name, "split": split, "input_size": list(config.preprocess.input_size)}
        scored[split] = score(logits, part.index, config, context=context)
    write_results(out, scored, training=record, calibration=config.calibration)
    store.clear()
    return True
