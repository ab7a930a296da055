"""Trees of image files: `root/<class>/image` and `root/<split>/<class>/image`, in a folder or in a zip file."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..imaging.find import find_in
from ..imaging.load import ImageError, MedicalImage, load_image, load_named
from .archive import DAMAGES, find_in_archive, has_windows_paths, member_paths
from .dataset import DatasetError, ImageDataset, Record
from .registry import DatasetEntry
from .tree import TreeOptions, index_tree

MAX_MEMBER_BYTES = 512 * 2**20
"""A file in a zip that unpacks to more than this is refused."""
MAX_RATIO = 500
"""A file in a zip of more than a mebibyte that is compressed more than this many times is refused as a bomb."""

_ARCHIVE_SUFFIXES = frozenset([".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"])
_READABLE_METHODS = {
    zipfile.ZIP_STORED: "stored",
    zipfile.ZIP_DEFLATED: "deflate",
    zipfile.ZIP_BZIP2: "bzip2",
    zipfile.ZIP_LZMA: "lzma",
}


class FolderReader:
    """Reads images from files under a folder; `frame` and `window` as in `load_image`.

    Records may also hold absolute paths.
    """

    frame: int | None = None
    window: tuple[float, float] | None = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, record: Record) -> MedicalImage:
        return load_image(self.file_of(record), frame=self.frame, window=self.window)

    def file_of(self, record: Record) -> Path:
        """Returns the file that determines what `read` returns."""
        return self.root / str(record.source)


class ZipReader:
    """Reads images straight from a zip file, nothing is unpacked to disk; `frame` and `window` as in `load_image`."""

    frame: int | None = None
    window: tuple[float, float] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def read(self, record: Record) -> MedicalImage:
        archive = self._archive()
        name = str(record.source)
        try:
            with archive.open(self._members[name]) as stream:
                # zipfile itself stops at the size that the (checked) directory declares, and compares the checksum.
                content = stream.read(MAX_MEMBER_BYTES + 1)
        except KeyError:
            raise ImageError(f"{self.path}: no longer holds {name!r}; was the file replaced?") from None
        except DAMAGES as exc:
            raise ImageError(f"{self.path}: {name!r} is damaged ({exc}); pack or download the archive again") from exc
        return load_named(content, name, frame=self.frame, window=self.window)

    def file_of(self, record: Record) -> Path:
        """Returns the file that determines what `read` returns."""
        return self.path

    def _archive(self) -> zipfile.ZipFile:
        # A file position shared between forked workers would mix their reads.
        if self._open is None or self._open[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            self._members = member_paths(archive.infolist())
            self._open = os.getpid(), archive
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None, "_members": {}}


def open_folder(
    root: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
    single_class: bool = False,
) -> ImageDataset:
    """Indexs a tree of images, see `open_dataset` for the arguments."""
    root = Path(root)
    options = TreeOptions(entry, classes, class_order, patient_pattern, single_class)
    return index_tree(find_in(root), FolderReader(root), str(root), options)


def open_zip(
    path: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
    single_class: bool = False,
) -> ImageDataset:
    """Indexs a tree of images inside a zip file, see `open_dataset` for the arguments."""
    path = Path(path)
    options = TreeOptions(entry, classes, class_order, patient_pattern, single_class)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            check_members(infos, str(path))
            found = find_in_archive(archive, member_paths(infos))
    except zipfile.BadZipFile as exc:
        raise DatasetError(f"{path}: not a complete zip file ({exc}); download it again") from exc
    dataset = index_tree(found, ZipReader(path), str(path), options)
    if not has_windows_paths(infos):
        return dataset
    return dataset.with_notes("the archive separates folders by backslashes, as Windows does; they were read as such")


def check_members(members: Sequence[zipfile.ZipInfo], where: str) -> None:
    """Rejects unsafe zip files: paths outside the archive, links, bombs, encryption, nested archives.

    Raises:
        DatasetError: with the name of the member and the reason.
    """
    seen: set[str] = set()
    paths = member_paths(members)
    by_member = {id(info): path for path, info in paths.items()}
    for info in members:
        name = by_member.get(id(info), info.filename)  # of members with one path only the last is in the table
        if name.endswith("/") and ".." not in PurePosixPath(name).parts and not name.startswith("/"):
            continue  # a folder
        # `orig_filename` is the name as stored: zipfile cuts names at a null byte.
        parts = PurePosixPath(name.replace("\\", "/")).parts
        reason = None
        if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in info.orig_filename:
            reason = "has a path that leads out of the archive"
        elif stat.S_ISLNK(info.external_attr >> 16):
            reason = "is a link"
        elif info.flag_bits & 0x1:
            reason = "is encrypted; unpack the archive first"
        elif name in seen or id(info) not in by_member:
            reason = "is in the archive twice"
        elif info.compress_type not in _READABLE_METHODS:
            reason = (
                f"is compressed by method {info.compress_type}, which Python cannot unpack (9 is Deflate64, which "
                "Windows takes for large archives); unpack it and give the folder"
            )
        elif PurePosixPath(name).suffix.lower() in _ARCHIVE_SUFFIXES:
            reason = "is an archive itself; unpack the outer one, then use the inner one"
        elif info.file_size > MAX_MEMBER_BYTES:
            reason = f"unpacks to {info.file_size / 2**20:.0f} MiB; the limit is {MAX_MEMBER_BYTES / 2**20:.0f}"
        elif info.file_size > 2**20 and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            reason = f"is compressed {info.file_size // max(info.compress_size, 1)} times, as only a zip bomb is"
        if reason:
            raise DatasetError(f"{where}: {name!r} {reason}")
        seen.add(name)
