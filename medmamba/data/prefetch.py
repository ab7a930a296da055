"""Reads a few batches before they are asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Found = TypeVar("Found")

AHEAD = 4
"""Batches that are read before they are asked for; so many are in memory at most, besides the one in use."""
READERS = 4  # threads that read from a disk, enough to keep an SSD busy


def in_advance(read: Callable[[Part], Found], parts: Iterable[Part], readers: int = READERS) -> Iterator[Found]:
    """Yields `read(part)` of each part in order, with `AHEAD` of them being read by so many threads."""
    waiting: collections.deque[Future[Found]] = collections.deque()
    with ThreadPoolExecutor(readers, "images") as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(read, part))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
