"""The dataset of the Fine-tune tab: what is in it, how it is divided, and which images are of one patient."""

from __future__ import annotations

from collections import Counter

from medmamba.data.grouping import examples

from ..advice import in_app
from ..html import NOTHING, Markup, bullets, callout, card, facts, with_detail
from ..jobs import Plan

UNKNOWN_PATIENTS = (
    "The split is by image. If a patient has several images, results will be too optimistic: say below how file names, "
    "folders or a CSV file tell the patient, or upload train, val and test folders that keep patients apart."
)
BY_NAME, BY_FOLDER, BY_COLUMN = "File names", "Folders in the class folders", "A column of a CSV file"
RULES = [BY_NAME, BY_FOLDER, BY_COLUMN]


def set_html(found: Plan) -> Markup:
    """Renders the contents and the split of a dataset."""
    index = found.index
    counts = zip(index.classes, index.class_counts, strict=True)
    classes = bullets((f"{name} · {count}" for name, count in counts), "mm-classes")
    sizes = ", ".join(f"{size} {split}" for split, size in index.split_sizes.items())
    rows: list[tuple[object, object]] = [
        (f"{len(index)} images, {len(index.classes)} classes", classes),
        ("Split", with_detail(sizes, how_divided(found))),
    ]
    if any(index.patients):
        rows.append(("Patients", matched_html(found)))
    if index.notes:
        rows.append(("Notes", bullets(in_app(note) for note in index.notes)))
    unknown = NOTHING
    if found.made and not any(index.patients):
        unknown = callout("warn", "Images of one patient may be in several splits", UNKNOWN_PATIENTS)
    return card(facts(rows) + unknown, found.data.name, css="mm-tight")


def matched_html(found: Plan) -> Markup:
    """Renders the number of patients, and which patient some of the file names belong to."""
    index = found.index
    groups = Counter(patient for patient in index.patients if patient is not None)
    without = sum(patient is None for patient in index.patients)
    said = f"{len(groups):,}, with up to {max(groups.values()):,} images each"
    said += f"; {without:,} images without one" if without else ""
    return with_detail(said, bullets(f"{name} → {patient or 'none'}" for name, patient in examples(index)))


def how_divided(found: Plan) -> str:
    """Describes the origin of the splits."""
    if found.val_taken:
        return "val taken from train, the rest as in the folders"
    if not found.made:
        return "as in the folders"
    if any(found.index.patients):
        return "random, with each group of images (patient, lesion) kept together"
    return "random within each class, by image, as patients are unknown"
