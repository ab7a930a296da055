"""Image datasets of the Hugging Face library `datasets`: from the Hub, or a local copy in Arrow or Parquet files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..imaging.load import ImageError, MedicalImage, load_named
from ..utils.extras import require
from ..utils.names import shown
from .dataset import SPLITS, DatasetError, ImageDataset, Record, split_name
from .labels import is_missing, notes_on_names, resolve_classes
from .registry import DatasetEntry
from .table import COLUMNS
from .webdataset import holds_only, lone_split

SCHEME = "hf://"
_SAVED = ("dataset_dict.json", "state.json")  # of `DatasetDict.save_to_disk` and `Dataset.save_to_disk`
_IMAGES = ("image", "img", "picture", "file", "content", "bytes", "dicom")  # of a binary column


class HFReader:
    """Reads images of `datasets.Dataset`s, one by split; the source of a record is `split:row`.

    The tables are mapped from disk and shared between processes, and only the rows asked for are read.

    Args:
        parts: by split, the dataset with one column of undecoded images.
        column: its name.
    """

    frame: int | None = None
    window: tuple[float, float] | None = None

    def __init__(self, parts: dict[str, Any], column: str) -> None:
        self.parts, self.column = parts, column

    def read(self, record: Record) -> MedicalImage:
        split, _, row = str(record.source).rpartition(":")
        cell = self.parts[split][int(row)][self.column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is None:
            if path is None:
                raise ImageError(f"{record.source}: the row holds no image")
            content = Path(path).read_bytes()
        return load_named(content, path or str(record.source), frame=self.frame, window=self.window)

    def files(self) -> list[Path]:
        """Returns the files that together determine what `read` returns."""
        return [Path(file["filename"]) for part in self.parts.values() for file in part.cache_files]

    def marks(self) -> dict[str, str]:
        """Returns what else determines it, by split: the fingerprint of a part whose rows were chosen or changed."""
        return {split: "" if part._indices is None else part._fingerprint for split, part in self.parts.items()}


class LinkedReader(HFReader):
    """Reads images that the rows only name, by the paths of their files."""

    def file_of(self, record: Record) -> Path:
        """Returns the file that determines what `read` returns."""
        split, _, row = str(record.source).rpartition(":")
        return Path(self.parts[split][int(row)][self.column]["path"])


def is_hf(path: str | os.PathLike[str]) -> bool:
    """Returns whether this is an address on the Hub, or a folder of Arrow or Parquet files."""
    if os.fspath(path).startswith(SCHEME) or os.fspath(path).startswith("hf:/"):
        return True
    folder = Path(path)
    if folder.suffix.lower() == ".parquet":
        return folder.is_file()
    return folder.is_dir() and (any((folder / name).is_file() for name in _SAVED) or holds_only(folder, ".parquet"))


def open_hf(
    path: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
) -> ImageDataset:
    """Indexs an image dataset of the library `datasets`.

    Args:
        path: `hf://owner/name`, `hf://owner/name@revision` or `hf://owner/name/configuration`; a folder that
            `save_to_disk` wrote; a Parquet file or a folder of them, as repositories on the Hub hold.
        entry, classes, class_order: see `open_dataset`.

    The image is in the first column of type `Image`, or a binary column called as one; the label in one called
    `label`, `labels`, `class`, ... (see `open_csv`), as a class, a number, a text, or a list of them; patients in
    `patient`, `patient_id`, .... Only code of the library itself is run: datasets that come with a script are refused.

    Raises:
        DatasetError: nothing there, or no column of images or labels.
        ImportError: the extra "datasets" is not installed.
    """
    datasets = require("datasets", "reading Hugging Face datasets")
    where = os.fspath(path)
    loaded = _load(datasets, where)
    parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "all"): loaded}
    notes: list[str] = []
    parts = {name: part for name, part in parts.items() if len(part)}
    if not parts:
        raise DatasetError(f"{where}: has no rows")
    unknown = [name for name in parts if split_name(name) is None] if len(parts) > 1 else []
    if unknown:
        notes.append(f"parts {shown(*unknown)} are not used: they are not train, val or test")
        parts = {name: part for name, part in parts.items() if name not in unknown}
    if not parts:
        raise DatasetError(f"{where}: none of {shown(*unknown)} is train, val or test")
    if len(parts) > 1:
        parts = dict(sorted(parts.items(), key=lambda item: SPLITS.index(split_name(item[0]) or "")))
    features = next(iter(parts.values())).features
    image = _image_column(datasets, features, where)
    label, patient = _column(features, "label"), _column(features, "patient")
    if label is None:
        raise DatasetError(f"{where}: no column of labels (columns: {shown(*features)}); name it 'label'")
    names = _class_names(datasets, features[label])
    values = {name: _values(part, label) for name, part in parts.items()}
    multilabel = any(isinstance(value, list) for column in values.values() for value in column[:1])
    where_of = {name: f"{where}, {name}" for name in parts}
    texts = _Texts(names)
    found = {text for name, column in values.items() for value in column for text in texts(value, where_of[name])}
    if names is not None and classes is None and entry is None:
        classes = names  # in their own order, with those that no image has
    order, index = resolve_classes(found, entry, classes, class_order, where)
    notes += notes_on_names(found)
    records = []
    for name, part in parts.items():
        ids = _values(part, patient) if patient else itertools.repeat(None, len(part))
        split = split_name(name)
        for row, (value, who) in enumerate(zip(values[name], ids, strict=True)):
            text = texts(value, name)
            number: int | tuple[int, ...] = index[text[0]] if not multilabel else 0
            if multilabel:
                numbers = {index[t] for t in text}
                number = tuple(int(i in numbers) for i in range(len(order)))
            known = None if who is None or is_missing(str(who)) else str(who)
            records.append(Record(f"{name}:{row}", number, split, known))
    task = "multilabel" if multilabel else "multiclass"
    undecoded = {name: _undecoded(datasets, part.select_columns([image]), image) for name, part in parts.items()}
    first = next(iter(undecoded.values()))[0][image]
    linked = isinstance(first, dict) and first.get("bytes") is None and first.get("path")
    reader = (LinkedReader if linked else HFReader)(undecoded, image)
    title = where.removeprefix(SCHEME).rstrip("/").split("/")[-1]
    return lone_split(ImageDataset(records, order, reader, task, None, title, notes))


def _load(datasets: Any, where: str) -> Any:
    folder = Path(where)
    try:
        if where.startswith("hf:/"):
            # `Path` makes one slash of two.
            parts = where.removeprefix("hf:").lstrip("/").removeprefix("datasets/").split("/")
            if len(parts) not in (2, 3) or not all(parts):
                raise DatasetError(
                    f"{where}: write hf://owner/name, hf://owner/name@revision or hf://owner/name/config"
                )
            name, _, revision = parts[1].partition("@")
            return datasets.load_dataset(f"{parts[0]}/{name}", *parts[2:], revision=revision or None)
        if folder.is_dir() and any((folder / name).is_file() for name in _SAVED):
            return datasets.load_from_disk(where)
        files: dict[str, list[str]] = {}
        for file in [folder] if folder.is_file() else _parquets(folder):
            split = split_name(file.stem.split("-")[0]) or split_name(file.parent.name) or "all"
            files.setdefault(split, []).append(str(file))
        return datasets.load_dataset("parquet", data_files=files)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{where}: cannot be opened by the library datasets: {error}") from error


def _parquets(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _image_column(datasets: Any, features: Any, where: str) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        binary = ("binary", "large_binary")
        images = [name for name in _IMAGES if getattr(features.get(name), "dtype", None) in binary]
    if not images:
        raise DatasetError(f"{where}: no column of images (columns: {shown(*features)})")
    return images[0]


def _undecoded(datasets: Any, part: Any, column: str) -> Any:
    if isinstance(part.features[column], datasets.Image):
        return part.cast_column(column, datasets.Image(decode=False))
    return part


def _column(features: Any, role: str) -> str | None:
    by_name = {name.lower(): name for name in features}
    return next((by_name[name] for name in COLUMNS[role] if name in by_name), None)


def _class_names(datasets: Any, feature: Any) -> tuple[str, ...] | None:
    """Returns the names of a column of classes, or of lists of classes; None for plain numbers and texts."""
    inner = getattr(feature, "feature", None) or (feature[0] if isinstance(feature, list) else feature)
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _values(part: Any, column: str) -> list[Any]:
    """Returns one column as Python values, without the others."""
    table = part.select_columns([column]).with_format("arrow")
    return table[:][column].to_pylist()


class _Texts:
    """The class names of a row; of each different value they are made once, as there may be millions of rows."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names, self._known = names, dict[Any, list[str]]()

    def __call__(self, value: Any, where: str) -> list[str]:
        key = tuple(value) if isinstance(value, list) else value
        if key not in self._known:
            self._known[key] = [self._text(one, where) for one in (value if isinstance(value, list) else [value])]
        return self._known[key]

    def _text(self, one: Any, where: str) -> str:
        names = self._names
        if one is None or (names is not None and not 0 <= one < len(names)) or (names is None and is_missing(str(one))):
            raise DatasetError(f"{where}: a row has the label {one!r}; remove the rows without a label")
        if isinstance(one, float):
            raise DatasetError(f"{where}: a label is {one!r}, a fraction; classes are names or whole numbers")
        return names[one] if names is not None else str(one)
