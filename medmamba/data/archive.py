"""Members of zip files, with uniform paths whatever system packed them."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ..imaging.find import Found, has_image_suffix, reason_by_content, reason_by_path
from ..imaging.formats import HEAD_BYTES

_UTF8_FLAG = 0x800
_MADE_ON_WINDOWS = 0  # of `ZipInfo.create_system`; PowerShell 5 and .NET before 4.6.1 write backslashes

DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
"""Further exceptions that reading a member may raise; RuntimeError if it is encrypted."""


def member_path(info: zipfile.ZipInfo, backslashes: bool) -> str:
    """Returns the path of a member with forward slashes; a folder's ends with one.

    Names that are not marked as UTF-8 but are it, as macOS writes them, are decoded so; others are in code page 437,
    as the format says.

    Args:
        backslashes: they separate folders, see `has_windows_paths`.
    """
    name = info.filename
    if not info.flag_bits & _UTF8_FLAG and not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    if backslashes:
        name = name.replace("\\", "/")
    end = "/" if name.endswith("/") else ""
    return "/".join(PurePosixPath(name).parts) + end if not name.startswith("/") else name


def has_windows_paths(infos: Sequence[zipfile.ZipInfo]) -> bool:
    """Returns whether backslashes in the names separate folders: no name has a slash, or Windows packed them all."""
    if not any("\\" in info.filename for info in infos):
        return False
    windows = all(info.create_system == _MADE_ON_WINDOWS for info in infos)
    return windows or not any("/" in info.filename for info in infos)


def member_paths(infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Returns all members by `member_path`, of equal paths the last, as `zipfile` does."""
    backslashes = has_windows_paths(infos)
    return {member_path(info, backslashes): info for info in infos}


def find_in_archive(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Found:
    """Sorts the members of an archive as `imaging.find.find_in` sorts the files of a folder."""
    found = Found()
    folders: set[str] = set()
    for path, info in members.items():
        parts = PurePosixPath(path).parts
        above = parts if path.endswith("/") else parts[:-1]
        if reason_by_path("/".join((*above, "x"))) is None:
            folders |= {"/".join(above[:depth]) for depth in range(1, len(above) + 1)}
        if path.endswith("/"):
            continue
        reason = reason_by_path(path)
        if reason is None and not has_image_suffix(parts[-1]):
            try:
                with archive.open(info) as stream:
                    reason = reason_by_content(parts[-1], stream.read(HEAD_BYTES))
            except DAMAGES:
                reason = "damaged"
        if reason is None:
            found.paths.append(path)
        else:
            found.passed_over.add(path, reason)
            found.others.append(path)
    found.paths.sort()
    found.folders = sorted(folders)
    return found
