"""Memory that processes share without a name that could be left behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import uuid
from typing import Any


class SharedMemory:
    """So many bytes, mapped here and in every process that is given `key`.

    On Linux it is anonymous, so a small /dev/shm, as in containers, does not matter; elsewhere on POSIX it is a file
    without a name; on Windows the mapping has a random name and ends with its last process. Pages take space when they
    are first written.

    Raises:
        OSError: there is no space.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._handle: int | None = None
        if os.name == "nt":
            self.key: dict[str, Any] = {"size": size, "tag": f"medmamba-{uuid.uuid4().hex}"}
            self.map = mmap.mmap(-1, size, tagname=self.key["tag"])  # type: ignore[call-arg, attr-defined, unused-ignore]
            return
        if hasattr(os, "memfd_create"):
            self._handle = os.memfd_create("medmamba")
        else:
            self._handle, path = tempfile.mkstemp(prefix="medmamba-")
            os.unlink(path)
        os.ftruncate(self._handle, size)
        self.key = {"size": size, "handle": self._handle}
        self.map = mmap.mmap(self._handle, size)

    @property
    def handles(self) -> tuple[int, ...]:
        """File descriptors that a process must inherit."""
        return () if self._handle is None else (self._handle,)

    def close(self) -> None:
        """Gives the memory back, once no array looks into it any more."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        with contextlib.suppress(BufferError):  # somebody still holds an array; it ends with that
            self.map.close()


def attach(key: dict[str, Any]) -> mmap.mmap:
    """Maps the memory of `SharedMemory.key` in another process."""
    if "tag" in key:
        return mmap.mmap(-1, key["size"], tagname=key["tag"])  # type: ignore[call-arg, attr-defined, unused-ignore]
    return mmap.mmap(key["handle"], key["size"])
