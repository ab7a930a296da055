"""Two models on the same images: where they differ, and which is right more often if the images have labels.

>>> found = compare_models(first, second, open_dataset("my_folder"), names=("old", "new"))
>>> print(found.text())
>>> [found.index.records[row].source for row in found.most_different()[:10]]
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import MedMambaConfig
from ..data import DatasetError, ImageDataset, Record
from ..data.files import FolderReader
from ..inference.fitted import in_force
from ..metrics.calibration import to_probabilities
from ..metrics.comparison import PairedComparison, agreement, compare_predictions
from ..model import MedMamba
from ..utils.names import AmbiguousNameError, find_name
from ..utils.tables import csv_row
from .classes import match_classes
from .review import label_text, look


@dataclass(frozen=True, eq=False)
class Pair:
    """What two models say of the same images.

    Attributes:
        names: of the models.
        index: the images that both could read.
        classes: K names, those of the first model.
        probabilities: calibrated, (N, K) of each model, in the order of `classes`.
        said: predicted classes of each model: (N,), or (N, K) of 0 and 1 for several labels.
        agreement: share of images with the same answer.
        kappa: Cohen's; NaN for several labels, or if both give one answer to all.
        outcome: which is right more often; None without labels.
        failures: name and reason of images that could not be read.
    """

    names: tuple[str, str]
    index: ImageDataset
    classes: tuple[str, ...]
    probabilities: tuple[NDArray[Any], NDArray[Any]]
    said: tuple[NDArray[Any], NDArray[Any]]
    agreement: float
    kappa: float
    outcome: PairedComparison | None = None
    failures: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def difference(self) -> NDArray[np.float64]:
        """(N,) largest difference of the probabilities of a class, 0 to 1."""
        return np.abs(self.probabilities[0] - self.probabilities[1]).max(axis=1)

    @property
    def same(self) -> NDArray[np.bool_]:
        """(N,) whether both give the same answer."""
        equal = self.said[0] == self.said[1]
        return np.asarray(equal if equal.ndim == 1 else equal.all(axis=1))

    def most_different(self) -> NDArray[np.int64]:
        """Returns all rows, other answers first, and among them by the difference of the probabilities."""
        return np.lexsort((-self.difference, self.same))

    def text(self) -> str:
        """Returns the outcome in words."""
        kappa = "" if np.isnan(self.kappa) else f", Cohen's kappa {self.kappa:.2f}"
        said = f"The same answer to {int(self.same.sum())} of {len(self)} images ({self.agreement:.1%}{kappa})."
        return said if self.outcome is None else f"{said} {self.outcome.text(*self.names)}"

    def to_csv(self) -> str:
        """Returns a row for each image, the most different first, safe to open in a spreadsheet."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        truth = ["true"] if self.outcome is not None else []
        columns = [f"{name}: p({label})" for name in self.names for label in self.classes]
        writer.writerow(csv_row(["image", *truth, *self.names, "same", "difference", *columns, "error"]))
        gap, same = self.difference, self.same
        for row in self.most_different():
            own = [label_text(self.index.records[row].label, self.classes)] if truth else []
            said = [label_text(part[row], self.classes) for part in self.said]
            shares = [f"{value:.6f}" for part in self.probabilities for value in part[row]]
            name = image_name(self.index.records[row])
            writer.writerow(csv_row([name, *own, *said, bool(same[row]), f"{gap[row]:.6f}", *shares, ""]))
        for name, reason in self.failures:
            blank = [""] * (len(truth) + 4 + len(columns))
            writer.writerow(csv_row([Path(name).name, *blank, reason]))
        return text.getvalue()


def compare_models(
    first: MedMamba,
    second: MedMamba,
    images: ImageDataset | Sequence[str | os.PathLike],
    *,
    names: tuple[str, str] = ("first", "second"),
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Pair:
    """Compares what two models say of the same images.

    Args:
        first, second: models with the same classes, in any order; each with its own preprocessing and calibration.
        images: labelled images; or files without labels.
        names: of the models.
        resamples, seed: of the bootstrap for the difference of accuracy.
        batch_size, workers: see `medmamba.inference.stream.Options`.
        progress: called with the number of images that are done, of twice as many as there are; False cancels.

    Raises:
        DatasetError: the models have other classes than each other or than the images, or no image can be read.
        NotFiniteError, ReviewCancelled: as `review`.
    """
    configs = in_force(first).config, in_force(second).config
    order = same_classes(*configs)
    labelled = isinstance(images, ImageDataset)
    index = match_classes(images, configs[0]) if isinstance(images, ImageDataset) else unlabelled(images, configs[0])
    found = []
    for number, model in enumerate((first, second)):
        before = number * len(index)

        def told(done: int, before: int = before) -> object:
            return None if progress is None else progress(before + done)

        found.append(look(model, index, batch_size, workers, told))
    both = sorted({*found[0][0]} & {*found[1][0]})
    failures = dict(pair for part in found for pair in part[4])
    if not both:
        raise DatasetError(f"{index.name}: no image can be read by both models")
    shares, said = [], []
    for (rows, logits, *_), config, columns in zip(found, configs, (list(range(len(order))), order), strict=True):
        place = {row: i for i, row in enumerate(rows)}
        kept = logits.numpy()[[place[row] for row in both]][:, columns]
        p = to_probabilities(kept, config.task, float(config.calibration.get("temperature", 1.0)))
        limits = np.asarray(config.calibration.get("thresholds") or [0.5] * len(order))[columns]
        shares.append(p)
        said.append((p > limits).astype(int) if config.task == "multilabel" else p.argmax(axis=1))
    kept_index = index.subset(both)
    if configs[0].task == "multilabel":
        same, kappa = float((said[0] == said[1]).all(axis=1).mean()), float("nan")
    else:
        same, kappa = agreement(*said)
    outcome = None
    if labelled:
        patients = kept_index.patients
        outcome = compare_predictions(
            kept_index.labels, *said, patients=patients if any(patients) else None, resamples=resamples, seed=seed
        )
    return Pair(
        names, kept_index, tuple(configs[0].labels), (shares[0], shares[1]), (said[0], said[1]), same, kappa, outcome,
        tuple(failures.items()),
    )  # fmt: skip


def same_classes(first: MedMambaConfig, second: MedMambaConfig) -> list[int]:
    """Returns, for each class of the first model, its number in the second.

    Raises:
        DatasetError: the classes or the tasks are not the same.
    """
    try:
        found = [find_name(name, second.labels) for name in first.labels]
    except AmbiguousNameError as error:
        raise DatasetError(f"class {error}") from error
    numbers = [number for number in found if number is not None]
    kinds = [config.task == "multilabel" for config in (first, second)]
    if len(numbers) != len(first.labels) or sorted(numbers) != list(range(len(second.labels))) or kinds[0] != kinds[1]:
        raise DatasetError(
            f"only models with the same classes can be compared: one knows {', '.join(first.labels)}, the other "
            f"{', '.join(second.labels)}"
        )
    return numbers


def unlabelled(paths: Sequence[str | os.PathLike], config: MedMambaConfig) -> ImageDataset:
    """Returns files without labels as a dataset for `look`; its labels mean nothing."""
    empty = (0,) * len(config.labels) if config.task == "multilabel" else 0
    records = [Record(str(Path(path).absolute()), empty) for path in paths]
    return ImageDataset(records, config.labels, FolderReader(Path()), config.task, name=f"{len(records)} images")


def image_name(record: Record) -> str:
    """Returns the path of an image in its set; of a file without labels, its name alone."""
    path = Path(str(record.source))
    return path.name if path.is_absolute() else str(record.source)
