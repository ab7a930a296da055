"""Columns of a CSV file about the images of a dataset, such as age, sex, site or device, as groups.

Rows and images are matched by name. Numbers with many different values are divided into ranges. Missing values stay
missing, they are not guessed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..utils.names import shown
from .csv_text import Table, read_table
from .dataset import DatasetError, ImageDataset
from .labels import is_missing
from .table import COLUMNS

IMAGE_COLUMNS = ("path", "image_path", "file", "filename", "file_name", "image", "img_id", "image_id", "isic_id", "id")
MOST_CODES = 8  # of different numbers that are taken as codes, not as a quantity
MOST_GROUPS = 20
METADATA_NAME = "metadata.csv"


@dataclass(frozen=True)
class Columns:
    """Groups of images by column.

    Attributes:
        values: value of each image by name of the column; None where it is missing.
        notes: what was matched, divided or merged.
    """

    values: Mapping[str, tuple[str | None, ...]]
    notes: tuple[str, ...]


def metadata_file(data: str | os.PathLike) -> Path:
    """Returns the file that describes the images of a dataset: itself if it is a CSV, or the `metadata.csv` in it.

    Raises:
        DatasetError: there is none.
    """
    path = Path(data)
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        return path
    if (path / METADATA_NAME).is_file():
        return path / METADATA_NAME
    raise DatasetError(f"{path} has no {METADATA_NAME}; name the CSV file that describes the images (metadata=...)")


def read_columns(
    path: str | os.PathLike,
    dataset: ImageDataset,
    names: Sequence[str],
    cuts: Mapping[str, Sequence[float]] | None = None,
) -> Columns:
    """Reads columns of a CSV file for the images of a dataset.

    The column that names the images is found by its content: paths, file names or names without suffix, whichever
    matches most images.

    Args:
        path: CSV file whose first line names the columns.
        dataset: the images.
        names: of the columns wanted, regardless of case.
        cuts: where to divide columns of numbers, by name: `{"age": (40, 65)}` makes three ranges, below 40, 40 to
            below 65, and 65 and above. Without them, columns of more than eight different numbers are divided at
            their quartiles among these images.

    Raises:
        DatasetError: no such column, no row that matches an image, or a column with too many different values to be
            groups.
    """
    path = Path(path)
    table = read_table(path, IMAGE_COLUMNS)
    by_lower = {name.lower(): name for name in table.header}
    if unknown := [name for name in names if name.lower() not in by_lower]:
        raise DatasetError(f"{path}: no column {shown(*unknown)}; the columns are {', '.join(table.header)}")
    wanted = {name: by_lower[name.lower()] for name in names}
    limits = {name.lower(): tuple(values) for name, values in (cuts or {}).items()}
    if unknown := [name for name in limits if name not in {name.lower() for name in names}]:
        raise DatasetError(f"cut points for {shown(*unknown)}, which is not among the columns {', '.join(names)}")
    rows, notes = rows_of_images(table, dataset, path)
    values: dict[str, tuple[str | None, ...]] = {}
    for name, column in wanted.items():
        texts = [_cell(found, column) for found in rows]
        values[name], said = _groups(name, texts, limits.get(name.lower()), path)
        notes += said
    return Columns(values, tuple(notes))


def group_columns(path: str | os.PathLike, dataset: ImageDataset) -> list[str]:
    """Returns the columns of a CSV file that divide the images of a dataset into at least two groups.

    Columns that name images, classes, patients or splits are left out.

    Raises:
        DatasetError: no row matches an image.
    """
    path = Path(path)
    table = read_table(path, IMAGE_COLUMNS)
    rows, _ = rows_of_images(table, dataset, path)
    others = {*IMAGE_COLUMNS, *(name for names in COLUMNS.values() for name in names), *map(str.lower, dataset.classes)}
    found = []
    for column in table.header:
        if column.lower() in others:
            continue
        try:
            values, _ = _groups(column, [_cell(row, column) for row in rows], None, path)
        except DatasetError:  # too many values
            continue
        if len(set(values) - {None}) > 1:
            found.append(column)
    return found


def rows_of_images(table: Table, dataset: ImageDataset, path: Path) -> tuple[list[dict[str, str] | None], list[str]]:
    """Returns the row of each image, None where it has none, and notes."""
    sources = [record.source for record in dataset.records]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise DatasetError(f"{dataset.name} holds no file names, so that no row of {path} can be matched to an image")
    keys = [PurePosixPath(str(source).replace(os.sep, "/")) for source in sources]
    forms = (str, lambda p: p.name, lambda p: p.stem)
    best: tuple[int, str, list[dict[str, str] | None]] = (0, "", [])
    for column in table.header:
        for form in forms:
            wanted = [form(key) for key in keys]
            if len(set(wanted)) < len(wanted) and form is not str and _ambiguous(wanted, keys):
                continue
            rows: dict[str, dict[str, str]] = {}
            for _, row in table.rows:
                text = form(PurePosixPath(row[column].strip().replace("\\", "/")))
                if text and text in rows and rows[text] != row:
                    break
                rows[text] = row
            else:
                found = [rows.get(text) for text in wanted]
                count = sum(row is not None for row in found)
                if count > best[0]:
                    best = (count, column, found)
    count, column, found = best
    if not count:
        raise DatasetError(
            f"{path}: no column names the images of {dataset.name}, such as {shown(str(keys[0]))}; it needs a column "
            "of paths or file names, one row per image"
        )
    notes = [f"{path.name}: column {column!r} names {count} of {len(keys)} images"]
    if count < len(keys):
        example = next(key for key, row in zip(keys, found, strict=True) if row is None)
        notes.append(f"{len(keys) - count} images have no row and count as missing, such as {example.name}")
    return found, notes


def _ambiguous(wanted: Sequence[str], keys: Sequence[PurePosixPath]) -> bool:
    return any(count > 1 for count in Counter(wanted).values()) and len(set(keys)) == len(keys)


def _cell(row: dict[str, str] | None, column: str) -> str | None:
    text = row[column].strip() if row else ""
    return None if not text or is_missing(text) else text


def _groups(
    name: str, texts: Sequence[str | None], cuts: Sequence[float] | None, path: Path
) -> tuple[tuple[str | None, ...], list[str]]:
    """Returns the group of each image and notes."""
    known = [text for text in texts if text is not None]
    missing = (
        [f"{name}: missing for {len(texts) - len(known)} of {len(texts)} images"] if len(known) < len(texts) else []
    )
    numbers = _numbers(known)
    if numbers is None:
        if cuts is not None:
            bad = next(text for text in known if _numbers([text]) is None)
            raise DatasetError(f"{path}: column {name!r} is to be cut at numbers and holds {shown(bad)}")
        spelt: dict[str, Counter[str]] = {}
        for text in known:
            spelt.setdefault(" ".join(text.casefold().split()), Counter())[text] += 1
        title = {key: found.most_common(1)[0][0] for key, found in spelt.items()}
        merged = [f"{name}: {shown(*sorted(found))} are one group" for found in spelt.values() if len(found) > 1]
        groups = tuple(None if text is None else title[" ".join(text.casefold().split())] for text in texts)
        _few_enough(name, len(title), path)
        return groups, missing + merged
    if cuts is None and len(set(numbers)) <= MOST_CODES:
        codes = iter(numbers)
        return tuple(None if text is None else f"{next(codes):g}" for text in texts), missing
    found = np.array(numbers)
    limits = _quartiles(found) if cuts is None else _checked_cuts(name, cuts)
    titles = _range_titles(limits)
    place = iter(np.searchsorted(limits, found, side="right"))
    groups = tuple(None if text is None else titles[int(next(place))] for text in texts)
    how = "as given" if cuts is not None else "the quartiles of these images"
    return groups, [*missing, f"{name}: divided at {', '.join(f'{cut:g}' for cut in limits)} ({how})"]


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        found = [float(text) for text in texts]
    except ValueError:
        return None
    return found if found and all(map(math.isfinite, found)) else None


def _quartiles(numbers: np.ndarray) -> tuple[float, ...]:
    limits = np.quantile(numbers, (0.25, 0.5, 0.75))
    if (numbers == np.rint(numbers)).all():
        limits = np.rint(limits)
    return tuple(float(cut) for cut in np.unique(limits) if numbers.min() < cut)


def _checked_cuts(name: str, cuts: Sequence[float]) -> tuple[float, ...]:
    limits = tuple(float(cut) for cut in cuts)
    if not limits or list(limits) != sorted(set(limits)) or not all(map(math.isfinite, limits)):
        raise DatasetError(f"cut points of {name!r} must be ascending numbers, got {cuts!r}")
    return limits


def _range_titles(limits: Sequence[float]) -> list[str]:
    between = [f"{low:g} to below {high:g}" for low, high in itertools.pairwise(limits)]
    return [f"below {limits[0]:g}", *between, f"{limits[-1]:g} and above"] if limits else ["all"]


def _few_enough(name: str, count: int, path: Path) -> None:
    if count > MOST_GROUPS:
        raise DatasetError(
            f"{path}: column {name!r} has {count} different values, too many for groups (at most {MOST_GROUPS}); "
            "make a column of coarser groups"
        )
