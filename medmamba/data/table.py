"""Datasets described by a CSV file: path and label of each image, and where known its patient and split."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from ..registry import DatasetEntry
from .dataset import DatasetError, ImageDataset, Record, split_name
from .files import FolderReader, compile_pattern, patient_of
from .labels import resolve_classes

LABEL_SEPARATOR = ";"

_COLUMNS = {
    "path": ("path", "image", "image_path", "file", "filename", "file_name"),
    "label": ("label", "labels", "class", "target", "diagnosis", "diagnostic"),
    "patient": ("patient", "patient_id", "patientid", "group", "subject", "subject_id", "lesion_id"),
    "split": ("split", "set", "subset", "fold"),
}


def open_csv(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
) -> ImageDataset:
    """Index the images that a CSV file lists. The first line names the columns.

    Columns: `path` (relative to `root`, by default the folder of the CSV file), `label`, and optionally `patient` and
    `split`. Several labels of one image are separated by `;`: if any row has them the task is multi-label, and an
    empty label is then an image that shows none. Instead of `label` there can be one column of 0 and 1 per class.
    See `open_dataset` for the other arguments.

    Raises:
        DatasetError: a column or file that is missing, a label or split that cannot be understood, with its line.
    """
    path = Path(path)
    header, rows = _read(path)
    columns = _columns(header, path)
    label_columns = [name for name in header if name not in columns.values()]
    if "label" in columns:
        texts = [[part.strip() for part in row[columns["label"]].split(LABEL_SEPARATOR)] for row in rows]
        multilabel = any(len(parts) > 1 for parts in texts)
        found = [[part for part in parts if part] for parts in texts]
    elif label_columns:
        multilabel = True
        found = [_marked(row, label_columns, line, path) for line, row in enumerate(rows, 2)]
        classes = classes or (None if entry else label_columns)
    else:
        raise DatasetError(f"{path}: no column 'label' (columns: {', '.join(header)}), nor one column per class")
    where = str(path)
    names, index = resolve_classes((part for parts in found for part in parts), entry, classes, class_order, where)
    pattern = compile_pattern(patient_pattern)
    records = []
    for line, (row, parts) in enumerate(zip(rows, found, strict=True), 2):
        numbers = {index[part] for part in parts}
        if not multilabel and not numbers:
            raise DatasetError(f"{path}, line {line}: no label")
        label = tuple(int(i in numbers) for i in range(len(names))) if multilabel else numbers.pop()
        image = row[columns["path"]].strip()
        patient = row[columns["patient"]].strip() if "patient" in columns else patient_of(image, pattern)
        records.append(Record(image, label, _split(row, columns, line, path), patient or None))
    folder = Path(root) if root is not None else path.parent
    _check_files(records, folder, path)
    return ImageDataset(
        records, names, FolderReader(folder), "multilabel" if multilabel else "multiclass", None, path.name
    )


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = next((mark for mark in "\t,;" if mark in first), ",")
            reader = csv.DictReader(stream, delimiter=delimiter, restval="", strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DatasetError(f"{path}: cannot be read as a CSV file in UTF-8 ({exc})") from exc
    if not rows:
        raise DatasetError(
            f"{path}: no rows; the first line names the columns (path,label), one image per line follows"
        )
    long = next((line for line, row in enumerate(rows, 2) if None in row), None)
    if long:
        raise DatasetError(f"{path}, line {long}: more fields than the {len(header)} columns; quote text with commas")
    return header, rows


def _columns(header: Sequence[str], path: Path) -> dict[str, str]:
    columns = {}
    for role, names in _COLUMNS.items():
        match = next((name for name in header if name.lower() in names), None)
        if match is not None:
            columns[role] = match
    if "path" not in columns:
        raise DatasetError(f"{path}: no column 'path' (columns: {', '.join(header) or 'none'})")
    return columns


def _marked(row: dict[str, str], columns: Sequence[str], line: int, path: Path) -> list[str]:
    marked = []
    for name in columns:
        value = row[name].strip()
        if value not in ("0", "1", "0.0", "1.0"):
            raise DatasetError(f"{path}, line {line}: column {name!r} holds {value!r}; columns of classes hold 0 or 1")
        if value.startswith("1"):
            marked.append(name)
    return marked


def _split(row: dict[str, str], columns: dict[str, str], line: int, path: Path) -> str | None:
    text = row[columns["split"]].strip() if "split" in columns else ""
    split = split_name(text)
    if text and split is None:
        raise DatasetError(f"{path}, line {line}: split {text!r} is not train, val or test")
    return split


def _check_files(records: Sequence[Record], folder: Path, path: Path) -> None:
    missing = [str(record.source) for record in records if not (folder / str(record.source)).is_file()]
    if missing:
        raise DatasetError(
            f"{path}: {len(missing)} of {len(records)} images do not exist below {folder}, such as "
            f"{', '.join(missing[:3])}; paths are relative to the CSV file unless root= says otherwise"
        )
    if len({record.source for record in records}) != len(records):
        raise DatasetError(f"{path}: the same path stands in it more than once; separate several labels by ';'")
