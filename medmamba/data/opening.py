"""`open_dataset`: from a path to an index, whatever the layout."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..imaging.find import reason_by_path
from ..utils.names import shown
from . import registry
from .dataset import DatasetError, ImageDataset, Transform
from .files import open_folder, open_zip
from .grouping import with_patients
from .hf_datasets import SCHEME, is_hf, open_hf
from .npz import open_npz
from .registry import DatasetEntry
from .table import open_csv
from .webdataset import is_shards, open_shards

_LAYOUTS = (
    "a folder (root/<class>/image or root/<split>/<class>/image), a .csv, a MedMNIST .npz, a .zip of a folder, "
    f"WebDataset .tar files or a Hugging Face dataset ({SCHEME}owner/name, or a local copy)"
)


def open_dataset(
    path: str | os.PathLike[str],
    split: str | None = None,
    *,
    dataset: str | DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
    patients: str | None = None,
    transform: Transform | None = None,
    single_class: bool = False,
) -> ImageDataset:
    """Indexs a collection of images; the reader is chosen by what `path` is.

    Args:
        path: folder of images, `.csv`, `.tsv`, `.npz`, `.zip`, or a folder that holds exactly one of these files; tar
            shards (a `.tar`, a folder or a pattern of them, see `open_shards`); a Hugging Face dataset (see `open_hf`).
        split: "train", "val" or "test" for that part alone.
        dataset: name (or entry) in the registry. Fixes the order of the classes, whatever the folders are called, and
            the pattern of patients in file names. Use `check_dataset` to see whether the files are the complete set.
        classes: names of the classes in order, instead of the sorted names found.
        class_order: "auto" (numeric where all names are integers), "numeric" or "alphabetical". Alphabetical is what
            the published trainer used, in which "10" comes before "2"; see `medmamba.data.labels`.
        patient_pattern: regular expression; its group 1 in a file name is the patient (overrides the registry's).
        patients: "folder" where the folder below the class folder is the patient, or "FILE.csv:COLUMN" where a column
            of a CSV file tells; see `with_patients`.
        transform: see `ImageDataset`.
        single_class: accept a tree with images of one class, as a part of a larger set may be.

    `ImageDataset.notes` lists what was passed over, merged or guessed.

    Raises:
        DatasetError: nothing there, an unknown layout, a class folder without images, ambiguous names,
            a pattern that matches nothing, an option without effect, or a file that cannot be trusted.
        medmamba.data.registry.RegistryError: an unknown dataset name.
    """
    if patients is not None and patient_pattern is not None:
        raise DatasetError("patients and patient_pattern are two rules for the same; leave one out")
    address = os.fspath(path)
    path = Path(path)
    entry = registry.get(dataset) if isinstance(dataset, str) else dataset
    if class_order != "auto" and (classes is not None or entry is not None):
        fixed = "classes=" if classes is not None else "dataset= (--dataset)"
        raise DatasetError(f"class_order={class_order!r} has no effect where {fixed} fixes the order; leave one out")
    from_hub = is_hf(address)
    shards = not from_hub and is_shards(path)
    path, notes = (path, []) if from_hub or shards else _find(path, entry)
    suffix = path.suffix.lower()
    if from_hub:
        if patient_pattern is not None:
            raise DatasetError(f"{address}: patient_pattern has no effect on Hugging Face datasets; leave it out")
        found = open_hf(address, entry=entry, classes=classes, class_order=class_order)
    elif shards:
        found = open_shards(
            path, entry=entry, classes=classes, class_order=class_order, patient_pattern=patient_pattern
        )
    elif path.is_dir() or suffix == ".zip":
        opener = open_folder if path.is_dir() else open_zip
        found = opener(
            path,
            entry=entry,
            classes=classes,
            class_order=class_order,
            patient_pattern=patient_pattern,
            single_class=single_class,
        )
    elif suffix == ".npz":
        if patient_pattern is not None or class_order != "auto":
            option = "patient_pattern" if patient_pattern is not None else "class_order"
            raise DatasetError(f"{path}: an .npz holds no names, so that {option} has no effect; leave it out")
        found = open_npz(path, entry=entry or _by_file_name(path), classes=classes)
    else:
        found = open_csv(path, entry=entry, classes=classes, class_order=class_order, patient_pattern=patient_pattern)
    found = found.with_notes(*notes)
    found = found if patients is None else with_patients(found, patients)
    known = entry or (_by_file_name(path) if suffix == ".npz" else None)
    if known is not None and known.task == "ordinal" and found.task == "multiclass" and found.classes == known.classes:
        found = found.with_task("ordinal")
    if transform is not None:
        found = found.with_transform(transform)
    return found if split is None else found.split(split)


_TABLES = (".csv", ".tsv")
_FILES = (*_TABLES, ".npz", ".zip")


def _find(path: Path, entry: DatasetEntry | None) -> tuple[Path, list[str]]:
    """Returns the file or folder to read (`path`, or the single data file in it) and notes on unused files."""
    if path.is_file():
        if path.suffix.lower() not in _FILES:
            raise DatasetError(f"{path}: not a dataset; give {_LAYOUTS}")
        return path, []
    if not path.is_dir():
        raise DatasetError(f"{path}: no such file or folder; give {_LAYOUTS}")
    try:
        children = sorted(path.iterdir())
    except OSError as exc:
        raise DatasetError(f"{path}: cannot be opened ({exc.strerror})") from exc
    files = [file for file in children if file.suffix.lower() in _FILES and file.is_file()]
    files = [file for file in files if reason_by_path(file.name) is None]
    has_folders = any(child.is_dir() and reason_by_path(f"{child.name}/x") is None for child in children)
    if entry is not None:
        arrays = [file for file in files if file.suffix.lower() == ".npz" and file.stem.split("_")[0] == entry.name]
        files = arrays or files
        has_folders = has_folders and not arrays
    if has_folders and files:
        return path, [f"{shown(*[file.name for file in files])} beside the folders not used; give a path to use one"]
    if has_folders or not files:
        return path, []
    if len(files) > 1:
        raise DatasetError(f"{path} holds {', '.join(file.name for file in files)}; name the one to use")
    return files[0], []


def _by_file_name(path: Path) -> DatasetEntry | None:
    """Returns the registry entry of a MedMNIST file name such as `bloodmnist_224.npz`, or None."""
    match = re.fullmatch(r"([a-z]+mnist)(_(28|64|128|224))?", path.stem)
    return registry.get(match[1]) if match and match[1] in registry.names() else None
