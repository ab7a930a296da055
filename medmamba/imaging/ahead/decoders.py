"""Chunks of prepared images, in order, read ahead of their use: in the caller's thread, or of many in processes."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from .memory import SharedMemory
from .order import Order, prepare
from .pool import Chunk, Pool

CHUNK = 16  # images per job: one message between processes, one transfer to a device
WORTH = 2.0  # seconds of decoding that are left when processes, which need a part of one to start, are worth it
PATIENCE = 0.3  # seconds of decoding before that is estimated


def cores() -> int:
    """Returns how many processor cores this process may use: as the system, its affinity and its container say."""
    count = os.process_cpu_count() if hasattr(os, "process_cpu_count") else None  # type: ignore[attr-defined, unused-ignore]
    if count is None and hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    count = count or os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def read_ahead(
    sources: Iterable[Any],
    order: Order,
    *,
    workers: int | None = None,
    chunk: int = CHUNK,
    ahead: int = 4,
    nice: int = 0,
    using: Callable[[SharedMemory], AbstractContextManager] | None = None,
    wait: bool = False,
) -> Generator[Chunk, None, None]:
    """Reads and prepares images, in their order, ahead of their use.

    A caller's script needs no `if __name__ == "__main__"`. What only this process holds, such as arrays, and readers of
    a script of one's own are prepared by threads.

    Args:
        sources: anything that `load_image` reads, a `MedicalImage`, or a `Deferred`; of any number, taken as needed in
            the caller's thread.
        order: what to do with each.
        workers: processes; 0: read in the caller's thread, when the images are asked for. None: begin like that, and
            start as many processes as there are cores once more than 2 seconds of decoding are left.
        chunk: images in a chunk; the last has fewer.
        ahead: chunks that may wait or be in use, beyond those that are being read.
        nice: added to the niceness of the processes.
        using: entered with the memory of the chunks, before any is filled, and left when all is done.

        wait: read nothing before the processes are ready, for measurements and tests.

    Yields:
        Chunks. Whoever is done with one calls `release`: the memory is bounded, and reading waits for it.

    Raises:
        ValueError: a number out of range.
    """
    if chunk < 1 or ahead < 1 or (workers is not None and workers < 0):
        raise ValueError(f"chunk and ahead must be at least 1, workers at least 0, got {chunk}, {ahead}, {workers}")
    left = operator.length_hint(sources, -1)
    source = iter(sources)
    yield from _in_this_thread(source, order, chunk, left, workers)
    first = list(itertools.islice(source, 1))
    if not first:
        return
    count = workers or cores()
    pool = Pool(order, count, chunk, ahead, nice)
    try:
        if wait:
            pool.wait()
        pool.begin(itertools.chain(first, source))  # they read while `using` prepares the memory
        with using(pool.memory) if using and pool.memory else contextlib.nullcontext():
            yield from pool.run()
    finally:
        pool.close()


def _in_this_thread(source: Iterator[Any], order: Order, chunk: int, left: int, workers: int | None) -> Iterator[Chunk]:
    """Yields chunks until processes are worth it, or there are no more images."""
    spent, done = 0.0, 0
    while not workers:
        items = []
        start = time.perf_counter()
        for one in itertools.islice(source, chunk):
            items.append(prepare(one, order))
        if not items:
            return
        took = time.perf_counter() - start
        spent, done = spent + took, done + len(items)
        yield Chunk(items)
        if len(items) < chunk:
            return
        more = WORTH if left < 0 else (left - done) * spent / done
        if workers is None and spent > PATIENCE and more >= WORTH and cores() > 1:
            return
