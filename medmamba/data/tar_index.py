"""Members of tar files by position, so that any of them can be read without the others."""

from __future__ import annotations

import mmap
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .dataset import DatasetError

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_FILE_TYPES = (tarfile.REGTYPE[0], tarfile.AREGTYPE[0])


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: path in the archive.
        offset: position of its content in the tar, in bytes.
        size: length of its content, in bytes.
        content: the content where it was asked for, else None.
    """

    name: str
    offset: int
    size: int
    content: bytes | None


def tar_members(path: Path, wanted: frozenset[str] = frozenset()) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar, in its order.

    Headers of plain names are read directly, about ten times as fast as `tarfile` does, which matters for millions of
    members; a tar with any other kind of header (long names, links, sparse files) is left to `tarfile`.

    Args:
        path: the tar.
        wanted: suffixes, in lower case and with the dot, of files whose content to return.

    Raises:
        DatasetError: not a tar, compressed, or cut off.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:6].startswith(_COMPRESSED):
                raise DatasetError(
                    f"{path}: a compressed tar, whose files cannot be read one by one; unpack it to a plain .tar "
                    "(gunzip, unxz, zstd -d): images are compressed already"
                )
            plain = _plain(data, wanted)
            yield from _any(data, path, wanted) if plain is None else plain
    except (tarfile.TarError, ValueError, OSError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: not a complete tar file ({error}); download or pack it again") from error


def _plain(data: mmap.mmap, wanted: frozenset[str]) -> list[Member] | None:
    """Returns the members, or None if there is a header of another kind."""
    found = []
    position, end = 0, len(data)
    while position + _BLOCK <= end and data[position]:
        header = data[position : position + _BLOCK]
        kind = header[156]
        if (kind not in _FILE_TYPES and kind != tarfile.DIRTYPE[0]) or header[124] & 0x80:
            return None
        check = header[148:156]
        # The sum of all bytes, in which those of the checksum count as spaces; Adler-32 has it in its lower half.
        if (zlib.adler32(header) & 0xFFFF) != (1 + _size(check) - 8 * 32 + sum(check)) % 65521:
            raise ValueError(f"a damaged header at byte {position}")
        size = _size(header[124:136])
        start = position + _BLOCK
        if start + size > end:
            raise ValueError(f"cut off at byte {end}")
        if kind in _FILE_TYPES:
            name = header[:100].split(b"\0", 1)[0]
            if header[257:262] == b"ustar" and header[345]:
                name = header[345:500].split(b"\0", 1)[0] + b"/" + name
            found.append(_member(name.decode("utf-8", "surrogateescape"), start, size, data, wanted))
        position = start + -(-size // _BLOCK) * _BLOCK
    if position + _BLOCK > end:
        raise ValueError("its end is missing")
    return found


def _any(data: mmap.mmap, path: Path, wanted: frozenset[str]) -> Iterator[Member]:
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # which would grow with the archive
            if info.offset_data + info.size > len(data):
                raise ValueError(f"cut off at byte {len(data)}")
            if info.isreg() and not info.issparse():
                yield _member(info.name, info.offset_data, info.size, data, wanted)


def _member(name: str, start: int, size: int, data: mmap.mmap, wanted: frozenset[str]) -> Member:
    name = name.removeprefix("./")
    dot = name.rfind(".")
    content = data[start : start + size] if dot >= 0 and name[dot:].lower() in wanted else None
    return Member(name, start, size, content)


def _size(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)
