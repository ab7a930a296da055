"""Baselines with MedMamba's trainer, data, recipe and evaluation: a timm model from scratch, or a pretrained teacher.

The teacher, EfficientNet-Lite2 with ImageNet weights, keeps its weights too, from which MedMamba can be distilled.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medmamba import MedMamba
from medmamba.config import MedMambaConfig, variant_config
from medmamba.data import check_leakage, registry
from medmamba.evaluation import RESULTS_NAME, write_results
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.finalise import score_splits, training_record
from medmamba.training.identity import differences, fingerprint, run_identity
from medmamba.training.progress import Progress
from medmamba.training.recipe import Recipe, load_recipe
from medmamba.training.run_log import RunLog
from medmamba.training.setup import ImageCache, check_splits
from medmamba.training.task import CHECKPOINTS
from medmamba.training.trainer import Trainer
from medmamba.utils.devices import make_accelerator
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

from . import teacher
from .zoo_data import DATASETS, duplicates_checked, open_one

if TYPE_CHECKING:
    from accelerate import Accelerator


class TimmClassifier(nn.Module):
    """A timm model with the part of MedMamba's interface that the trainer uses.

    Recipes with layer decay or freezing need more and are rejected by `train_baseline`.
    """

    def __init__(self, name: str, config: MedMambaConfig):
        import timm

        super().__init__()
        self.config = config
        self.net = timm.create_model(name, pretrained=False, num_classes=config.num_classes, in_chans=config.in_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of biases and norm parameters."""
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
    """Trains on `data`/`name` and writes results and history, of the teacher also weights. Call again to resume.

    Args:
        architecture: a model name of timm, such as "resnet50", or `hub.teacher.NAME`.
        name: one of `hub.zoo_data.DATASETS`.
        settings: of the recipe.

    Returns:
        Whether the run is finished.

    Raises:
        ValueError: the recipe uses layer decay or freezing.
        FileExistsError: `out` holds the results of a different run.
    """
    started, out = time.monotonic(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    chosen, entry = load_recipe(recipe, **settings), registry.get(name)
    is_teacher = architecture == teacher.NAME
    if is_teacher:
        chosen = load_recipe(recipe, **teacher.SETTINGS | settings)
    if chosen.layer_decay < 1 or chosen.freeze:
        raise ValueError("layer_decay and freeze need the layers of MedMamba; baselines do not support them")
    index = open_one(Path(data), name)
    check_splits(index)
    accelerator = make_accelerator(device, "auto")
    config = variant_config(
        "tiny",
        num_classes=len(index.classes),
        id2label=entry.id2label,
        preprocess={"input_size": (chosen.evaluated_at, chosen.evaluated_at)},
    ).replace(architecture=architecture if is_teacher else f"timm {architecture}")
    torch.manual_seed(seed)
    network = teacher.Lite2Classifier(config) if is_teacher else TimmClassifier(architecture, config)
    model = cast(MedMamba, network)
    data_digest, precision = fingerprint(index), accelerator.mixed_precision
    identity = run_identity(chosen, model, None, data_digest, seed=seed, precision=precision, parts=1)
    if (out / RESULTS_NAME).is_file():
        before = json.loads((out / RESULTS_NAME).read_text(encoding="utf-8"))
        if changed := differences(identity, before["training"]["identity"]):
            raise FileExistsError(f"{out} holds the results of another run, with another {changed}; use another folder")
        return True
    checked = duplicates_checked(index, cache)
    check_leakage(index, allow=DATASETS[name], duplicates=checked is None)
    images = ImageCache(index, config, accelerator, cache, progress)
    deadline = None if max_seconds is None else started + max_seconds
    options: dict[str, Any] = dict(identity=identity, deadline=deadline, graphs=graphs)
    state = fit(model, chosen, images, accelerator, out, seed, progress, **options)
    if state is None:
        return False
    record = training_record(index, entry, chosen, identity, state, accelerator, "as the data are arranged")
    if DATASETS[name]:
        record["allowed_leakage"] = list(DATASETS[name])
    if is_teacher:
        record["init"] = "ImageNet"
    if checked:
        record["duplicates_checked"] = checked
    if is_teacher:
        description = json_text(config.to_dict(), indent=1)
        write_text(out / teacher.DESCRIPTION, description + "\n")
        save_file({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, out / teacher.WEIGHTS)
    scored = score_splits(model, images, accelerator, name)
    write_results(out, scored, training=record, calibration=model.config.calibration)
    CheckpointStore(out / CHECKPOINTS).clear()
    return True


def fit(
    model: MedMamba,
    recipe: Recipe,
    images: ImageCache,
    accelerator: Accelerator,
    out: Path,
    seed: int,
    progress: bool = False,
    **options: Any,
) -> Progress | None:
    """Trains a network and gives it the weights of its best epoch; returns None if the run was stopped before its end.

    Args:
        model: with the part of MedMamba's interface that `TimmClassifier` has.
        out: for history and checkpoints, which the caller clears.
        options: of `Trainer`.
    """
    store = CheckpointStore(out / CHECKPOINTS)
    trainer = Trainer(model, recipe, images, accelerator, store, RunLog(out, progress), seed=seed, **options)
    state = trainer.fit()
    if not state.finished(recipe) or state.best is None:
        return None
    model.load_state_dict(store.load_best(state.best["epoch"]))
    return state
