"""Brings the files of a source into one shape: `<class>/<image>`, or the `.npz` as it is.

Archives are not unpacked as they stand: only images that have a label are copied out, to names made here, so a path in
an archive leads nowhere else. Nothing appears at the target until everything is there.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from medmamba.data.archive import DAMAGES, member_paths
from medmamba.data.files import MAX_MEMBER_BYTES
from medmamba.data.npz import unpack_npz
from medmamba.data.registry import DatasetEntry
from medmamba.imaging.find import has_image_suffix, reason_by_path
from medmamba.utils.names import AmbiguousNameError, canonical, shown

from .make_sources import MakeError, Source, Table

MAPPED_BYTES = 2**30
"""An `.npz` with larger arrays is copied without compression, so that it is mapped instead of held in memory."""

Members = dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]]


def arrange(source: Source, files: Sequence[Path], entry: DatasetEntry, target: Path) -> tuple[Path, list[str]]:
    """Returns what `medmamba.data.open_dataset` opens, and notes on what was passed over.

    Args:
        files: the downloaded files, in the order of `source.downloads`.
        target: folder of the set, made here; one that exists is complete and taken as it is.

    Raises:
        MakeError: an archive that is damaged or laid out differently; the target does not exist then.
    """
    if source.layout == "npz":
        return _mapped(files[0], target), []
    if target.is_dir():
        return target, []
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _members(files, staging) as members:
            if source.layout == "folders":
                chosen, notes = _by_folder(members, entry)
            else:
                assert source.table is not None
                chosen, notes = _by_table(members, files, source.table, entry)
            for place, (archive, info) in chosen.items():
                _copy(archive, info, staging / "images" / place)
        os.replace(staging / "images", target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target, notes


def _mapped(file: Path, target: Path) -> Path:
    """Returns the file, or an uncompressed copy where its arrays are large."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(info.file_size for info in archive.infolist())
    except zipfile.BadZipFile as error:
        raise MakeError(f"{file} is damaged ({error}); delete it and run the command again") from error
    if size <= MAPPED_BYTES:
        return file
    copy = target / file.name
    if not copy.is_file():
        target.mkdir(parents=True, exist_ok=True)
        unpack_npz(file, copy)
    return copy


@contextmanager
def _members(files: Sequence[Path], staging: Path) -> Iterator[Members]:
    """Yields the files in all archives by path, and those in archives inside of them."""
    with ExitStack() as stack:
        found: Members = {}
        for file in files:
            if file.suffix == ".zip":
                _add(found, _opened(file, file.name, stack), file.stem)
        for path in [path for path in found if path.lower().endswith(".zip")]:
            archive, info = found.pop(path)
            inner = staging / f"{len(found)}.zip"
            _copy(archive, info, inner, limit=None)
            _add(found, _opened(inner, path, stack), path.removesuffix(".zip"))
        yield found


def _opened(file: Path, name: str, stack: ExitStack) -> zipfile.ZipFile:
    try:
        return stack.enter_context(zipfile.ZipFile(file))
    except zipfile.BadZipFile as error:
        raise MakeError(
            f"{name} is not a complete zip archive ({error}); delete it and run the command again"
        ) from error


def _add(found: Members, archive: zipfile.ZipFile, name: str) -> None:
    for path, info in member_paths(archive.infolist()).items():
        if not path.endswith("/") and reason_by_path(path) is None:  # without __MACOSX, .DS_Store and their like
            found[f"{name}/{path}"] = archive, info


def _by_folder(members: Members, entry: DatasetEntry) -> tuple[Members, list[str]]:
    """Returns the images by "class/name", where a folder above them has the name of a class."""
    chosen: Members = {}
    strange: Counter[str] = Counter()
    for path, member in members.items():
        if not has_image_suffix(path):
            continue
        parts = PurePosixPath(path).parts
        labels = [_class_of(part, entry) for part in parts[:-1]]
        label = next((label for label in reversed(labels) if label is not None), None)
        if label is None:
            strange[parts[-2] if len(parts) > 1 else "no folder"] += 1
            continue
        _place(chosen, f"{entry.classes[label]}/{parts[-1]}", member, path)
    if not chosen:
        raise MakeError(
            f"no folder in the archive has the name of a class of {entry.title} ({', '.join(entry.classes)}); found "
            f"{shown(*strange) if strange else 'no images'}. The source has another layout than the one known here"
        )
    if strange:
        kinds = ", ".join(f"{count} in {name}" for name, count in strange.most_common(5))
        return chosen, [f"images in folders that are no class of {entry.title} are left out: {kinds}"]
    return chosen, []


def _by_table(members: Members, files: Sequence[Path], table: Table, entry: DatasetEntry) -> tuple[Members, list[str]]:
    """Returns the images by "class/name", by a table that names image and label."""
    images: Members = {}
    twice = set()
    for path, member in members.items():
        if has_image_suffix(path):
            name = PurePosixPath(path).name
            twice |= {name} if name in images else set()
            images[name] = member
    chosen: Members = {}
    absent, strange = [], Counter[str]()
    for row in _rows(members, files, table):
        name = row[table.image].strip() + table.suffix
        label = _class_of(row[table.label].strip(), entry)
        if label is None:
            strange[row[table.label].strip() or "empty"] += 1
        elif name not in images:
            absent.append(name)
        elif name in twice:
            raise MakeError(f"{name} is in the archives twice; which one the label means is not known")
        else:
            own = PurePosixPath(name).name
            _place(
                chosen,
                f"{entry.classes[label]}/{row[table.group].strip() + '_' + own if table.group else own}",
                images[name],
                name,
            )
    if strange:
        raise MakeError(
            f"{table.name} has labels that are no class of {entry.title}: "
            f"{', '.join(f'{name} ({count} images)' for name, count in strange.most_common(5))}"
        )
    notes = (
        [f"{table.name} lists {len(absent)} images that are not in the archives, such as {shown(absent[0])}"]
        if absent
        else []
    )
    if rest := len(images) - len(chosen):
        notes.append(f"{rest} images are not in {table.name} and have no label")
    return chosen, notes


def _rows(members: Members, files: Sequence[Path], table: Table) -> list[dict[str, str]]:
    apart = next((file for file in files if file.name == table.name), None)
    inside = next((member for path, member in members.items() if PurePosixPath(path).name == table.name), None)
    if apart is None and inside is None:
        raise MakeError(f"no {table.name} in the archive; the source has another layout than the one known here")
    raw = apart.read_bytes() if apart is not None else _read(*inside)  # type: ignore[misc]
    text = raw.decode("utf-8-sig", errors="replace")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    # The header of Fetal-Planes-DB has a space after a name.
    rows = [
        {(key or "").strip(): value or "" for key, value in row.items() if isinstance(value, str | None)}
        for row in rows
    ]
    needed = [name for name in (table.image, table.label, table.group) if name]
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise MakeError(f"{table.name} has no column {', '.join(missing)}; its first line is {first.strip()[:200]!r}")
    return rows


def _class_of(name: str, entry: DatasetEntry) -> int | None:
    if name.isdecimal():  # a folder "1" or "2" is a part, not a class
        return None
    try:
        return entry.class_index(canonical(name))
    except AmbiguousNameError:
        return None


def _place(chosen: Members, place: str, member: tuple[zipfile.ZipFile, zipfile.ZipInfo], path: str) -> None:
    if place in chosen:
        raise MakeError(f"two images would be {place}, the second is {path}; the source has another layout than known")
    chosen[place] = member


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except DAMAGES as error:
        raise MakeError(
            f"{info.filename} is damaged ({error}); delete the archive and run the command again"
        ) from error


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, limit: int | None = MAX_MEMBER_BYTES) -> None:
    if limit is not None and info.file_size > limit:
        raise MakeError(f"{info.filename} unpacks to {info.file_size / 2**20:.0f} MiB, too much for an image")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(info) as stream, target.open("wb") as sink:
            shutil.copyfileobj(stream, sink, 2**20)
    except DAMAGES as error:
        if isinstance(error, OSError) and not isinstance(error, zipfile.BadZipFile):
            raise
        raise MakeError(
            f"{info.filename} is damaged ({error}); delete the archive and run the command again"
        ) from error
