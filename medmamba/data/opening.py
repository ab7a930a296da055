"""`open_dataset`: from a path to an index, whatever the layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .. import registry
from ..registry import DatasetEntry
from .dataset import DatasetError, ImageDataset, Transform
from .files import open_folder, open_zip
from .npz import open_npz
from .table import open_csv

_LAYOUTS = "a folder (root/<class>/image or root/<split>/<class>/image), a .csv, a MedMNIST .npz or a .zip of a folder"


def open_dataset(
    path: str | os.PathLike[str],
    split: str | None = None,
    *,
    dataset: str | DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
    transform: Transform | None = None,
) -> ImageDataset:
    """Index a collection of images; the reader is chosen by what `path` is.

    Args:
        path: folder of images, `.csv`, `.npz`, `.zip`, or a folder that holds exactly one of these files.
        split: "train", "val" or "test" for that part alone.
        dataset: name (or entry) in the registry. Fixes the order of the classes, whatever the folders are called, and
            the pattern of patients in file names. Use `check_dataset` to see whether the files are the complete set.
        classes: names of the classes in order, instead of the sorted names found.
        class_order: "auto" (numeric where all names are integers), "numeric" or "alphabetical". Alphabetical is what
            the published trainer used, with the trap that "10" comes before "2": see `medmamba.data.labels`.
        patient_pattern: regular expression; its group 1 in a file name is the patient (overrides the registry's).
        transform: see `ImageDataset`.

    Raises:
        DatasetError: nothing there, an unknown layout, or a file that cannot be trusted.
        medmamba.registry.RegistryError: an unknown dataset name.
    """
    path = Path(path)
    entry = registry.get(dataset) if isinstance(dataset, str) else dataset
    if patient_pattern is None and entry is not None:
        patient_pattern = entry.group_pattern
    path = _find(path, entry)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        found = open_npz(path, entry=entry or _by_file_name(path), classes=classes)
    else:
        opener = open_folder if path.is_dir() else open_csv if suffix == ".csv" else open_zip
        found = opener(path, entry=entry, classes=classes, class_order=class_order, patient_pattern=patient_pattern)
    if transform is not None:
        found = found.with_transform(transform)
    return found if split is None else found.split(split)


def _find(path: Path, entry: DatasetEntry | None) -> Path:
    """The file or folder to read: `path`, or the one data file in it."""
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".npz", ".zip"):
            raise DatasetError(f"{path}: not a dataset; give {_LAYOUTS}")
        return path
    if not path.is_dir():
        raise DatasetError(f"{path}: no such file or folder; give {_LAYOUTS}")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".npz") and file.is_file())
    has_folders = any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir())
    if entry is not None:
        arrays = [file for file in files if file.suffix.lower() == ".npz" and file.stem.split("_")[0] == entry.name]
        files = arrays or files
        has_folders = has_folders and not arrays
    if has_folders or not files:
        return path
    if len(files) > 1:
        raise DatasetError(f"{path} holds {', '.join(file.name for file in files)}; name the one to use")
    return files[0]


def _by_file_name(path: Path) -> DatasetEntry | None:
    """The registry entry that a MedMNIST file name such as `bloodmnist_224.npz` stands for, if any."""
    try:
        return registry.get(path.stem.split("_")[0])
    except registry.RegistryError:
        return None
