"""Leakage checks: patients and identical images in more than one split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..imaging.load import MedicalImage
from .dataset import DatasetError, ImageDataset

_EXAMPLES = 5


class LeakageError(DatasetError):
    """Train, val and test are not independent. The message lists examples; `report` holds all of them."""

    def __init__(self, message: str, report: LeakageReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class LeakageReport:
    """Findings of `find_leakage`.

    Attributes:
        patients: patients with images in several splits, with those splits.
        duplicates: groups of indices of images with identical pixels in several splits.
        repeats: the same within one split: harmless for the metrics, but not independent samples.
        conflicts: groups of identical images whose labels differ, in one split or in several.
    """

    patients: tuple[tuple[str, tuple[str, ...]], ...] = ()
    duplicates: tuple[tuple[int, ...], ...] = ()
    repeats: tuple[tuple[int, ...], ...] = ()
    conflicts: tuple[tuple[int, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.patients or self.duplicates)


def find_leakage(dataset: ImageDataset, *, duplicates: bool = True, workers: int | None = None) -> LeakageReport:
    """Looks for patients and identical images across splits. Raises nothing; see `check_leakage`.

    Args:
        duplicates: compare pixels too, which decodes every image once (10,000 of 200 x 150: 7 s on two cores).
        workers: threads that decode; by default as many as the machine has cores.
    """
    held: dict[str, set[str]] = {}
    for record in dataset.records:
        if record.patient is not None and record.split is not None:
            held.setdefault(record.patient, set()).add(record.split)
    patients = tuple((name, tuple(sorted(splits))) for name, splits in sorted(held.items()) if len(splits) > 1)
    if not duplicates:
        return LeakageReport(patients)
    same: dict[bytes, list[int]] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for index, digest in enumerate(pool.map(lambda i: pixel_hash(dataset.image(i)), range(len(dataset)))):
            same.setdefault(digest, []).append(index)
    groups = [tuple(group) for group in same.values() if len(group) > 1]
    spread = {group: len({dataset.records[i].split for i in group}) > 1 for group in groups}
    return LeakageReport(
        patients,
        tuple(group for group in groups if spread[group]),
        tuple(group for group in groups if not spread[group]),
        tuple(group for group in groups if len({dataset.records[i].label for i in group}) > 1),
    )


def check_leakage(
    dataset: ImageDataset, *, allow: Collection[str] = (), duplicates: bool = True, workers: int | None = None
) -> LeakageReport:
    """Raises if splits share patients or identical images, or if identical images have different labels.

    Args:
        allow: problems to accept: "patients", "duplicates" (in several splits; some published splits leak, which must
            be reported with the results; identical images are then not searched for), "conflicts" (labels that
            differ within one split).

    Raises:
        LeakageError: with examples and the way out.
    """
    unknown = set(allow) - {"patients", "duplicates", "conflicts"}
    if unknown:
        raise DatasetError(f"allow takes 'patients', 'duplicates' and 'conflicts', not {', '.join(sorted(unknown))}")
    wanted = duplicates and "duplicates" not in allow
    report = find_leakage(dataset, duplicates=wanted, workers=workers)
    problems = []
    if report.patients and "patients" not in allow:
        examples = ", ".join(f"{name} ({' and '.join(splits)})" for name, splits in report.patients[:_EXAMPLES])
        problems.append(f"{len(report.patients)} patients have images in more than one split: {examples}")
    if report.duplicates:
        examples = "; ".join(
            " = ".join(f"{dataset.records[i].source} ({dataset.records[i].split})" for i in group[:3])
            for group in report.duplicates[:_EXAMPLES]
        )
        problems.append(f"{len(report.duplicates)} images are in more than one split: {examples}")
    advice = (
        "Results on such a test set are too optimistic. Split again with make_splits (it keeps patients together), "
        "remove the duplicates, or pass allow= (allow_leakage= of train, --allow-leakage) and report that"
    )
    inside = [group for group in report.conflicts if group not in report.duplicates]
    if inside and "conflicts" not in allow:
        if problems:
            problems.append(advice)
        examples = "; ".join(" = ".join(_labelled(dataset, i) for i in group[:3]) for group in inside[:_EXAMPLES])
        problems.append(f"{len(inside)} groups of identical images in one split have contradicting labels: {examples}")
        advice = (
            "Choose one label, remove the others, or accept them with 'conflicts' in allow= (allow_leakage= of "
            "train, --allow-leakage)"
        )
    if problems:
        raise LeakageError(f"{dataset.name}: {'. '.join([*problems, advice])}", report)
    return report


def _labelled(dataset: ImageDataset, index: int) -> str:
    """Returns an image with its labels, for a message."""
    record = dataset.records[index]
    labels = (record.label,) if isinstance(record.label, int) else [i for i, y in enumerate(record.label) if y]
    return f"{record.source} ({', '.join(dataset.classes[label] for label in labels) or 'none'})"


def pixel_hash(image: MedicalImage) -> bytes:
    """Returns a digest of size and pixels at 16 bits, whatever the file format; grey stored as RGB counts as grey."""
    pixels = image.pixels
    if pixels.shape[2] == 3 and (pixels[..., :1] == pixels).all():
        pixels = pixels[..., :1]
    values = np.rint(pixels * 65535).astype(np.uint16)
    return hashlib.blake2b(values.tobytes(), digest_size=16, salt=repr(values.shape).encode()[:16]).digest()
