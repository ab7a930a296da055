"""Datasets described by a CSV file: path and label of each image, and where known its patient and split."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..utils.names import AmbiguousNameError, alike, shown, whole_number, words
from .archive import member_paths
from .cells import LABEL_SEPARATOR, parse_labels
from .csv_text import Table, read_table
from .dataset import DatasetError, ImageDataset, Record, split_name
from .files import FolderReader, ZipReader, check_members
from .labels import is_missing, notes_on_names, resolve_classes
from .locate import locate
from .patients import patients_by_name
from .registry import DatasetEntry

__all__ = ["LABEL_SEPARATOR", "open_csv"]

# Names that a column may have, in lower case. Where several are there, the first of these is taken.
COLUMNS = {
    "path": ("path", "image_path", "file", "filename", "file_name", "image"),
    "label": ("label", "labels", "class", "target", "diagnosis", "diagnostic"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "group", "lesion_id"),
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
    by_name: bool = False,
) -> ImageDataset:
    """Indexs the images that a CSV file lists. The first line names the columns.

    Columns: `path` (relative to `root`, by default the folder of the CSV file), `label`, and optionally `patient` and
    `split`. `root` can also be a zip file, whose images are read without unpacking it. With `by_name`, and in a zip
    file, a path that does not exist is found by its file name, if only one file has it. Several labels of one image
    are separated by `;`: if any row has them the task is multi-label, and an empty label is then an image that shows
    none. Instead of `label` there can be one column of 0 and 1 per class. Delimiters are commas, semicolons, tabs or
    bars. See `open_dataset` for the other arguments.

    Raises:
        DatasetError: a column or file that is missing, a row without a label ("nan" and its like included), labels that
            contradict each other, a label or split that cannot be understood, with its line.
    """
    path = Path(path)
    where = str(path)
    table = read_table(path, COLUMNS["path"])
    columns, notes = _columns(table.header, path)
    label_columns = [name for name in table.header if name not in columns.values()]
    if "label" in columns:
        cells = [(line, row[columns["label"]]) for line, row in table.rows]
        found, multilabel, said = parse_labels(cells, known_class(entry, classes), where)
        notes += said
    elif label_columns:
        multilabel = True
        found = [_marked(row, label_columns, line, path) for line, row in table.rows]
        classes = classes or (None if entry else label_columns)
    else:
        raise DatasetError(f"{path}: no column 'label' (columns: {', '.join(table.header)}), nor one column per class")
    names, index = resolve_classes((part for parts in found for part in parts), entry, classes, class_order, where)
    notes += notes_on_names(part for parts in found for part in parts)
    folder = Path(root) if root is not None else path.parent
    reader, members = _place(folder, by_name)
    images, said = locate([(line, row[columns["path"]].strip()) for line, row in table.rows], folder, where, members)
    notes += said
    _check_unique(images, found, table, folder, path)
    patients, said = _patients(table, columns, images, patient_pattern, entry, where)
    notes += said
    splits = [_split(row, columns, line, path) for line, row in table.rows]
    if any(splits) and None in splits:
        notes.append(f"{splits.count(None)} of {len(splits)} rows have no split and are in none")
    records = []
    for image, parts, patient, split in zip(images, found, patients, splits, strict=True):
        numbers = {index[part] for part in parts}
        label = tuple(int(i in numbers) for i in range(len(names))) if multilabel else numbers.pop()
        records.append(Record(image, label, split, patient))
    task = "multilabel" if multilabel else "multiclass"
    return ImageDataset(records, names, reader, task, None, path.name, notes)


def _place(folder: Path, by_name: bool) -> tuple[FolderReader | ZipReader, list[str] | None]:
    """Returns the reader of a folder or zip file and, where images are found by name, the paths of its files."""
    if not folder.is_file():
        inside = (file for file in folder.rglob("*") if file.is_file()) if by_name else ()
        return FolderReader(folder), [file.relative_to(folder).as_posix() for file in inside] if by_name else None
    try:
        with zipfile.ZipFile(folder) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as exc:
        raise DatasetError(f"{folder}: not a complete zip file ({exc}); download it again") from exc
    check_members(infos, str(folder))
    return ZipReader(folder), [path for path in member_paths(infos) if not path.endswith("/")]


def roles(header: Sequence[str]) -> dict[str, str]:
    """Returns the column of each role: "path", "label", "patient" and "split", as far as there is one."""
    by_name = {name.lower(): name for name in header}
    found = {role: next((by_name[name] for name in names if name in by_name), None) for role, names in COLUMNS.items()}
    return {role: name for role, name in found.items() if name is not None}


def _columns(header: Sequence[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the column of each role, and notes where several columns qualify."""
    columns: dict[str, str] = {}
    notes = []
    by_name = {name.lower(): name for name in header}
    for role, names in COLUMNS.items():
        matches = [by_name[name] for name in names if name in by_name]
        if matches:
            columns[role] = matches[0]
        if len(matches) > 1:
            notes.append(f"column {matches[0]!r} is read as the {role}, not {shown(*matches[1:])}")
    if "path" not in columns:
        raise DatasetError(f"{path}: no column 'path' (columns: {', '.join(header) or 'none'})")
    return columns, notes


def known_class(entry: DatasetEntry | None, classes: Sequence[str] | None) -> Callable[[str], bool]:
    """Returns a predicate for texts that are a given class or one in the registry."""

    def is_class(text: str) -> bool:
        if classes is not None:
            return text in classes
        try:
            return entry is not None and entry.class_index(text) is not None
        except AmbiguousNameError:
            return True

    return is_class


def _marked(row: dict[str, str], columns: Sequence[str], line: int, path: Path) -> list[str]:
    marked = []
    for name in columns:
        value = row[name].strip()
        if value not in ("0", "1", "0.0", "1.0"):
            raise DatasetError(f"{path}, line {line}: column {name!r} holds {value!r}; columns of classes hold 0 or 1")
        if value.startswith("1"):
            marked.append(name)
    return marked


def _patients(
    table: Table,
    columns: dict[str, str],
    images: Sequence[str],
    pattern: str | None,
    entry: DatasetEntry | None,
    where: str,
) -> tuple[list[str | None], list[str]]:
    if "patient" not in columns:
        return patients_by_name(images, pattern, entry, where)
    if pattern is not None:
        raise DatasetError(
            f"{where} has a column of patients, {columns['patient']!r}, so that patient_pattern would have no effect; "
            "leave it out, or remove the column"
        )
    texts = [row[columns["patient"]].strip() for _, row in table.rows]
    patients = [None if is_missing(text) else text for text in texts]
    known = [patient for patient in patients if patient is not None]
    notes = []
    spelt = Counter(text for text in texts if text and is_missing(text))
    if spelt:
        rows = ", ".join(f"{count} {text!r}" for text, count in spelt.items())
        notes.append(f"{rows} in column {columns['patient']!r} mean no known patient: a patient each")
    for same in [*alike(known, words), *alike(known, whole_number)]:
        notes.append(f"patients {shown(*same)} count as {len(same)}, though they may be one")
        break
    return patients, notes


def _split(row: dict[str, str], columns: dict[str, str], line: int, path: Path) -> str | None:
    text = row[columns["split"]].strip() if "split" in columns else ""
    split = split_name(text)
    if not is_missing(text) and split is None:
        raise DatasetError(f"{path}, line {line}: split {text!r} is not train, val or test")
    return split


def _check_unique(
    images: Sequence[str], labels: Sequence[Sequence[str]], table: Table, folder: Path, path: Path
) -> None:
    """Refuses a file that several rows name, in whatever spelling of its path."""
    seen: dict[str, int] = {}
    for number, image in enumerate(images):
        other = seen.setdefault(os.path.normpath(os.path.join(folder, image)), number)
        if other == number:
            continue
        same = set(labels[number]) == set(labels[other])
        says = "with the same label" if same else f"as {shown(*labels[other])} and as {shown(*labels[number])}"
        several = f"decide for one, or separate several labels by {LABEL_SEPARATOR!r} in one row"
        advice = "remove one" if same else several
        raise DatasetError(
            f"{path}, lines {table.rows[other][0]} and {table.rows[number][0]}: the same image, {image!r}, is "
            f"listed more than once, {says}; {advice}"
        )
