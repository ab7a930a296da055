"""Drift: whether new images differ from those that a model was validated on.

Four questions, each with a test against what was stored when the model was trained, and Holm's correction over them:

- Are more images unusual? The share of flagged images against that of the validation images (Fisher's exact test), and
  the distribution of the score behind the flag (Kolmogorov and Smirnov).
- Do the features differ? The mean of each pooled feature against that of the validation images (Welch), with Holm's
  correction over the features.
- Does the model answer differently? The predicted classes against those for the images it was tested on (chi-squared),
  a sign of another prevalence, or of another kind of image (Lipton et al. 2018, arXiv:1802.03916).
- If labels are there: are the probabilities right? Mean confidence against accuracy (z-test, calibration in the large).

In a large sample a small drift is significant, in a small one a large drift is not: sizes are reported beside the
tests. Rabanser et al. 2019 (arXiv:1810.11953) compare such tests.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import open_dataset
from ..imaging.load import ImageError, find_images
from ..inference.fitted import in_force
from ..inference.ood import Reference, Unusual
from ..inference.ood_fit import sample
from ..inference.predict import Failure, NotFinite, NotFiniteError, iter_predict
from ..inference.signature import signatures
from ..metrics import Evaluation, evaluate
from ..metrics.calibration import to_probabilities
from ..metrics.multiplicity import holm
from ..metrics.result import plain
from ..utils.extras import require
from .classes import match_classes

DRIFT_NAME = "drift.json"
FEWEST = 10
"""The fewest images that are compared."""


class DriftError(ValueError):
    """Images that cannot be compared with what a model was validated on; the message says what is missing."""


@dataclass(frozen=True)
class DriftTest:
    """One question to the images.

    Attributes:
        name: what is compared.
        reference, found: its value for the reference images and for the new ones, in words.
        p: of the test; NaN if it could not be made.
        corrected: by Holm's method over all tests.
        note: why it could not be made, or how to read it.
    """

    name: str
    reference: str
    found: str
    p: float
    corrected: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class Drift:
    """Result of `detect_drift`.

    Attributes:
        model, data: names.
        n_images: number of new images.
        failures: file and reason of images that could not be read.
        tests: in the order of the module's description.
        alpha: level of the corrected tests.
        shifted: number of features whose mean differs after correction, of how many, and the largest difference in
            standard deviations; None without stored statistics.
        prevalence: by class: share among the predictions for the reference images, and among the new ones.
        evaluation: metrics, if the images have labels.
        scores, reference_scores: out-of-distribution scores of the new and of the reference images, ascending; empty
            where there are none.
        notes: caveats.
    """

    model: str
    data: str
    n_images: int
    failures: tuple[tuple[str, str], ...]
    tests: tuple[DriftTest, ...]
    alpha: float
    shifted: tuple[int, int, float] | None
    prevalence: dict[str, tuple[float, float]]
    evaluation: Evaluation | None = None
    scores: tuple[float, ...] = ()
    reference_scores: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def drifted(self) -> list[DriftTest]:
        """Tests that find a difference."""
        return [test for test in self.tests if test.corrected <= self.alpha]

    def summary(self) -> str:
        """Returns the outcome in words."""
        made = [test for test in self.tests if not math.isnan(test.p)]
        if not made:
            return "Nothing could be tested, since the model folder holds no statistics to compare with."
        how = f"{len(made)} tests, corrected by Holm's method at {self.alpha:g}"
        if not self.drifted:
            return f"No difference was found ({how}). This does not show that there is none."
        return f"These images differ from the reference images in: {', '.join(t.name for t in self.drifted)} ({how})."

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        data = {**asdict(replace(self, evaluation=None)), "summary": self.summary()}
        data["evaluation"] = self.evaluation.to_dict() if self.evaluation else None
        return plain(data)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of the table of tests."""
        header = ["Compared", "Reference images", "New images", "p", "p, corrected"]
        rows = []
        for test in self.tests:
            p = ["not tested", test.note] if math.isnan(test.p) else [_p_text(test.p), _p_text(test.corrected)]
            rows.append([test.name, test.reference, test.found, *p])
        return header, rows

    def to_markdown(self) -> str:
        """Returns the outcome and the tests as text."""
        from ..metrics.result import table

        lines = [f"{self.n_images} images. {self.summary()}", "", *table(*self.rows()), ""]
        if self.prevalence:
            shares = [[name, f"{a:.1%}", f"{b:.1%}"] for name, (a, b) in self.prevalence.items()]
            lines += table(["Predicted class", "Reference images", "New images"], shares)
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `drift.json` into a folder and returns its path."""
        from ..utils.files import write_text

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return write_text(folder / DRIFT_NAME, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def _p_text(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def detect_drift(
    model: Any,
    data: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    predicted: Sequence[int] | None = None,
    labelled: bool = False,
    reference: str | os.PathLike | None = None,
    images: int | None = None,
    alpha: float = 0.05,
    batch_size: int = 16,
    name: str = "",
    progress: Any = iter,
) -> Drift:
    """Compares images with those that a model was validated on.

    Args:
        model: a `MedMamba`. Its detector (`model.unusual`) holds the statistics of the validation images.
        data: files, folders or globs of images; with `labelled`, a dataset as for `evaluate_model`.
        predicted: how often the model predicted each class on images it was tested on `(K,)`, see
            `predicted_counts`; None: prevalence is not tested.
        labelled: the images have labels, so that the metrics are computed too.
        reference: images to compare with, such as the validation images, instead of the stored statistics.
        images: draws at most so many of either set with a fixed seed; None: all.
        alpha: level of the corrected tests.
        batch_size: images per forward pass.
        name: of the model, for the report.
        progress: wraps the iteration over the images.

    Raises:
        DriftError: fewer than ten images that can be read.
        DatasetError: labels that are not the model's.
    """
    require("scipy", "drift", "train")
    config, detector, notes = in_force(model)
    labels: NDArray[np.int64] | None = None
    read: Callable[[Any], Any] = _same
    patients: list[str | None] | None = None
    if labelled:
        index = match_classes(open_dataset(data, single_class=True), config)  # type: ignore[arg-type]
        index = index if images is None else index.subset(sample(len(index), images))
        items: list[Any] = [(record.source, record) for record in index.records]
        read, labels, patients = index.reader.read, index.labels, index.patients
        title = index.name
    else:
        given = [data] if isinstance(data, str | os.PathLike) else list(data)
        paths = find_images(given).paths
        paths = paths if images is None else [paths[i] for i in sample(len(paths), images)]
        items, title = [(path, path) for path in paths], ", ".join(map(str, given))
    seen = _look(model, items, read, batch_size, progress)
    if len(seen.logits) < FEWEST:
        raise DriftError(f"{title}: {len(seen.logits)} images can be read; at least {FEWEST} are needed to compare")
    stored, counts = detector.reference if detector else None, None if predicted is None else np.asarray(predicted)
    if reference is not None:
        others = find_images([reference]).paths
        others = others if images is None else [others[i] for i in sample(len(others), images)]
        known = _look(model, [(path, path) for path in others], _same, batch_size, progress)
        if len(known.logits) < FEWEST:
            raise DriftError(f"{reference}: {len(known.logits)} images can be read; at least {FEWEST} are needed")
        counts = _counts(known.logits, config.task, len(config.labels))
        scores = np.sort(detector.score(known.signatures)) if detector else np.zeros(0)
        stored = Reference(len(known.logits), known.features.mean(0), known.features.std(0, ddof=1), scores)
    tests = [*_unusual_tests(detector, stored, seen.signatures)]
    found, shifted = _feature_test(stored, seen.features)
    tests.append(found)
    found, prevalence = _prevalence_test(counts, _counts(seen.logits, config.task, len(config.labels)), config.labels)
    tests.append(found)
    evaluation = None
    if labels is not None:
        known_patients = None if patients is None or not any(patients) else [patients[i] for i in seen.rows]
        p = to_probabilities(seen.logits, config.task, float(config.calibration.get("temperature", 1.0)))
        evaluation = evaluate(labels[seen.rows], p, config.labels, task=config.task, patients=known_patients)
        tests.append(_calibration_test(p, labels[seen.rows], config.task, evaluation))
    corrected = holm([test.p for test in tests])
    return Drift(
        model=name or config.architecture,
        data=title,
        n_images=len(seen.logits),
        failures=tuple(seen.failures),
        tests=tuple(replace(test, corrected=float(c)) for test, c in zip(tests, corrected, strict=True)),
        alpha=alpha,
        shifted=shifted,
        prevalence=prevalence,
        evaluation=evaluation,
        scores=tuple(np.sort(detector.score(seen.signatures)).tolist()) if detector else (),
        reference_scores=tuple(stored.scores.tolist()) if stored else (),
        notes=tuple(notes),
    )


def _same(path: Any) -> Any:
    return path


def predicted_counts(evaluation: Evaluation) -> list[int]:
    """Returns how often each class was predicted in an evaluation, such as that in a model's `results.json`."""
    table = np.array(evaluation.confusion)
    return (table.sum(axis=0) if evaluation.task != "multilabel" else table[:, :, 1].sum(axis=1)).tolist()


@dataclass
class _Seen:
    signatures: NDArray[np.float32]
    features: NDArray[np.float32]  # the last columns of the signatures
    logits: NDArray[np.float64]
    rows: list[int]
    failures: list[tuple[str, str]]


def _look(model: Any, items: Sequence[tuple[Any, Any]], read: Any, batch_size: int, progress: Any) -> _Seen:
    """Predicts the images; features, logits and rows are those of the images that could be read."""
    tried: list[int] = []
    failures: list[tuple[str, str]] = []

    def readable() -> Iterator[Any]:
        for row in progress(range(len(items))):
            try:
                image = read(items[row][1])
            except ImageError as error:
                failures.append((str(items[row][0]), str(error)))
                continue
            tried.append(row)
            yield image

    rows, logits = [], []
    with signatures() as collected:
        for place, result in enumerate(iter_predict(model, readable(), batch_size=batch_size)):
            if isinstance(result, NotFinite):
                raise NotFiniteError(result.error)
            if isinstance(result, Failure):
                failures.append((str(items[tried[place]][0]), result.error))
            else:
                rows.append(tried[place])
                logits.append(result.logits)
    found = collected.array()
    return _Seen(found, found[:, -model.config.dims[-1] :], np.array(logits), rows, failures)


def _counts(logits: NDArray[np.float64], task: str, k: int) -> NDArray[np.int64]:
    if task == "multilabel":
        return (logits > 0).sum(axis=0)
    return np.bincount(logits.argmax(axis=1), minlength=k)


def _unusual_tests(detector: Unusual | None, stored: Reference | None, seen: np.ndarray) -> list[DriftTest]:
    flag, distance = "images flagged as unusual", "distance to the training images"
    if detector is None:
        note = "the model has no detector: see learn_unusual"
        return [DriftTest(flag, "", "", math.nan, note=note), DriftTest(distance, "", "", math.nan, note=note)]
    from scipy import stats

    flagged, n = int(detector.is_unusual(seen).sum()), len(seen)
    found = f"{flagged} of {n} ({flagged / n:.1%})"
    if stored is None:
        p = stats.binomtest(flagged, n, 1 - detector.coverage, alternative="greater").pvalue
        expected = f"{1 - detector.coverage:.0%} by the threshold"
        note = "no stored statistics of validation images: give reference=... or fit the detector again"
        return [DriftTest(flag, expected, found, float(p)), DriftTest(distance, "", "", math.nan, note=note)]
    before = int((stored.scores > detector.threshold).sum())
    table = [[flagged, n - flagged], [before, stored.n - before]]
    p = stats.fisher_exact(table, alternative="greater").pvalue
    scores = detector.score(seen)
    ks = stats.ks_2samp(scores, stored.scores)
    return [
        DriftTest(flag, f"{before} of {stored.n} ({before / stored.n:.1%})", found, float(p)),
        DriftTest(
            distance,
            f"median {np.median(stored.scores):.2f}",
            f"median {np.median(scores):.2f}, largest gap between the distributions {ks.statistic:.2f}",
            float(ks.pvalue),
        ),
    ]


def _feature_test(stored: Reference | None, features: np.ndarray) -> tuple[DriftTest, tuple[int, int, float] | None]:
    name = "means of the features"
    if stored is None:
        note = "no stored statistics of validation images: give reference=... or fit the detector again"
        return DriftTest(name, "", "", math.nan, note=note), None
    from scipy import stats

    mean, std = features.mean(0, dtype=np.float64), features.std(0, ddof=1, dtype=np.float64)
    usable = (std > 0) | (stored.std > 0)
    result = stats.ttest_ind_from_stats(
        mean[usable], std[usable], len(features), stored.mean[usable], stored.std[usable], stored.n, equal_var=False
    )
    corrected = holm(result.pvalue)
    spread = np.sqrt((std[usable] ** 2 + stored.std[usable] ** 2) / 2)
    shift = np.abs(mean[usable] - stored.mean[usable]) / spread
    number, largest = int((corrected <= 0.05).sum()), float(shift.max())
    found = f"{number} of {usable.sum()} features differ, by at most {largest:.2f} standard deviations"
    test = DriftTest(name, f"{stored.n} images", found, float(np.nanmin(corrected)))
    return test, (number, int(usable.sum()), largest)


def _prevalence_test(
    before: NDArray[np.int64] | None, now: NDArray[np.int64], classes: Sequence[str]
) -> tuple[DriftTest, dict[str, tuple[float, float]]]:
    name = "predicted classes"
    if before is None or before.sum() == 0:
        note = "no results.json with the model: give reference=..."
        return DriftTest(name, "", "", math.nan, note=note), {}
    from scipy import stats

    shares = np.stack([before / before.sum(), now / max(now.sum(), 1)])
    prevalence = {label: (float(shares[0, i]), float(shares[1, i])) for i, label in enumerate(classes)}
    # The approximation needs five expected images in each cell: rare classes are taken together.
    table = np.stack([before, now])
    rare = table.sum(axis=0) * table.sum(axis=1).min() / table.sum() < 5
    if rare.any():
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    p = float(stats.chi2_contingency(table, correction=False).pvalue) if table.shape[1] > 1 else math.nan
    most = int(np.abs(shares[1] - shares[0]).argmax())
    texts = [f"{classes[most]} {share:.1%}" for share in shares[:, most]]
    note = "" if table.shape[1] > 1 else "a single class was predicted for nearly all images"
    return DriftTest(name, texts[0], f"{texts[1]} (the largest change)", p, note=note), prevalence


def _calibration_test(p: np.ndarray, labels: np.ndarray, task: str, evaluation: Evaluation) -> DriftTest:
    if task == "multilabel":
        said, right = p.mean(axis=1), labels.mean(axis=1)
        variance = float((p * (1 - p)).sum()) / p.shape[1] ** 2
    else:
        said, right = p.max(axis=1), (p.argmax(axis=1) == labels).astype(float)
        variance = float((said * (1 - said)).sum())
    z = float((said - right).sum()) / math.sqrt(max(variance, 1e-12))
    value = math.erfc(abs(z) / math.sqrt(2))
    found = f"confidence {said.mean():.3f}, right {right.mean():.3f}, ECE {evaluation.overall['ece']}"
    return DriftTest("calibration", "confidence equals accuracy", found, value)
