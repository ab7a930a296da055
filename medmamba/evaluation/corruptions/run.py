"""Evaluates a model on corrupted images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...config import MedMambaConfig
from ...data import CachedDataset, ImageDataset
from ...imaging.preprocess import adapt_channels, resize
from ...metrics import Estimate
from ...metrics.bootstrap import bootstrap_weights, resampling_units
from ...metrics.calibration import to_probabilities
from ...metrics.evaluate import Scorer
from ...model import MedMamba
from ..logits import decode, predict_logits
from .kinds import corrupt
from .published import GREY, LEVELS, PUBLISHED, SIZE, published_for
from .result import Corruptions

if TYPE_CHECKING:
    from accelerate import Accelerator

_LEVEL = 0.95


def evaluate_corruptions(
    model: MedMamba,
    dataset: ImageDataset,
    accelerator: Accelerator,
    published: str = "auto",
    *,
    images: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    batch_size: int = 64,
    keep: str | os.PathLike | None = None,
    weights: str = "",
    context: dict[str, Any] | None = None,
    progress: bool = False,
) -> Corruptions:
    """Measures the balanced error of a model under every kind and severity of corruption.

    Images are resized to 224x224 pixels, for which the severities were chosen, corrupted, and then resized to the
    model's input, the clean ones too. The noise of an image depends on the seed, the kind, the severity and its name
    alone, so that a part of the images gives the same pictures as the whole set.

    Args:
        model: on the device of `accelerator`.
        dataset: images whose classes are the model's, see `match_classes`.
        published: dataset of MedMNIST-C whose corruptions are applied, "auto": by the model's training data.
        images: draws at most so many, with the seed and in the proportions of the classes; None: all.
        seed: of the noise and of the choice of images.
        resamples: bootstrap resamples; 0 for no intervals.
        keep: folder for the logits of each kind and severity; a later run with the same model, images and seed
            continues from them.
        weights: SHA-256 of the weights, part of what `keep` is bound to.
        context: stored with the result.

    Raises:
        ValueError: no corruptions for these data, or a model that takes neither grey nor colour images.
    """
    config = model.config
    name = published_for(str(config.training.get("dataset", "")) if published == "auto" else published)
    if config.in_chans not in (1, 3):
        raise ValueError(
            f"corruptions are defined for grey and colour images; the model takes {config.in_chans} channels"
        )
    part = dataset if images is None else dataset.subset(proportional(dataset, images, seed))
    at_size = dataclasses.replace(config.preprocess, input_size=(SIZE, SIZE))
    decoded = decode(part, config.replace(preprocess=at_size, in_chans=3))
    pictures = decoded.images
    if pictures.dtype == torch.uint16:
        pictures = ((pictures.view(torch.int16).int() & 0xFFFF) >> 8).to(torch.uint8)
    store = _Store(keep, part, (weights, name, seed, config.preprocess, config.in_chans))
    conditions = [(kind, level) for kind in PUBLISHED[name] for level in range(LEVELS)]
    errors: dict[tuple[str, int], Scorer] = {}
    bar = tqdm([("clean", 0), *conditions], "corruptions", disable=not progress)
    for kind, level in bar:
        logits = store.load(kind, level)
        if logits is None:
            found = pictures if kind == "clean" else corrupted(pictures, part, name, kind, level, seed)
            data = CachedDataset(_to_input(found, name in GREY, config), part)
            logits = predict_logits(model, data, batch_size, accelerator, full_precision=True).numpy()
            store.save(kind, level, logits)
        errors[kind, level] = _scorer(logits, part.labels, config)
    return _summary(errors, part, len(dataset), name, seed, resamples, weights, context or {})


def corrupted(pictures: Tensor, dataset: ImageDataset, published: str, kind: str, level: int, seed: int) -> Tensor:
    """Returns uint8 images `(N, H, W, 3)` under one kind of corruption at a level from 0 to 4."""
    parameter = PUBLISHED[published][kind][level]

    def one(row: int) -> np.ndarray:
        text = f"{kind}/{level}/{dataset.records[row].source}".encode("utf-8", "surrogatepass")
        return corrupt(kind, pictures[row].numpy(), parameter, np.random.default_rng([seed, zlib.crc32(text)]))

    with ThreadPoolExecutor(_threads()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(one, range(len(pictures))))))


def proportional(dataset: ImageDataset, most: int, seed: int) -> np.ndarray:
    """Returns at most `most` rows in order, drawn so that each class keeps its share; every class keeps an image.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"at least one image is needed, got {most}")
    rng = np.random.default_rng(seed)
    if most >= len(dataset):
        return np.arange(len(dataset))
    if dataset.task == "multilabel":
        return np.sort(rng.permutation(len(dataset))[:most])
    labels, chosen = dataset.labels, []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen.append(rng.permutation(rows)[: max(1, round(most * len(rows) / len(labels)))])
    return np.sort(np.concatenate(chosen))


def _threads() -> int:
    # PyTorch already uses its own threads for the filters.
    return max(1, min(32, (os.cpu_count() or 1)))


def _to_input(pictures: Tensor, grey: bool, config: MedMambaConfig) -> Tensor:
    """Returns `(N, H, W, in_chans)` uint8 at the model's input size."""
    if grey:
        made = [np.array(Image.fromarray(picture.numpy()).convert("L")) for picture in pictures]
        pictures = torch.from_numpy(np.stack(made))[..., None]
    size = config.preprocess.input_size
    planes = pictures.permute(0, 3, 1, 2)
    if tuple(planes.shape[2:]) == tuple(size):
        planes = planes if planes.shape[1] == config.in_chans else adapt_channels(planes.float(), config.in_chans)
    else:
        squash = dataclasses.replace(config.preprocess, crop_mode="squash")  # cropped or padded before
        parts = (resize(adapt_channels(part.float() / 255, config.in_chans), squash) * 255 for part in planes.split(64))
        planes = torch.cat([part.round() for part in parts])
    return planes.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _scorer(logits: np.ndarray, labels: np.ndarray, config: MedMambaConfig) -> Scorer:
    temperature = float(config.calibration.get("temperature", 1.0))
    p = to_probabilities(logits, config.task, temperature)
    return Scorer(labels, p, len(config.labels), config.task, config.calibration.get("thresholds", 0.5), 15)


def _summary(
    scorers: dict[tuple[str, int], Scorer],
    part: ImageDataset,
    available: int,
    published: str,
    seed: int,
    resamples: int,
    weights: str,
    context: dict[str, Any],
) -> Corruptions:
    patients = part.patients
    unit_of, stratum_of = resampling_units(part.labels, patients if any(patients) else None)

    def errors(scorer: Scorer) -> np.ndarray:
        """Returns the error on the images, and then those in the resamples, the same for all conditions."""
        drawn = bootstrap_weights(unit_of, stratum_of, resamples, seed) if resamples else iter(())
        everything = [np.ones((1, len(part))), *drawn]
        return np.concatenate([1 - scorer.balanced_accuracy(chunk) for chunk in everything])

    clean = errors(scorers.pop(("clean", 0)))
    found = {condition: errors(scorer) for condition, scorer in scorers.items()}
    mean = np.mean(list(found.values()), axis=0)
    kinds = dict.fromkeys(kind for kind, _ in found)
    return Corruptions(
        published=published,
        n_images=len(part),
        n_available=available,
        clean=_estimate(clean),
        errors={kind: tuple(float(found[kind, level][0]) for level in range(LEVELS)) for kind in kinds},
        mean=_estimate(mean),
        excess=_estimate(mean - clean),
        seed=seed,
        resamples=resamples,
        level=_LEVEL,
        weights=weights,
        context=context,
    )


def _estimate(values: np.ndarray) -> Estimate:
    """Returns the first value, with percentiles of the others as interval."""
    if len(values) == 1:
        return Estimate(float(values[0]))
    low, high = np.quantile(values[1:], ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return Estimate(float(values[0]), float(low), float(high))


class _Store:
    """Logits of each condition in files of a folder that belongs to one model and one set of images."""

    def __init__(self, folder: str | os.PathLike | None, part: ImageDataset, settings: tuple[Any, ...]) -> None:
        self.folder: Path | None = None
        if folder is not None:
            text = repr((settings, [str(record.source) for record in part.records], part.labels.tolist()))
            self.folder = Path(folder) / hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, kind: str, level: int) -> np.ndarray | None:
        if self.folder is None:
            return None
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(self.folder / f"{kind}-{level}.npy", allow_pickle=False)
        return None

    def save(self, kind: str, level: int, logits: np.ndarray) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{kind}-{level}.npy"
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, logits)
        path.with_suffix(".part").replace(path)
