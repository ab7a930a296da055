"""Chunks of prepared images, in order, read by threads and processes ahead of their use."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import pickle
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import SharedMemory
from .messages import take
from .order import Order, Prepared, Unread, prepare
from .process import DecodeProcess, ProcessGone, can_start, portable

CHUNK = 16  # images per job: one message between processes, one transfer to a device
WORTH = 2.0  # seconds of decoding that are left when processes, which need a part of one to start, are worth it
PATIENCE = 0.3  # seconds of decoding before that is estimated
MEMORY = 2 << 30  # bytes of prepared images at most
_TICK = 0.5  # a wait without end cannot be interrupted on Windows
_HELD_UP = 0.001  # seconds for which more images are asked for while the caller could go on
_SENT = 2  # jobs that a process has: the next is there before one is done, so that it never waits for the caller


@dataclass
class Chunk:
    """Consecutive images.

    Attributes:
        items: what became of each.
        slot: its place in shared memory; None: memory of its own.
        seconds: of decoding, in one process or thread.
        runs: the pixels of neighbours of one kind, (n, h, w, c), where they lie in shared memory; else empty.
    """

    items: list[Prepared | Unread]
    slot: int | None = None
    seconds: float = 0.0
    runs: list[np.ndarray] = field(default_factory=list, repr=False)
    _free: deque[int] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Lets the memory of the pixels be used again; nobody may look at them afterwards."""
        if self._free is not None and self.slot is not None:
            self._free.append(self.slot)
            self._free = None


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
    pool = _Pool(order, count, chunk, ahead, nice)
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
        yield Chunk(items, seconds=took)
        if len(items) < chunk:
            return
        more = WORTH if left < 0 else (left - done) * spent / done
        if workers is None and spent > PATIENCE and more >= WORTH and cores() > 1:
            return


@dataclass
class _Answer:
    slot: int
    message: bytes
    seconds: float


@dataclass
class _Job:
    number: int
    slot: int
    sources: list[Any]


class _Pool:
    """Threads that each feed a process, and read images themselves where it cannot."""

    def __init__(self, order: Order, count: int, chunk: int, ahead: int, nice: int) -> None:
        self.order, self.chunk = order, chunk
        self._size = -(-chunk * order.bytes_per_image // 4096) * 4096
        slots = max(min((_SENT + 1) * count + ahead, MEMORY // self._size), ahead + 1)
        self._free = deque(range(slots))
        self._source: Iterator[Any] = iter(())
        self._submitted, self._exhausted = 0, False
        self._jobs: deque[_Job] = deque()
        self._done: dict[int, Chunk | _Answer | BaseException] = {}
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # there are jobs, or no more to come
        self._news = threading.Condition(lock)  # the chunk that the caller waits for is there
        self._wanted = 0
        self._idle = 0  # threads that have nothing to do
        self._closed = False
        self._nice = nice
        self._memory: SharedMemory | None = None
        if can_start():
            try:
                self._memory = SharedMemory(slots * self._size)
            except OSError as error:
                warnings.warn(
                    f"no memory to share with other processes ({error}); images are read in threads", stacklevel=4
                )
        self._processes = [self._start() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._feed, args=(i,), name=f"medmamba-read-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def memory(self) -> SharedMemory | None:
        return self._memory

    def _start(self) -> DecodeProcess | None:
        return None if self._memory is None else DecodeProcess(self._memory, self.order, self._nice)

    def begin(self, source: Iterator[Any]) -> None:
        """Asks for the first images."""
        self._source = source
        self._submit()

    def _submit(self) -> bool:
        """Asks for as many chunks as there is room for; returns whether there are no more.

        Where naming images takes long, for one, if what the caller waits for is there.
        """
        start = time.perf_counter()
        while self._free and not self._exhausted:
            taken = list(itertools.islice(self._source, self.chunk))
            self._exhausted = len(taken) < self.chunk
            if taken:
                with self._work:  # the room used last is still in caches
                    self._jobs.append(_Job(self._submitted, self._free.pop(), taken))
                    self._work.notify()
                self._submitted += 1
            if self._wanted in self._done and time.perf_counter() - start > _HELD_UP:
                break
        return self._exhausted

    def run(self) -> Iterator[Chunk]:
        """Yields the chunks in order, and asks for more meanwhile."""
        for number in itertools.count():
            self._wanted = number
            exhausted = self._submit()
            if number >= self._submitted:
                if exhausted:
                    return
                raise RuntimeError("all chunks are in use: release() those that are done with")
            with self._news:
                while number not in self._done:
                    self._news.wait(_TICK)
                found = self._done.pop(number)
            if isinstance(found, BaseException):
                raise found
            yield self._understood(found) if isinstance(found, _Answer) else found

    def _understood(self, answer: _Answer) -> Chunk:
        # Here and not in the threads, which would take turns with the caller's for the interpreter.
        assert self._memory is not None
        try:
            items, runs = take(answer.message, self._part(answer.slot))
        except EOFError:
            raise RuntimeError("a process that reads images sent something else than an answer") from None
        return Chunk(items, answer.slot, answer.seconds, runs, self._free)

    def _part(self, slot: int) -> memoryview:
        assert self._memory is not None
        return memoryview(self._memory.map)[slot * self._size : (slot + 1) * self._size]

    def _feed(self, index: int) -> None:
        sent: deque[_Job] = deque()  # to the process, which has not answered yet
        while True:
            taken = self._take(sent)
            if self._closed:
                return
            start = time.perf_counter()
            job = taken or sent.popleft()
            found: list[Prepared | Unread] | bytes | BaseException
            try:  # whatever happens, the caller waits for this job
                if taken is None:
                    found = self._answer(index, job, sent)
                elif self._send(index, job):
                    sent.append(job)
                    continue
                else:
                    start = time.perf_counter()
                    found = [prepare(source, self.order) for source in job.sources]
            except BaseException as error:
                found = error
            self._hand_over(job, found, time.perf_counter() - start)

    def _take(self, sent: Collection[_Job]) -> _Job | None:
        """Waits for something to do; returns a job to begin, or None where an answer is to be received."""
        with self._work:
            if not sent:
                self._idle += 1
                while not self._jobs and not self._closed:
                    self._work.wait(_TICK)
                self._idle -= 1
                return None if self._closed else self._jobs.popleft()
            # Threads without any come first.
            return self._jobs.popleft() if len(sent) < _SENT and len(self._jobs) > self._idle else None

    def _hand_over(self, job: _Job, found: list[Prepared | Unread] | bytes | BaseException, took: float) -> None:
        done: Chunk | _Answer | BaseException
        # A chunk keeps its slot even where it does not use it: slots bound the memory.
        if isinstance(found, bytes):
            done = _Answer(job.slot, found, took)
        elif isinstance(found, list):
            done = Chunk(found, job.slot, took, [], self._free)
        else:
            done = found
        with self._news:
            self._done[job.number] = done
            if job.number == self._wanted:
                self._news.notify()

    def _send(self, index: int, job: _Job) -> bool:
        """Gives a job to the process; returns whether it is to answer."""
        process = self._processes[index]
        if process is None or not all(map(portable, job.sources)):
            return False
        if not process.ready.is_set() and (index == 0 or not self._wait(process)):
            return False  # one thread reads until its process is ready; more would hold up the caller's
        try:
            process.send(job.sources, job.slot * self._size, self._size)
        except (pickle.PicklingError, AttributeError, TypeError):  # of a class in a function, or with an open file
            return False
        return True

    def _answer(self, index: int, job: _Job, later: deque[_Job]) -> list[Prepared | Unread] | bytes:
        """Receives the answer to a job; where the process has ended, reads its images one by one."""
        process = self._processes[index]
        assert process is not None
        try:
            return process.receive()
        except ProcessGone:
            pass
        with self._work:  # not to blame: it had not begun these
            self._jobs.extendleft(reversed(later))
            self._work.notify(len(later))
            later.clear()
        items: list[Prepared | Unread] = []
        for source in job.sources:  # each answer copied, to find the one that ended it
            items += self._alone(index, source, job.slot)
        return items

    def _alone(self, index: int, source: Any, slot: int) -> list[Prepared | Unread]:
        process = self._processes[index]
        if not self._closed and (process is None or process.ended):
            process = self._processes[index] = self._start()
        if self._closed or process is None or not self._wait(process):
            raise RuntimeError("a process that reads images has ended, and no other could be started")
        try:
            found, _ = take(process.run([source], slot * self._size, self._size), self._part(slot))
        except ProcessGone:
            name = str(source) if not isinstance(source, bytes) else "bytes"
            text = f"{name}: reading it ended the process that did (damaged file, or not enough memory)"
            return [Unread(name, text, OSError(text))]
        for item in found:
            if isinstance(item, Prepared):
                item.pixels = item.pixels.copy()
        return found

    def _wait(self, process: DecodeProcess) -> bool:
        while not process.ready.wait(_TICK):
            if process.failed or self._closed:
                return False
        return True

    def wait(self) -> None:
        """Waits until all processes are ready or have failed."""
        for process in self._processes:
            if process is not None:
                self._wait(process)

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._jobs.clear()
            self._work.notify_all()
        for process in self._processes:  # all, before any is waited for
            if process is not None:
                process.kill()
        for process in self._processes:
            if process is not None:
                process.end()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            if process is not None:
                process.end()
        if self._memory is not None:
            self._done.clear()
            self._memory.close()
