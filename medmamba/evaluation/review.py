"""A model on labelled images, image by image: metrics, and which images are behind each number.

Images are read as they are needed and not kept, so that memory does not grow with their size. Images that cannot be
read are left out and listed, rather than ending the evaluation.

>>> found = review(model, open_dataset("my_folder"))
>>> print(found.scored.to_markdown())
>>> [found.index.records[row].source for row in found.cell("melanoma", "nevus")]
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._version import __version__
from ..data import DatasetError, ImageDataset
from ..data.deferred import RecordImages
from ..data.metadata import Columns
from ..decision import Curve, Performance, count, indices, perform, positives, trace
from ..decision import score as score_of
from ..imaging.ahead import Order, Unread
from ..inference.fitted import in_force
from ..inference.predict import NotFiniteError, needs_signatures, unusual_flags, why_not_finite
from ..inference.stream import Options, stream
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from ..utils.tables import csv_row
from .classes import match_classes
from .evaluate_model import score_subgroups
from .results import Scored, score


class ReviewCancelled(Exception):
    """`review` was cancelled by its `progress`."""


@dataclass(frozen=True, eq=False)
class Review:
    """What a model makes of labelled images.

    Attributes:
        index: the images that could be read, with the classes of the model.
        scored: logits and metrics.
        signatures: (N, S) float32, see `medmamba.inference.signature`.
        unusual: (N,) True where an image is unlike the training images; None if the model has no detector.
        failures: name and reason of images that could not be read.
        columns: values of the images by column, if there are groups.
        model: its name.
    """

    index: ImageDataset
    scored: Scored
    signatures: NDArray[np.float32]
    unusual: NDArray[np.bool_] | None
    failures: tuple[tuple[str, str], ...] = ()
    columns: Columns | None = None
    model: str = ""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.scored.evaluation.classes

    @property
    def task(self) -> str:
        return self.scored.evaluation.task

    @property
    def probabilities(self) -> NDArray[np.floating[Any]]:
        """Calibrated probabilities (N, K)."""
        return to_probabilities(self.scored.logits, self.task, self.scored.evaluation.context["temperature"])

    def worst(self) -> NDArray[np.int64]:
        """Returns the rows of misclassified images, the most confident error first."""
        return worst_first(self.probabilities, self.scored.labels)

    def cell(self, true: str, predicted: str) -> NDArray[np.int64]:
        """Returns the rows of a cell of the confusion matrix, the most confident prediction first.

        Raises:
            ValueError: no such class, or a multi-label task, where images have no single class.
        """
        if self.task == "multilabel":
            raise ValueError("images of a multi-label task have no single class, so there are no such cells")
        i, j = self.classes.index(true), self.classes.index(predicted)
        p = self.probabilities
        rows = np.flatnonzero((self.scored.labels == i) & (p.argmax(axis=1) == j))
        return rows[np.argsort(-p[rows, j], kind="stable")]

    def curve(self, wanted: Sequence[str]) -> Curve:
        """Returns the outcomes at many thresholds on the probability of any of the classes: the ROC curve."""
        s, truth = self._scores(wanted)
        return trace(s, truth)

    def at(self, wanted: Sequence[str], threshold: float, prevalence: float | None = None) -> Performance:
        """Returns sensitivity, specificity and predictive values of a threshold, with 95 % Wilson intervals.

        Args:
            wanted: an image is positive if it shows any of these classes.
            threshold: an image is called positive if its probability for them is at least this, 0 to 1.
            prevalence: for the predictive values, 0 to 1; None: that of these images.
        """
        s, truth = self._scores(wanted)
        patients = self.index.patients
        return perform(count(s, truth, threshold, patients if any(patients) else None), prevalence)

    def _scores(self, wanted: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        chosen = indices(wanted, self.classes)
        return score_of(self.probabilities, chosen, self.task), positives(self.scored.labels, chosen)

    def truth(self, row: int) -> str:
        """Returns the true classes of an image in words."""
        return label_text(self.scored.labels[row], self.classes)

    def to_csv(self) -> str:
        """Returns a row for each image, safe to open in a spreadsheet: truth, prediction, probabilities, groups."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        groups = dict(self.columns.values) if self.columns else {}
        head = ["image", "true", "predicted", "right", "unusual", *(f"p({name})" for name in self.classes), *groups]
        writer.writerow(csv_row([*head, "model", "version", "error"]))
        p, limits = self.probabilities, self.scored.evaluation.threshold
        for row, record in enumerate(self.index.records):
            if self.task == "multilabel":
                said = (p[row] > np.asarray(limits if limits is not None else 0.5)).astype(int)
            else:
                said = p[row].argmax()
            right = bool(np.array_equal(said, self.scored.labels[row]))
            flag = "" if self.unusual is None else bool(self.unusual[row])
            own = [values[row] or "" for values in groups.values()]
            cells = [str(record.source), self.truth(row), label_text(said, self.classes), right, flag]
            shares = [f"{value:.6f}" for value in p[row]]
            writer.writerow(csv_row([*cells, *shares, *own, self.model, __version__, ""]))
        for name, reason in self.failures:
            blank = [""] * (len(head) - 1)
            writer.writerow(csv_row([name, *blank, self.model, __version__, reason]))
        return text.getvalue()


def review(
    model: MedMamba,
    index: ImageDataset,
    *,
    name: str = "",
    split: str = "all",
    columns: Callable[[ImageDataset], Columns] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Review:
    """Evaluates a model and keeps what it says of each image.

    The metrics equal those of `evaluate_model`; the model is not changed.

    Args:
        model: on any device; its own preprocessing, calibration and detector apply.
        index: images with the model's classes, or a part of them, by name.
        name: of the model, for the results.
        split: what the images are, for the results.
        columns: returns groups of the images that are left, see `data.metadata.read_columns`.
        resamples, seed: of the bootstrap.
        batch_size, workers: see `medmamba.inference.stream.Options`.
        progress: called with the number of images that are done; returns False to cancel.

    Raises:
        DatasetError: classes that the model does not know, or no image that can be read.
        NotFiniteError: the model returned NaN or infinity for some images.
        ReviewCancelled: cancelled by `progress`.
    """
    config = in_force(model).config
    index = match_classes(index, config)
    rows, said, seen, flags, failures = look(model, index, batch_size, workers, progress, signature=True)
    kept = index.subset(rows)
    if failures:
        kept = kept.with_notes(f"{len(failures)} images cannot be read and are left out, such as {failures[0][0]}")
    context = {"model": name, "data": index.name, "split": split, "input_size": list(config.preprocess.input_size)}
    scored = score(said, kept, config, unusual=flags, resamples=resamples, seed=seed, context=context)
    groups = columns(kept) if columns is not None else None
    if groups is not None and groups.values:
        scored = dataclasses.replace(scored, subgroups=score_subgroups(scored, kept, groups))
    return Review(kept, scored, seen, flags, tuple(failures), groups, name)


def look(
    model: MedMamba,
    index: ImageDataset,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
    signature: bool = False,
) -> tuple[list[int], torch.Tensor, NDArray[np.float32], NDArray[np.bool_] | None, list[tuple[str, str]]]:
    """Predicts the images of a dataset that can be read; see `review` for the arguments and errors.

    Returns:
        The rows that could be read; their logits (N, K) and signatures (N, S; no columns unless `signature`), float32;
        whether they are unlike the training images (N,), None without a detector; name and reason of the others.
    """
    config = in_force(model).config
    order = Order(config.preprocess, config.in_chans, stored=True)
    options = Options(batch_size, workers, precision="float32", signature=signature or needs_signatures(model))
    rows: list[int] = []
    failures: list[tuple[str, str]] = []
    logits, seen = [], []
    flags: list[bool | None] = []
    done = 0
    batches: Any = stream(model, RecordImages(index), order, options)
    with contextlib.closing(batches):
        for batch in batches:
            for item in batch.items:
                if isinstance(item, Unread):
                    failures.append((str(index.records[done].source), item.error))
                else:
                    rows.append(done)
                done += 1
            if batch.answer is not None:
                logits.append(batch.answer.logits)
                flags += unusual_flags(model, batch.answer)
                if signature and batch.answer.signature is not None:
                    seen.append(batch.answer.signature)
            if progress is not None and progress(done) is False:
                raise ReviewCancelled
    if not logits:
        reason = f"; the first: {failures[0][1]}" if failures else ""
        raise DatasetError(f"{index.name}: none of the {len(index)} images can be read{reason}")
    said = torch.cat(logits)
    if len(bad := (~said.isfinite().all(1)).nonzero()):
        reason = why_not_finite(model, said[int(bad[0])])
        raise NotFiniteError(f"no prediction for {len(bad)} of {len(said)} images: {reason}")
    found = torch.cat(seen).numpy() if seen else np.zeros((len(said), 0), np.float32)
    known = None if None in flags else np.array(flags, dtype=bool)
    return rows, said, found, known, failures


def worst_first(p: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the rows of misclassified images, the most confident first; for several labels, the most wrong first.

    Args:
        p: probabilities (N, K).
        labels: (N,), or (N, K) of 0 and 1.
    """
    if labels.ndim == 2:
        errors = np.abs(p - labels).max(axis=1)
        return np.argsort(-errors, kind="stable")[: int((errors > 0.5).sum())]
    wrong = np.flatnonzero(p.argmax(axis=1) != labels)
    return wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]


def label_text(label: Any, classes: Sequence[str]) -> str:
    """Returns the classes of a label in words: a class number, or one 0 or 1 for each class."""
    if np.ndim(label) == 0:
        return classes[int(label)]
    return ", ".join(name for name, shown in zip(classes, label, strict=True) if shown) or "none of the classes"
