"""Identifies datasets by the content of their files: sizes, times and hashes, kept like git's index.

A file whose size, times and inode are unchanged is assumed to be unchanged; any other is read and hashed. Programs can
set mtime back (`cp -p`, `rsync -t`, `tar`), but not ctime, the last change of the inode on POSIX systems. Where there
is no such time (Windows), every file is read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .dataset import ImageDataset
from .leakage import pixel_hash

_STAT_IS_ENOUGH = os.name != "nt"  # there, the time of the last change of the inode is that of its creation
# A file that was changed less than this before it was read may have been changed again since, with the same time: the
# clocks of file systems are that coarse (FAT: 2 s). It is read again next time.
_RACY_NS = 2_000_000_000
_UNREADABLE = "unreadable"
_READING_ROOM = "imaging"  # the folder of the modules that turn files into pixels
_ASKED = ("frame", "window")  # attributes of readers that decide which pixels of a file they return
_LIBRARIES = ("pillow", "pydicom", "torch")


class FileIndex:
    """Hashes of the contents of files, remembered from one start to the next.

    Attributes:
        read: number of files that had to be read so far.
    """

    def __init__(self) -> None:
        self._known: dict[str, list[Any]] = {}  # path: [size, mtime, ctime, inode, hash, time of the look]
        self.read = 0

    def add(self, table: Any) -> None:
        """Adds entries that `table` returned earlier; anything else is ignored."""
        if not isinstance(table, dict):
            return
        for path, row in table.items():
            if isinstance(row, list) and len(row) == 6 and (path not in self._known or row[5] > self._known[path][5]):
                self._known[path] = row

    def table(self, files: Iterable[Path]) -> dict[str, list[Any]]:
        """Returns the known entries of these files, ready for JSON."""
        paths = {os.path.abspath(file) for file in files}
        return {path: self._known[path] for path in sorted(paths) if path in self._known}

    def hashes(
        self, files: Sequence[Path], workers: int | None = None, digest: Callable[[Any], str] | None = None
    ) -> list[str]:
        """Returns the SHA-256 (its first 32 hex digits) of each file, reading only files that may have changed.

        A file that cannot be read has the hash "unreadable"; reading it later raises the reason.

        Args:
            files: paths of the files.
            workers: threads that read.
            digest: returns the hash of an open file; None: SHA-256.
        """
        absolute = {file: os.path.abspath(file) for file in dict.fromkeys(files)}  # many images may share a file
        paths = [absolute[file] for file in files]
        found: dict[str, str] = {}
        unknown = []
        for path in dict.fromkeys(paths):
            row = self._known.get(path)
            if row is not None and _STAT_IS_ENOUGH and row[:4] == _signature(path) and not _is_racy(row):
                found[path] = row[4]
            else:
                unknown.append(path)
        if unknown:
            look = functools.partial(_look, digest=digest or _hash)
            with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
                for path, row in zip(unknown, pool.map(look, unknown), strict=True):
                    self._known.pop(path, None)
                    if row is not None:
                        self._known[path] = row
                    found[path] = row[4] if row else _UNREADABLE
            self.read += len(unknown)
        return [found[path] for path in paths]


def contents(dataset: ImageDataset, index: FileIndex, workers: int | None = None) -> list[str]:
    """Returns a digest per image of the file or archive that its pixels come from.

    The reader names the file by its method `file_of(record)`, or all of its files by `files()`; its frame and window
    are part of the digest. For readers without these methods the images are decoded and their pixels hashed.
    """
    file_of = getattr(dataset.reader, "file_of", None)
    if file_of is not None or hasattr(dataset.reader, "files"):
        found = (
            _of_all_files(dataset, index, workers)
            if file_of is None
            else index.hashes([file_of(record) for record in dataset.records], workers)
        )
        asked = {name: getattr(dataset.reader, name, None) for name in _ASKED}
        suffix = "".join(f" {name}={value}" for name, value in asked.items() if value is not None)
        return [f"{content}{suffix}" for content in found]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda i: pixel_hash(dataset.image(i)).hex(), range(len(dataset))))


def files_of(dataset: ImageDataset) -> list[Path]:
    """Returns the files that `contents` hashes, each once; empty if the reader does not name them."""
    file_of = getattr(dataset.reader, "file_of", None)
    if file_of is None:
        return dataset.reader.files() if hasattr(dataset.reader, "files") else []
    return list(dict.fromkeys(file_of(record) for record in dataset.records))


def _of_all_files(dataset: ImageDataset, index: FileIndex, workers: int | None) -> list[str]:
    """Returns one digest for all images of a reader that cannot tell which file an image is in."""
    reader: Any = dataset.reader
    digest = hashlib.sha256()
    for part in [*index.hashes(reader.files(), workers), *sorted(reader.marks().items())]:
        digest.update(repr(part).encode())
    return [digest.hexdigest()[:32]] * len(dataset)


@functools.cache
def reading_code() -> str:
    """Returns a digest of the modules that read images and the versions of the libraries they call.

    Where it differs, the same files may yield other pixels."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted((package / _READING_ROOM).rglob("*.py")):
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    for name in _LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        digest.update(f"\0{name} {version}".encode())
    return digest.hexdigest()[:32]


def _look(path: str, digest: Callable[[Any], str]) -> list[Any] | None:
    """Returns a row of the index, or None for a file that cannot be read."""
    now = time.time_ns()
    try:
        with open(path, "rb", buffering=0) as file:
            signature = _row(os.fstat(file.fileno()))  # of before: what changes meanwhile is seen next time
            return [*signature, digest(file), now]
    except OSError:
        return None


def _hash(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**17):
        digest.update(block)
    return digest.hexdigest()[:32]


def _signature(path: str) -> list[int] | None:
    try:
        return _row(os.stat(path))
    except OSError:
        return None


def _row(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_racy(row: list[Any]) -> bool:
    return max(row[1], row[2]) + _RACY_NS > row[5]
