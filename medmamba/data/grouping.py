"""Patients from folders below the class folders, or from a column of a CSV file."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..utils.names import shown
from .csv_text import read_table
from .dataset import DatasetError, ImageDataset
from .metadata import IMAGE_COLUMNS, rows_of_images

FOLDER = "folder"
"""The rule by which the folder below the class folder is the patient."""


def with_patients(dataset: ImageDataset, rule: str) -> ImageDataset:
    """Returns a dataset with the patient of each image, so that splits keep them together.

    Args:
        dataset: images of files; patients that it has are replaced.
        rule: "folder": the folder below the class folder, as in `class/patient/image.png`; the same name below
            several classes is one patient. Or "FILE.csv:COLUMN": a column of a CSV file with a row for each image.

    Raises:
        DatasetError: the rule finds no patient, or there is no such file or column.
    """
    found = _by_folder(dataset) if rule == FOLDER else _by_column(dataset, *_file_and_column(rule))
    without = sum(patient is None for patient in found)
    if without == len(found):
        where = "no image lies in a folder below its class folder" if rule == FOLDER else "the column is empty"
        raise DatasetError(f"{dataset.name}: patients by {rule!r} finds none: {where}")
    count = len({patient for patient in found if patient is not None})
    note = f"patients by {rule if rule == FOLDER else PurePosixPath(rule).name}: {count}"
    note += f"; {without} images without one count as a patient each" if without else ""
    records = [dataclasses.replace(r, patient=p) for r, p in zip(dataset.records, found, strict=True)]
    return dataset.with_records(records).with_notes(note)


def table_columns(path: str | os.PathLike) -> list[str]:
    """Returns the columns of a CSV file.

    Raises:
        DatasetError: it cannot be read as one.
    """
    return read_table(Path(path), IMAGE_COLUMNS).header


def _by_folder(dataset: ImageDataset) -> list[str | None]:
    parts = [PurePosixPath(_source(dataset, r.source)).parts[:-1] for r in dataset.records]
    levels = zip(*parts, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    first = shared + 1 + any(dataset.splits)  # after the folders of all, a split and the class
    return [part[first] if len(part) > first else None for part in parts]


def _by_column(dataset: ImageDataset, path: Path, column: str) -> list[str | None]:
    table = read_table(path, IMAGE_COLUMNS)
    name = next((known for known in table.header if known.lower() == column.lower()), None)
    if name is None:
        raise DatasetError(f"{path.name}: no column {shown(column)}; the columns are {', '.join(table.header)}")
    rows, _ = rows_of_images(table, dataset, path)
    return [(row[name].strip() or None) if row else None for row in rows]


def _file_and_column(rule: str) -> tuple[Path, str]:
    file, colon, column = rule.rpartition(":")
    if not colon or not column or not Path(file).is_file():
        raise DatasetError(f"patients={rule!r}: give {FOLDER!r}, or a file and a column as in patients.csv:patient_id")
    return Path(file), column


def _source(dataset: ImageDataset, source: object) -> str:
    if not isinstance(source, str):
        raise DatasetError(f"{dataset.name} holds no file names, so that no folder tells a patient")
    return source.replace(os.sep, "/")


def examples(dataset: ImageDataset, count: int = 5) -> Sequence[tuple[str, str | None]]:
    """Returns the names of some images, spread over the dataset, with their patients, to show what a rule matches."""
    step = max(1, len(dataset) // count)
    chosen = dataset.records[::step][:count]
    return [(PurePosixPath(str(r.source).replace(os.sep, "/")).name, r.patient) for r in chosen]
