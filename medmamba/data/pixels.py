"""The array for decoded images, in memory or in a file: 8 bits until an image has more."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..utils.files import replace_synced

Warnings = dict[str, list[int]]
"""Reader warnings: text without "warning: ", and the rows of the images concerned."""

_PREFIX = "warning:"
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_CHUNK = 256  # images that are widened at once


class Pixels:
    """Decoded images (N, H, W, C), uint8 or uint16; a context manager.

    Args:
        shape: (N, H, W, C).
        deep: whether to begin with 16 bits.
        path: keep them in this `.npy` file, which appears with `publish`; None: in memory.

    Attributes:
        array: the images so far.

    Raises:
        OSError: the file cannot be made, or there is no space for all of it.
    """

    def __init__(self, shape: tuple[int, ...], deep: bool = False, path: Path | None = None) -> None:
        self.path = path
        self._shape, self._partial = shape, path
        self._notes: dict[int, tuple[str, ...]] = {}
        self.array = self._allocate(np.uint16 if deep else np.uint8)

    def __enter__(self) -> Pixels:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None and self._partial is not None:
            self.array = np.empty(0, np.uint8)  # closes the file, which Windows does not remove otherwise
            self._partial.unlink(missing_ok=True)

    @property
    def deep(self) -> bool:
        """Whether the images are kept with 16 bits."""
        return self.array.dtype == np.uint16

    def put(self, row: int, stored: np.ndarray, notes: Iterable[str] = ()) -> None:
        """Keeps one image.

        Args:
            stored: (H, W, C), or (H, W, 1) for C equal channels; uint8, or uint16 where the file has more than 8 bits.
                The first such image changes the whole array to 16.
            notes: notes of its reader, of which warnings are kept.
        """
        if stored.dtype == np.uint16:
            self.widen()
        self.array[row] = stored.astype(np.uint16) * 257 if self.deep and stored.dtype == np.uint8 else stored
        if said := said_by(notes):
            self._notes[row] = said

    def widen(self) -> None:
        """Converts 8 bits to 16 without loss: level v of 255 becomes level 257 v of 65535."""
        if self.deep:
            return
        old, old_partial = self.array, self._partial
        new = self._allocate(np.uint16)
        for start in range(0, len(old), _CHUNK):
            new[start : start + _CHUNK] = old[start : start + _CHUNK].astype(np.uint16) * 257
        self.array = new
        del old
        if self.path is not None and old_partial is not None:
            old_partial.unlink(missing_ok=True)

    def warnings(self) -> Warnings:
        """Returns warnings by text; those that differ only in numbers count as one, quoted from the first image."""
        return group_warnings(self._notes)

    def publish(self) -> None:
        """Moves the file into place; the array is no longer available."""
        assert self.path is not None and self._partial is not None
        self.array = np.empty(0, np.uint8)
        replace_synced(self._partial, self.path)

    def _allocate(self, kind: type) -> np.ndarray:
        if self.path is None:
            return np.empty(self._shape, kind)
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:12]}.part")
        try:
            np.lib.format.open_memmap(self._partial, "w+", kind, self._shape)
            reserve(self._partial)
            return np.lib.format.open_memmap(self._partial, "r+")
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise


def said_by(notes: Iterable[str]) -> tuple[str, ...]:
    """Returns the warnings among the notes of a reader, without their prefix."""
    return tuple(note.removeprefix(_PREFIX).strip() for note in notes if note.startswith(_PREFIX))


def group_warnings(notes: dict[int, tuple[str, ...]]) -> Warnings:
    """Groups rows by warning; texts that differ only in numbers count as one, quoted from its first row."""
    words: dict[str, str] = {}
    rows: Warnings = {}
    for row in sorted(notes):
        for first in {words.setdefault(_NUMBER.sub("#", text), text): None for text in notes[row]}:
            rows.setdefault(first, []).append(row)
    return rows


def reserve(path: Path) -> None:
    """Allocates the space of a sparse file; writing to a hole through a map kills the process on a full disk.

    Raises:
        OSError: there is not enough of it.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        kept = file.read(4096)  # the header
        file.seek(0)
        for start in range(0, size, 2**20):
            file.write(bytes(min(2**20, size - start)))
        file.seek(0)
        file.write(kept)
        os.fsync(file.fileno())
