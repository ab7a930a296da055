"""Labelled images of a visitor: what was uploaded, within the limits of the app, as a dataset."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medmamba.data import DatasetError, ImageDataset, open_labelled
from medmamba.data.metadata import Columns, read_columns

from .jobs import check_archive, check_size
from .options import Limits
from .sessions import Session

TABLES = (".csv", ".tsv")
MORE = "medmamba evaluate"


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images that passed validation.

    Attributes:
        index: the images with their own class names.
        name: to display.
        table: CSV file about the images, if any.
        columns: that divide them into groups.
        place: zip file or folder of the images.
        renamed: name of a class to the model's class, as confirmed by the visitor.
    """

    index: ImageDataset
    name: str
    table: Path | None = None
    columns: tuple[str, ...] = ()
    place: Path | None = None
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """Names of the splits of the images, if they have any."""
        return [split for split in self.index.split_sizes if split]

    def groups(self, names: Sequence[str]) -> Callable[[ImageDataset], Columns] | None:
        """Returns the argument `columns` of `review` for some of the columns."""
        wanted = [name for name in names if name in self.columns]
        table = self.table
        if table is None or not wanted:
            return None
        return lambda index: read_columns(table, index, wanted)


def take(session: Session, uploads: Sequence[str], limits: Limits) -> LabelledSet:
    """Validates uploaded files and keeps them in the session: a zip file, or images, and a CSV file with either.

    A CSV file alone belongs to the images that are there already.

    Raises:
        DatasetError: no labels, too large, unsafe, or not an image dataset.
        OSError: an upload is gone.
    """
    session.uploads.update(map(Path, uploads))
    given = [Path(name) for name in uploads]
    zips = [path for path in given if path.suffix.lower() == ".zip"]
    tables = [path for path in given if path.suffix.lower() in TABLES]
    images = [path for path in given if path not in zips and path not in tables]
    if len(zips) > 1 or len(tables) > 1 or (zips and images):
        raise DatasetError("give one zip file, or images, and at most one CSV file")
    before = session.labelled
    work = session.new_folder()
    try:
        table = _kept(tables[0], work) if tables else None
        if zips:
            check_archive(zips[0], limits)
            place, name = _kept(zips[0], work), zips[0].name
        elif images:
            place, name = _loose(images, work / "images", limits), f"{len(images)} images"
        elif before is not None and before.place is not None:
            place, name = before.place, before.name
        else:
            raise DatasetError("a CSV file alone is not enough; give the images too, in the same upload or first")
        found = open_labelled(place, table, folder=work)
        check_size(found.index, limits, MORE)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return LabelledSet(found.index, name, found.table, found.columns, place)


def without_paths(text: object, session: Session) -> str:
    """Returns a message or table without the folders of the session, which mean nothing to the visitor."""
    return re.sub(re.escape(f"{session.folder}{os.sep}") + r"[\w-]+/", "", str(text))


def _kept(upload: Path, folder: Path) -> Path:
    """Links or copies an upload into a folder of the session."""
    target = folder / upload.name
    try:
        os.link(upload, target)
    except OSError:  # another file system
        shutil.copyfile(upload, target)
    return target


def _loose(images: Sequence[Path], folder: Path, limits: Limits) -> Path:
    if len(images) > limits.zip_images:
        raise DatasetError(f"{len(images)} images; the limit here is {limits.zip_images}. `{MORE}` has no limit")
    names = [path.name for path in images]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"two images are called {twice[0]!r}; put them into a zip file, in their folders")
    sizes = [path.stat().st_size for path in images]
    if max(sizes) > limits.image_mb * 2**20:
        raise DatasetError(f"{names[sizes.index(max(sizes))]} is larger than {limits.image_mb} MB")
    if sum(sizes) > limits.zip_unpacked_mb * 2**20:
        raise DatasetError(f"the images are larger than {limits.zip_unpacked_mb} MB together; use fewer")
    folder.mkdir()
    for path in images:
        _kept(path, folder)
    return folder
