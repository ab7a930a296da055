"""Images to classify, wherever they are: files, folders, patterns, lists, tables, archives, and object stores.

Nothing is read but names: each image is opened by the process that decodes it. Lists, tables and compressed tars are
read as they are needed, so that they may be of any length.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..imaging.ahead import Deferred
from ..imaging.find import has_image_suffix, reason_by_path
from ..imaging.image import ImageError, MedicalImage, Window
from ..imaging.load import find_images, load_named
from ..utils.extras import require
from .archive import find_in_archive, member_paths
from .dataset import DatasetError, Record
from .files import MAX_MEMBER_BYTES, ZipReader, check_members
from .tar_index import tar_members

TABLES = (".csv", ".tsv", ".parquet")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COLUMNS = ("path", "file", "filename", "filepath", "file_path", "file_name", "image", "image_path", "source")


@dataclass
class Sources:
    """Images of any number, to be iterated over once or several times.

    Attributes:
        count: how many there are; None where that is known only at the end.
        notes: what was passed over.
    """

    parts: list[Callable[[], Iterable[Any]]] = field(repr=False)
    count: int | None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(part() for part in self.parts)

    def __length_hint__(self) -> int:
        return NotImplemented if self.count is None else self.count


def open_sources(
    inputs: Sequence[str | os.PathLike[str]] = (),
    *,
    lists: Sequence[str | os.PathLike[str]] = (),
    column: str | None = None,
) -> Sources:
    """Finds images.

    Args:
        inputs: image files, folders, glob patterns; archives (zip, tar, compressed tar); tables (CSV, TSV, Parquet)
            with one image per row; addresses that fsspec understands, such as "s3://bucket/folder" or "hf://datasets/...",
            of an image or of a folder.
        lists: text files with one image per line, or "-" for standard input.
        column: of the tables; None: "path", "file", "filename", "image" or the like. Paths in tables and lists may be
            relative to the folder of the table or list, absolute, or addresses.

    Raises:
        DatasetError: an archive or table that cannot be read.
        ImageError: nothing there.
        ImportError: a package is missing.
    """
    parts: list[Callable[[], Iterable[Any]]] = []
    notes: list[str] = []
    counts: list[int | None] = []

    def add(part: Callable[[], Iterable[Any]], count: int | None) -> None:
        parts.append(part)
        counts.append(count)

    plain: list[str] = []

    def add_plain() -> None:
        if plain:
            found = find_images(plain)
            if found.passed_over:
                notes.append(str(found))
            paths = found.paths
            add(lambda: paths, len(paths))
            plain.clear()

    for given in [os.fspath(entry) for entry in inputs]:
        lower = given.lower()
        special = _special(given, lower)
        if special is None:
            plain.append(given)
            continue
        add_plain()
        if special == "address":
            remote = _addresses(given)
            add(lambda remote=remote: remote, len(remote))  # type: ignore[misc]
        elif special == "table":
            names = _Table(Path(given), column)
            add(lambda names=names: names, names.count)  # type: ignore[misc]
        elif lower.endswith(".zip"):
            members = _zip(Path(given), notes)
            add(lambda members=members: members, len(members))  # type: ignore[misc]
        elif lower.endswith(".tar"):
            inside = [TarImage(given, m.name, m.offset, m.size) for m in tar_members(Path(given)) if _wanted(m.name)]
            if not inside:
                raise ImageError(f"{given}: no images in this archive")
            add(lambda inside=inside: inside, len(inside))  # type: ignore[misc]
        else:
            add(lambda given=given: _compressed_tar(given), None)  # type: ignore[misc]
    add_plain()
    for given in [os.fspath(entry) for entry in lists]:
        if given != "-" and not os.path.isfile(given):
            raise ImageError(f"{given}: no such file")
        add(lambda given=given: _lines(given), _line_count(given))  # type: ignore[misc]
    if not parts:
        raise ImageError("no images given; name files, folders or patterns such as 'scans/*.png', or a list")
    return Sources(parts, None if None in counts else sum(count or 0 for count in counts), notes)


def name_of(source: Any) -> str:
    """Returns what an image of `Sources` is called in results."""
    return os.fsdecode(source) if isinstance(source, str | os.PathLike) else str(source)


def is_address(text: str) -> bool:
    """Returns whether this is an address such as "s3://bucket/image.png"."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum() and len(scheme) > 1


def _special(given: str, lower: str) -> str | None:
    if is_address(given):
        return "address"
    if not os.path.isfile(given) or (glob.has_magic(given) and not os.path.exists(given)):
        return None
    return "table" if lower.endswith(TABLES) else "archive" if lower.endswith(ARCHIVES) else None


class ZipImage(Deferred):
    """A member of a zip file."""

    def __init__(self, archive: str, member: str) -> None:
        self.archive, self.member = archive, member

    @property
    def name(self) -> str:
        return f"{self.archive}/{self.member}"

    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        reader = _zip_reader(self.archive)
        reader.frame, reader.window = frame, window
        try:
            return reader.read(Record(self.member, 0))
        except ImageError as error:
            raise _named(error, self.member, self.name) from error.__cause__


class TarImage(Deferred):
    """A member of an uncompressed tar file."""

    def __init__(self, archive: str, member: str, offset: int, size: int) -> None:
        self.archive, self.member, self.offset, self.size = archive, member, offset, size

    @property
    def name(self) -> str:
        return f"{self.archive}/{self.member}"

    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        if self.size > MAX_MEMBER_BYTES:
            raise ImageError(f"{self.name}: larger than {MAX_MEMBER_BYTES >> 20} MiB")
        try:
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read ({error})") from error
        return load_named(content, self.name, frame=frame, window=window)


class NamedBytes(Deferred):
    """The bytes of a file that had to be read here, such as one in a compressed tar."""

    def __init__(self, name: str, content: bytes) -> None:
        self._name, self.content = name, content

    @property
    def name(self) -> str:
        return self._name

    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        return load_named(self.content, self.name, frame=frame, window=window)


class RemoteImage(Deferred):
    """An object in a store that fsspec reaches; credentials come from where its package looks for them."""

    slow = True

    def __init__(self, address: str) -> None:
        self.address = address

    @property
    def name(self) -> str:
        return self.address

    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        try:
            system, path = _system(self.address)
            content = system.cat_file(path)
        except ImportError as error:
            raise ImageError(_missing(self.address, error)) from error
        except FileNotFoundError:
            raise ImageError(f"{self.address}: no such object") from None
        except Exception as error:  # each store has errors of its own
            raise ImageError(f"{self.address}: cannot be read ({type(error).__name__}: {error})") from error
        return load_named(content, self.address, frame=frame, window=window)


def _system(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(address)  # which keeps the connection to each store


def _missing(address: str, error: ImportError) -> str:
    scheme = address.partition("://")[0]
    return f'{scheme}:// needs another package ({error}): pip install "medmamba[stores]"'


def _addresses(address: str) -> list[RemoteImage]:
    """Returns the objects at an address, or below it."""
    try:
        system, path = _system(address)
        inside = sorted(system.find(path)) if not system.isfile(path) else None
    except ImportError as error:
        raise ImageError(_missing(address, error)) from error
    except Exception as error:
        raise ImageError(f"{address}: cannot be listed ({type(error).__name__}: {error})") from error
    if inside is None:
        return [RemoteImage(address)]
    root = system._strip_protocol(path).rstrip("/")
    wanted = [place for place in inside if _wanted(place[len(root) :].lstrip("/"))]
    if not wanted:
        raise ImageError(f"{address}: no images there (looked for names that end as those of images do)")
    return [RemoteImage(system.unstrip_protocol(place)) for place in wanted]


def _wanted(relative: str) -> bool:
    """Decides by the name alone: looking into every object of a store would take longer than classifying it."""
    return has_image_suffix(relative.rpartition("/")[2]) and reason_by_path(relative) is None


@lru_cache(maxsize=4)
def _zip_reader(archive: str) -> ZipReader:
    return ZipReader(Path(archive))


def _zip(path: Path, notes: list[str]) -> list[ZipImage]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            check_members(infos, str(path))
            found = find_in_archive(archive, member_paths(infos))
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(f"{path}: not a complete zip file ({error}); download it again") from error
    if not found.paths:
        raise ImageError(f"{path}: no images in this archive")
    if found.passed_over:
        notes.append(f"{path}: {found.passed_over}")
    return [ZipImage(str(path), member) for member in found.paths]


def _compressed_tar(path: str) -> Iterator[NamedBytes]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # which would grow with the archive
                if info.isreg() and _wanted(info.name.removeprefix("./")):
                    name = f"{path}/{info.name.removeprefix('./')}"
                    if info.size > MAX_MEMBER_BYTES:
                        raise DatasetError(f"{name}: larger than {MAX_MEMBER_BYTES >> 20} MiB")
                    content = archive.extractfile(info)
                    yield NamedBytes(name, content.read() if content else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"{path}: not a complete archive ({error}); download or pack it again") from error


class _Table:
    """A column of a CSV, TSV or Parquet file."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self.count: int | None = None
        if path.suffix.lower() == ".parquet":
            file = self._parquet()
            names, self.count = list(file.schema_arrow.names), file.metadata.num_rows
        else:
            with self._text() as text:
                names = next(csv.reader(text, delimiter=self._delimiter), [])
        self.column = self._chosen(names, column)
        self._index = names.index(self.column)

    def _chosen(self, names: list[str], column: str | None) -> str:
        if column is not None:
            if column not in names:
                raise DatasetError(f"{self.path} has no column {column!r}; it has {', '.join(names)}")
            return column
        known = {name.strip().lower(): name for name in reversed(names)}
        found = next((known[name] for name in _COLUMNS if name in known), None)
        if found is None:
            raise DatasetError(f"{self.path}: which column holds the images? Choose column= among {', '.join(names)}")
        return found

    def __iter__(self) -> Iterator[Any]:
        for value in self._values():
            if value:
                yield _placed(value, self.path.parent)

    def _values(self) -> Iterator[str]:
        if self.path.suffix.lower() == ".parquet":
            for batch in self._parquet().iter_batches(columns=[self.column]):
                yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
            return
        with self._text() as text:
            rows = csv.reader(text, delimiter=self._delimiter)
            next(rows, None)
            for row in rows:
                if len(row) > self._index:
                    yield row[self._index]

    @property
    def _delimiter(self) -> str:
        return "\t" if self.path.suffix.lower() == ".tsv" else ","

    def _text(self) -> Any:
        return self.path.open(encoding="utf-8-sig", newline="")

    def _parquet(self) -> Any:
        parquet = require("pyarrow.parquet", "reading Parquet", "parquet")
        try:
            return parquet.ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.path}: not a complete Parquet file ({error})") from error


def _lines(path: str) -> Iterator[Any]:
    folder = Path(path).parent if path != "-" else Path()
    with contextlib.nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8-sig") as text:
        for line in text:
            if line := line.rstrip("\r\n"):
                yield _placed(line, folder)


def _line_count(path: str) -> int | None:
    if path == "-":
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip(b"\r\n\xef\xbb\xbf"))


def _placed(name: str, folder: Path) -> Any:
    return RemoteImage(name) if is_address(name) else os.path.join(folder, name)


def _named(error: ImageError, name: str, full: str) -> ImageError:
    """Returns the same error with the name of the archive before that of the member."""
    text = str(error)
    found = type(error)(full + text[len(name) :] if text.startswith(name) else text)
    found.__dict__.update(error.__dict__)
    return found
