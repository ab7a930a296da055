"""What a report is written from: a model, its folder, and what it makes of a split of a dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cards.facts import ModelFacts, read_facts
from ..cards.licences import LicenceError
from ..data import ImageDataset, open_dataset
from ..data.metadata import metadata_file
from ..evaluation import Scored, evaluate_model, match_classes
from ..evaluation.corruptions import Corruptions
from ..evaluation.review import Review, label_text, worst_first
from ..explain import compare
from ..explain.comparison import Comparison
from ..imaging.load import MedicalImage
from ..inference.fitted import in_force
from ..inference.signature import signatures
from ..metrics.calibration import to_probabilities
from ..model import MedMamba
from ..pretrained.sources import fetch
from ..utils.checksums import WEIGHTS_NAME, file_hash

METHODS = ("gradcam",)
"""Attribution methods that a report shows and checks by default; the checks of one take minutes on a CPU."""


@dataclass(frozen=True, eq=False)
class Study:
    """A model and what it makes of a split.

    Attributes:
        name: of the model, as given.
        weights: SHA-256 of the weights.
        model: in the state in which it was loaded.
        facts: what its folder records.
        dataset: all images of the data, of all splits.
        index: the evaluated images, with the model's classes.
        split: that was evaluated, "all" for all images.
        scored: logits and metrics.
        signatures: (N, S) of the evaluated images, see `inference.signature`.
        corruptions: errors on corrupted images, measured now or stored in the model folder.
        explained: explanations with checks of some images: title, comparison.
        external: the authors say that the data are of another source than the training data.
        notes: what does not hold for these weights.
    """

    name: str
    weights: str
    model: MedMamba
    facts: ModelFacts
    dataset: ImageDataset
    index: ImageDataset
    split: str
    scored: Scored
    signatures: np.ndarray = field(repr=False)
    corruptions: Corruptions | None = None
    explained: tuple[tuple[str, Comparison], ...] = ()
    external: bool = False
    notes: tuple[str, ...] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """Calibrated probabilities (N, K)."""
        e = self.scored.evaluation
        return to_probabilities(self.scored.logits, e.task, e.context["temperature"])

    def image(self, row: int) -> MedicalImage:
        """Reads an evaluated image."""
        return self.index.reader.read(self.index.records[row])


def make_study(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    split: str | None = "test",
    dataset: str | None = None,
    by: Sequence[str] = (),
    metadata: str | os.PathLike | None = None,
    cuts: Mapping[str, Sequence[float]] | None = None,
    corruptions: str | None = None,
    corruption_images: int | None = None,
    explain: int = 2,
    methods: Sequence[str] = METHODS,
    external: bool = False,
    patient_pattern: str | None = None,
    device: str = "auto",
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Study:
    """Evaluates a model on a split, once, and collects what a report says; see `write_report` for the arguments."""
    folder = fetch(model)
    network = MedMamba.from_pretrained(folder)
    held = in_force(network)
    opened = open_dataset(data, dataset=dataset, patient_pattern=patient_pattern, single_class=True)
    if by and metadata is None:
        metadata = metadata_file(data)
    index = match_classes(opened if split is None else opened.split(split), network.config)
    with signatures(len(index)) as seen:
        scored = evaluate_model(
            network,
            opened,
            split,
            by=by,
            metadata=metadata,
            cuts=cuts,
            corruptions=corruptions,
            corruption_images=corruption_images,
            device=device,
            resamples=resamples,
            seed=seed,
            progress=progress,
        )
    weights = file_hash(folder / WEIGHTS_NAME)
    facts = _facts(folder)
    study = Study(
        name=str(model),
        weights=weights,
        model=network,
        facts=facts,
        dataset=opened,
        index=index,
        split=split or "all",
        scored=scored,
        signatures=seen.array(),
        corruptions=scored.corruptions or facts.corruptions,
        external=external,
        notes=held.notes,
    )
    return dataclasses.replace(study, explained=_explanations(study, explain, methods, seed))


def _facts(folder: Path) -> ModelFacts:
    """Reads a model folder, also one whose terms of use are not recorded: a report publishes no weights."""
    try:
        return read_facts(folder)
    except LicenceError:
        return read_facts(folder, licence="other")


def study_of(found: Review, model: MedMamba, folder: Path, dataset: ImageDataset | None = None) -> Study:
    """Returns what a report is written from for images that `evaluation.review` has evaluated already.

    Args:
        found: the evaluation.
        model: that made it.
        folder: with its files.
        dataset: all images of the data; None: those that were evaluated.
    """
    facts = _facts(folder)
    return Study(
        name=found.model,
        weights=file_hash(folder / WEIGHTS_NAME),
        model=model,
        facts=facts,
        dataset=found.index if dataset is None else dataset,
        index=found.index,
        split=str(found.scored.evaluation.context["split"]),
        scored=found.scored,
        signatures=found.signatures,
        corruptions=facts.corruptions,
        external=True,
        notes=in_force(model).notes,
    )


def wrong_first(study: Study) -> np.ndarray:
    """Returns the rows of misclassified images, the most confident first; for several labels, the most wrong first."""
    return worst_first(study.probabilities, study.index.labels)


def _explanations(study: Study, count: int, methods: Sequence[str], seed: int) -> tuple[tuple[str, Comparison], ...]:
    """Explains the most confident error, and then images drawn from the others, each with all checks."""
    if count < 1:
        return ()
    wrong = wrong_first(study)
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(study.index)), wrong)
    rows = [*wrong[:1], *rng.permutation(others)][:count]
    found = []
    for row in rows:
        truth = true_classes(study, int(row))
        comparison = compare(study.model, study.image(int(row)), list(methods), metrics=None, seed=seed)
        first = comparison.explanations[0]
        kind = "most confident error" if row in wrong else "drawn at random among the correct ones"
        found.append((f"{kind}: true {truth}, predicted {first.label} ({first.probability:.0%})", comparison))
    return tuple(found)


def true_classes(study: Study, row: int) -> str:
    """Returns the true classes of an evaluated image in words."""
    return label_text(study.index.labels[row], study.scored.evaluation.classes)
