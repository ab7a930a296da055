"""Trees of image files: `root/<class>/image` and `root/<split>/<class>/image`, in a folder or in a zip file."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..images import IMAGE_SUFFIXES, MedicalImage, load_image
from ..imaging.find import find_in
from ..registry import DatasetEntry
from .dataset import SPLITS, DatasetError, ImageDataset, Record, split_name
from .labels import resolve_classes

MAX_MEMBER_BYTES = 512 * 2**20
"""A file in a zip that unpacks to more than this is refused."""
MAX_RATIO = 500
"""A file in a zip of more than a mebibyte that is compressed more than this many times is refused as a bomb."""

_ARCHIVE_SUFFIXES = frozenset([".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"])
# Left behind by operating systems; never data.
_IGNORED_PARTS = ("__MACOSX",)


class FolderReader:
    """Reads images from files under a folder. Records may also hold absolute paths."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, record: Record) -> MedicalImage:
        return load_image(self.file_of(record))

    def file_of(self, record: Record) -> Path:
        """The file that decides what `read` returns."""
        return self.root / str(record.source)


class ZipReader:
    """Reads images straight from a zip file, nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def read(self, record: Record) -> MedicalImage:
        archive = self._archive()
        info = archive.getinfo(str(record.source))
        with archive.open(info) as stream:
            # zipfile itself stops at the size that the (checked) directory declares, and compares the checksum.
            content = stream.read(MAX_MEMBER_BYTES + 1)
        return load_image(content)

    def file_of(self, record: Record) -> Path:
        """The file that decides what `read` returns."""
        return self.path

    def _archive(self) -> zipfile.ZipFile:
        # A file position shared between forked workers would mix their reads.
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.path))
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_open": None}


def open_folder(
    root: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
) -> ImageDataset:
    """Index a tree of images, see `open_dataset` for the arguments."""
    root = Path(root)
    paths = find_in(root).paths
    return _tree(paths, FolderReader(root), str(root), entry, classes, class_order, patient_pattern)


def open_zip(
    path: str | os.PathLike[str],
    *,
    entry: DatasetEntry | None = None,
    classes: Sequence[str] | None = None,
    class_order: str = "auto",
    patient_pattern: str | None = None,
) -> ImageDataset:
    """Index a tree of images inside a zip file, see `open_dataset` for the arguments."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as exc:
        raise DatasetError(f"{path}: not a complete zip file ({exc}); download it again") from exc
    check_members(members, str(path))
    paths = sorted(info.filename for info in members if _is_image(info.filename))
    return _tree(paths, ZipReader(path), str(path), entry, classes, class_order, patient_pattern)


def check_members(members: Sequence[zipfile.ZipInfo], where: str) -> None:
    """Refuse a zip file that tries anything: paths out of it, links, bombs, encryption, archives in the archive.

    Raises:
        DatasetError: with the name of the member and the reason.
    """
    seen: set[str] = set()
    for info in members:
        name = info.filename
        # `orig_filename` is what the archive says: zipfile itself cuts names at a null byte.
        parts = PurePosixPath(name.replace("\\", "/")).parts
        reason = None
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in info.orig_filename:
            reason = "has a path that leads out of the archive"
        elif stat.S_ISLNK(info.external_attr >> 16):
            reason = "is a link"
        elif info.flag_bits & 0x1:
            reason = "is encrypted; unpack the archive first"
        elif name in seen:
            reason = "stands in the archive twice"
        elif PurePosixPath(name).suffix.lower() in _ARCHIVE_SUFFIXES:
            reason = "is an archive itself; unpack the outer one, then use the inner one"
        elif info.file_size > MAX_MEMBER_BYTES:
            reason = f"unpacks to {info.file_size / 2**20:.0f} MiB; the limit is {MAX_MEMBER_BYTES / 2**20:.0f}"
        elif info.file_size > 2**20 and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            reason = f"is compressed {info.file_size // max(info.compress_size, 1)} times, as only a zip bomb is"
        if reason:
            raise DatasetError(f"{where}: {name!r} {reason}")
        seen.add(name)


def patient_of(path: str, pattern: re.Pattern[str] | None) -> str | None:
    """Group 1 (or all) of the first match of `pattern` in the file name; None without a pattern or a match."""
    match = pattern.search(PurePosixPath(path).name) if pattern else None
    return match.group(1 if pattern and pattern.groups else 0) if match else None


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as exc:
        raise DatasetError(f"patient_pattern {pattern!r} is not a regular expression: {exc}") from exc


def _walk(root: Path) -> Iterator[str]:
    """Paths of images below `root`, relative and posix. Follows links to folders, each real folder once."""
    visited: set[str] = set()
    for where, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(where)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        relative = Path(where).relative_to(root)
        yield from (path for name in names if _is_image(path := (relative / name).as_posix()))


def _is_image(path: str) -> bool:
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith(".") or part in _IGNORED_PARTS for part in parts)
    return not hidden and PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _tree(
    paths: Sequence[str],
    reader: FolderReader | ZipReader,
    where: str,
    entry: DatasetEntry | None,
    classes: Sequence[str] | None,
    class_order: str,
    patient_pattern: str | None,
) -> ImageDataset:
    pattern = compile_pattern(patient_pattern)
    rows = list(_classify(paths, where))
    names, index = resolve_classes((folder for _, _, folder in rows), entry, classes, class_order, where)
    if len(names) < 2:
        raise DatasetError(
            f"{where}: only one class folder ({names[0]}); if the labels stand in a CSV file, give its path, and if "
            "this is part of a larger set, give classes= or dataset="
        )
    records = [Record(path, index[folder], split, patient_of(path, pattern)) for path, split, folder in rows]

    def order(record: Record) -> tuple[int, int, str, str]:
        # Within a class as torchvision's ImageFolder does, so that a published random split can be drawn again.
        path = PurePosixPath(str(record.source))
        split = SPLITS.index(record.split) if record.split else 0
        return split, int(record.label), str(path.parent), path.name  # type: ignore[arg-type]

    return ImageDataset(sorted(records, key=order), names, reader, name=Path(where).name)


def _classify(paths: Sequence[str], where: str) -> Iterator[tuple[str, str | None, str]]:
    """Path, split and name of the class folder of every image."""
    parts = {path: PurePosixPath(path).parts for path in paths}
    depth = _wrapper_depth(list(parts.values()))
    inner = {path: value[depth:] for path, value in parts.items()}
    # Images beside the folders have no label; a preview picture in the root of a download is common.
    labelled = {path: value for path, value in inner.items() if len(value) >= 2}
    tops = sorted({value[0] for value in labelled.values()})
    splits = [top for top in tops if split_name(top)]
    if splits:
        others = [top for top in tops if not split_name(top)]
        if others:
            raise DatasetError(
                f"{where}: folders {', '.join(splits)} look like splits, but {', '.join(others[:5])} do not; "
                "use root/<class>/image or root/<split>/<class>/image, not both"
            )
        labelled = {path: value for path, value in labelled.items() if len(value) >= 3}
    if not labelled:
        raise DatasetError(
            f"{where}: {len(paths)} images, none of them in a class folder; arrange them as root/<class>/image or "
            f"root/<split>/<class>/image, or describe them in a CSV file (path,label). Images: "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    for path, value in labelled.items():
        yield (path, split_name(value[0]), value[1]) if splits else (path, None, value[0])


def _wrapper_depth(paths: Sequence[tuple[str, ...]]) -> int:
    """How many outer folders hold everything and mean nothing, such as `kvasir-dataset/` in its download."""
    depth = 0
    while paths:
        firsts = {path[depth] if len(path) > depth + 2 else "" for path in paths}
        first = firsts.pop()
        if firsts or not first or split_name(first):
            break
        depth += 1
    return depth
