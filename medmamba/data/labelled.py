"""Labelled images as people hand them over: a zip file or loose files, with or without a table."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .archive import DAMAGES, member_paths
from .csv_text import read_table
from .dataset import DatasetError, ImageDataset
from .files import check_members
from .metadata import METADATA_NAME, group_columns
from .opening import open_dataset
from .table import COLUMNS, open_csv, roles

MOST_TABLE_BYTES = 32 * 2**20
_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Labelled:
    """Labelled images, and the table about them.

    Attributes:
        index: the images.
        table: CSV file about the images; None if there is none.
        columns: of the table, that divide the images into groups, such as age or site.
    """

    index: ImageDataset
    table: Path | None = None
    columns: tuple[str, ...] = ()


def open_labelled(
    images: str | os.PathLike,
    table: str | os.PathLike | None = None,
    *,
    folder: str | os.PathLike,
    patient_pattern: str | None = None,
) -> Labelled:
    """Opens labelled images: a zip file, or a folder of loose files with a table.

    Labels come from a table with columns of paths and labels; else from the folders of the zip file, one per class. A
    table without labels, and one called `metadata.csv` beside class folders, only describes the images. A table inside
    the zip file is used if none is given. Images are found by their path in the zip file, or by their name.

    Args:
        images: the zip file, or a folder of image files.
        table: CSV file.
        folder: where a table from the zip file is written; the caller deletes it.
        patient_pattern: regular expression; group 1 in a file name is the patient.

    Raises:
        DatasetError: no labels, several tables, images that are not there, or an unsafe archive.
    """
    place, found = Path(images), None if table is None else Path(table)
    if found is None and place.is_file():
        found = _inner_table(place, Path(folder))
    if place.is_dir() and found is None:
        raise DatasetError("these images have no labels; add a CSV file with the columns path and label")
    if found is not None and (place.is_dir() or _has_labels(found)):
        return _described(_by_table(found, place, patient_pattern), found)
    try:
        index = open_dataset(place, patient_pattern=patient_pattern, single_class=True)
    except DatasetError as problem:
        if found is None:
            raise
        try:
            index = _by_table(found, place, patient_pattern)
        except DatasetError:
            raise problem from None
    return Labelled(index) if found is None else _described(index, found)


def _has_labels(table: Path) -> bool:
    """Returns whether a table says what the images show, rather than describing images in class folders."""
    known = roles(read_table(table, COLUMNS["path"]).header)
    return {"path", "label"} <= set(known) and table.name.lower() != METADATA_NAME


def _by_table(table: Path, place: Path, pattern: str | None) -> ImageDataset:
    index = open_csv(table, root=place, patient_pattern=pattern, by_name=True)
    return index.with_notes(f"labels are those in {table.name}")


def _described(index: ImageDataset, table: Path) -> Labelled:
    return Labelled(index, table, tuple(group_columns(table, index)))


def _inner_table(place: Path, folder: Path) -> Path | None:
    """Writes the table of a zip file into a folder; returns its path, None if the file holds none."""
    try:
        with zipfile.ZipFile(place) as archive:
            infos = archive.infolist()
            check_members(infos, str(place))
            members = member_paths(infos)
            tables = [path for path in members if _is_table(path)]
            if not tables:
                return None
            if len(tables) > 1:
                raise DatasetError(f"{place.name} holds {', '.join(sorted(tables)[:4])}; leave one table in it")
            info = members[tables[0]]
            if info.file_size > MOST_TABLE_BYTES:
                raise DatasetError(f"{place.name}: {tables[0]} is larger than {MOST_TABLE_BYTES >> 20} MB")
            content = archive.read(info)
    except DAMAGES as exc:
        raise DatasetError(f"{place.name}: not a complete zip file ({exc}); create it again") from exc
    target = folder / PurePosixPath(tables[0]).name
    target.write_bytes(content)
    return target


def _is_table(path: str) -> bool:
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return not hidden and PurePosixPath(path).suffix.lower() in _TABLES
