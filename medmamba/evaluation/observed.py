"""What a model says of a labelled split, once: the logits and how unusual each image is, for decisions and reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import ImageDataset, open_dataset
from ..inference.fitted import in_force
from ..inference.predict import NotFiniteError, why_not_finite
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from ..utils.files import staged
from .classes import match_classes
from .evaluate_model import read_as
from .logits import image_answers


@dataclass(frozen=True, eq=False)
class Observed:
    """What a model says of the images of a split, with their labels.

    Attributes:
        logits: `(N, K)` float32, before temperature and softmax.
        labels: `(N,)`, or `(N, K)` of 0 and 1.
        patients: of each image, None where unknown.
        unusual: `(N,)` True where the detector of the model flags an image; None where it has none.
        classes: K names.
        task: "multiclass" or "multilabel".
        temperature: of the calibration that holds for the weights.
        name: of the data.
        split: "train", "val", "test", or "all".
        threshold: of a multi-label task, above which a label counts as present: one for all labels, or one for each.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    patients: tuple[str | None, ...]
    unusual: NDArray[np.bool_] | None
    classes: tuple[str, ...]
    task: str
    temperature: float
    name: str = ""
    split: str = ""
    threshold: float | tuple[float, ...] = 0.5

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> NDArray[np.floating[Any]]:
        """Calibrated probabilities `(N, K)`."""
        return to_probabilities(self.logits, self.task, self.temperature)

    @property
    def groups(self) -> tuple[str | None, ...] | None:
        """The patients where any is known, else None."""
        return self.patients if any(patient is not None for patient in self.patients) else None

    def save(self, path: str | os.PathLike) -> Path:
        """Writes an .npz, which holds file-derived patient names: keep it where the images are."""
        path = Path(path)
        known = np.array([patient is not None for patient in self.patients])
        with staged(path.parent) as folder:
            np.savez(
                folder / path.name,
                logits=self.logits,
                labels=self.labels,
                patients=np.array([patient or "" for patient in self.patients]),
                known=known,
                unusual=np.zeros(0, bool) if self.unusual is None else self.unusual,
                classes=np.array(self.classes),
                threshold=np.array(self.threshold),
                about=np.array([self.task, repr(self.temperature), self.name, self.split]),
            )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Observed:
        """Reads what `save` wrote; never unpickles.

        Raises:
            OSError, ValueError, KeyError: not such a file.
        """
        with np.load(path, allow_pickle=False) as data:
            task, temperature, name, split = map(str, data["about"])
            pairs = zip(data["patients"], data["known"], strict=True)
            patients = tuple(str(patient) if known else None for patient, known in pairs)
            unusual = data["unusual"] if len(data["unusual"]) else None
            classes = tuple(map(str, data["classes"]))
            made = (data["logits"], data["labels"], patients, unusual, classes, task, float(temperature), name, split)
            limits = data["threshold"].tolist() if "threshold" in data else 0.5
        return cls(*made, threshold=tuple(limits) if isinstance(limits, list) else limits)


def observe(
    model: MedMamba | str | os.PathLike,
    data: str | os.PathLike | ImageDataset,
    split: str | None = "val",
    *,
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    frame: int | None = None,
    window: tuple[float, float] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Observed:
    """Predicts the images of a split, on the device of the model and in float32.

    Args:
        model, data, split, dataset, classes, patient_pattern, frame, window, progress: as in `evaluate_model`.
        batch_size: images per forward pass; None: found by itself.

    Raises:
        DatasetError, PretrainedError, ValueError: as `evaluate_model`.
        NotFiniteError: the model returned NaN or infinity for some images.
    """
    network: Any = model if isinstance(model, MedMamba) else MedMamba.from_pretrained(model)
    config = in_force(network).config
    if not config.num_classes:
        raise ValueError("this model has no classifier: give it one with model.reset_classifier(num_classes)")
    index = data
    if not isinstance(index, ImageDataset):
        options = {"dataset": dataset, "classes": classes, "patient_pattern": patient_pattern}
        index = read_as(open_dataset(index, **options, single_class=True), frame, window)  # type: ignore[arg-type]
    index = match_classes(index if split is None else index.split(split), config)
    logits, unusual = image_answers(network, index, network.patch_embed.proj.weight.device, batch_size, None, progress)
    said = logits.numpy()
    if len(bad := np.flatnonzero(~np.isfinite(said).all(axis=1))):
        reason = why_not_finite(network, logits[int(bad[0])])
        raise NotFiniteError(f"no prediction for {len(bad)} of {len(said)} images: {reason}")
    return Observed(
        said,
        np.asarray(index.labels),
        tuple(index.patients),
        None if unusual is None else unusual.numpy(),
        tuple(config.labels),
        config.task,
        float(config.calibration.get("temperature", 1.0)),
        index.name,
        split or "all",
        tuple(config.calibration.get("thresholds") or ()) or 0.5,
    )
