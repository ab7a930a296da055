"""The processes that read images ahead, fed by the caller's thread, and threads that do it where the caller cannot."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import SharedMemory
from .messages import take
from .order import Order, Prepared, Unread, prepare
from .process import DecodeProcess, ProcessGone, can_start, portable
from .switchboard import Job, Switchboard, can_listen

MEMORY = 2 << 30  # bytes of prepared images at most
_TICK = 0.5  # a wait without end cannot be interrupted on Windows
_HELD_UP = 0.001  # seconds for which more images are asked for while the caller could go on
_SENT = 2  # jobs that a process has: the next is there before one is done, so that it never waits for the caller
_STARTS = 3  # of a process in place of one that has ended


@dataclass
class Chunk:
    """Consecutive images.

    Attributes:
        items: what became of each.
        slot: its place in shared memory; None: memory of its own.
        runs: the pixels of neighbours of one kind, (n, h, w, c), where they lie in shared memory; else empty.
    """

    items: list[Prepared | Unread]
    slot: int | None = None
    runs: list[np.ndarray] = field(default_factory=list, repr=False)
    _free: deque[int] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Lets the memory of the pixels be used again; nobody may look at them afterwards."""
        if self._free is not None and self.slot is not None:
            self._free.append(self.slot)
            self._free = None


@dataclass
class _Answer:
    slot: int
    message: bytes


class Pool:
    """Processes that read images ahead.

    Threads, one for each, feed them until the caller comes by. From then on the caller's thread feeds those that do as
    they should; the threads see to the others, and read images themselves where a process cannot.
    """

    def __init__(self, order: Order, count: int, chunk: int, ahead: int, nice: int) -> None:
        self.order, self.chunk = order, chunk
        self._size = -(-chunk * order.bytes_per_image // 4096) * 4096
        slots = max(min((_SENT + 1) * count + ahead, MEMORY // self._size), ahead + 1)
        self._free = deque(range(slots))
        self._source: Iterator[Any] = iter(())
        self._submitted, self._exhausted = 0, False
        self._jobs: deque[Job] = deque()
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
        self._board: Switchboard | None = None
        if self._memory is not None and can_listen():
            with contextlib.suppress(OSError):  # too many open files: threads need none
                self._board = Switchboard(self._processes)
        self._called = False  # whether the caller comes by
        self._threads: dict[int, threading.Thread] = {}
        for index in range(count):
            self._begin_thread(index, deque())

    @property
    def memory(self) -> SharedMemory | None:
        return self._memory

    def _start(self) -> DecodeProcess | None:
        return None if self._memory is None else DecodeProcess(self._memory, self.order, self._nice)

    def _begin_thread(self, index: int, sent: deque[Job], given: Job | None = None) -> None:
        if index in self._threads:
            self._threads[index].join()  # it has handed its process over, and does nothing after that
        thread = threading.Thread(
            target=self._feed, args=(index, sent, given), name=f"medmamba-read-{index}", daemon=True
        )
        self._threads[index] = thread
        thread.start()

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
                    self._jobs.append(Job(self._submitted, self._free.pop(), taken))
                    self._work.notify()
                self._submitted += 1
            if time.perf_counter() - start > _HELD_UP:
                if self._called and self._board is not None:
                    self._attend(self._board, 0)  # nobody else gives the processes what has been named
                if self._wanted in self._done:
                    break
        return self._exhausted

    def run(self) -> Iterator[Chunk]:
        """Yields the chunks in order, and asks for more meanwhile."""
        self._called = True
        for number in itertools.count():
            self._wanted = number
            exhausted = self._submit()
            if number >= self._submitted:
                if exhausted:
                    self._kill()  # they end while the caller is busy with the last images
                    return
                raise RuntimeError("all chunks are in use: release() those that are done with")
            if self._board is not None:
                self._attend(self._board, 0)
                while number not in self._done:
                    self._attend(self._board, _TICK)
            with self._news:
                while number not in self._done:
                    self._news.wait(_TICK)
                found = self._done.pop(number)
            if isinstance(found, BaseException):
                raise found
            yield self._understood(found) if isinstance(found, _Answer) else found

    def _attend(self, board: Switchboard, timeout: float) -> None:
        """Takes what processes have answered, for which it waits so many seconds at most, and gives them more to do."""
        for index in board.listen(timeout):
            process, sent = self._processes[index], board.sent[index]
            assert process is not None
            found: Chunk | _Answer | BaseException
            try:
                answer = process.receive()  # first: one that has ended need not have been asked for anything
                found = _Answer(sent[0].slot, answer)
            except ProcessGone:
                sent = board.drop(index)  # before its pipe is closed, which a fork of this process may hold open
                process.end()
                self._begin_thread(index, sent)
                continue
            except RuntimeError as error:
                found = error
            self._done[sent.popleft().number] = found
        for least in range(_SENT):  # those that have fewer come first
            for index, sent in [*board.sent.items()] if self._jobs else ():
                if len(sent) <= least and not self._give(board, index, sent):
                    return

    def _give(self, board: Switchboard, index: int, sent: deque[Job]) -> bool:
        """Gives a process its next job, or to a thread where it cannot take that; returns whether there was one."""
        with self._work:
            if not self._jobs:
                return False
            job = self._jobs.popleft()
        try:
            taken = self._send(index, job)
        except Exception as error:  # in its turn
            self._done[job.number] = error
            return True
        if taken:
            sent.append(job)
            return True
        self._begin_thread(index, board.drop(index), job)
        return True

    def _understood(self, answer: _Answer) -> Chunk:
        # Here and not in the threads, which would take turns with the caller's for the interpreter.
        assert self._memory is not None
        try:
            items, runs = take(answer.message, self._part(answer.slot))
        except EOFError:
            raise RuntimeError("a process that reads images sent something else than an answer") from None
        return Chunk(items, answer.slot, runs, self._free)

    def _part(self, slot: int) -> memoryview:
        assert self._memory is not None
        return memoryview(self._memory.map)[slot * self._size : (slot + 1) * self._size]

    def _feed(self, index: int, sent: deque[Job], given: Job | None) -> None:
        """Feeds a process, which has `sent` and has not answered it yet, until the caller does.

        Where the process could not take a job, the thread is `given` that, and stays: there will be more of the kind.
        """
        stays = given is not None
        while True:
            process = self._processes[index]
            usable = process is not None and process.ready.is_set() and not process.ended
            if self._board is not None and self._called and usable and not stays:
                self._board.offer(index, sent)
                return
            taken, given = given or self._take(sent), None
            if self._closed:
                return
            job = taken or sent.popleft()
            found: list[Prepared | Unread] | bytes | BaseException
            try:  # whatever happens, the caller waits for this job
                if taken is None:
                    found = self._answer(index, job, sent)
                elif self._send(index, job):
                    sent.append(job)
                    continue
                else:
                    found = [prepare(source, self.order) for source in job.sources]
            except BaseException as error:
                found = error
            self._hand_over(job, found)

    def _take(self, sent: Collection[Job]) -> Job | None:
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

    def _hand_over(self, job: Job, found: list[Prepared | Unread] | bytes | BaseException) -> None:
        done: Chunk | _Answer | BaseException
        # A chunk keeps its slot even where it does not use it: slots bound the memory.
        if isinstance(found, bytes):
            done = _Answer(job.slot, found)
        elif isinstance(found, list):
            done = Chunk(found, job.slot, [], self._free)
        else:
            done = found
        with self._news:
            self._done[job.number] = done
            if job.number == self._wanted:
                self._news.notify()
                self._wake_caller()

    def _send(self, index: int, job: Job) -> bool:
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

    def _answer(self, index: int, job: Job, later: deque[Job]) -> list[Prepared | Unread] | bytes:
        """Receives the answer to a job; where the process has ended, reads its images one by one."""
        process = self._processes[index]
        assert process is not None
        try:
            return process.receive()
        except ProcessGone:
            process.end()
        with self._work:  # not to blame: it had not begun these
            self._jobs.extendleft(reversed(later))
            self._work.notify(len(later))
            self._wake_caller()
            later.clear()
        items: list[Prepared | Unread] = []
        for source in job.sources:  # each answer copied, to find the one that ended it
            items += self._alone(index, source, job.slot)
        return items

    def _alone(self, index: int, source: Any, slot: int) -> list[Prepared | Unread]:
        process = self._running(index)
        try:
            found, _ = take(process.run([source], slot * self._size, self._size), self._part(slot))
        except ProcessGone:
            process.end()
            name = str(source) if not isinstance(source, bytes) else "bytes"
            text = f"{name}: reading it ended the process that did (damaged file, or not enough memory)"
            return [Unread(name, text, OSError(text))]
        for item in found:
            if isinstance(item, Prepared):
                item.pixels = item.pixels.copy()
        return found

    def _running(self, index: int) -> DecodeProcess:
        """Returns the process in a place once it is ready, or another where it has ended, maybe while it started."""
        for _ in range(_STARTS):
            process = self._processes[index]
            if not self._closed and (process is None or process.ended or process.failed):
                if process is not None:
                    process.end()
                process = self._processes[index] = self._start()
            if process is not None and self._wait(process):
                return process
        raise RuntimeError("a process that reads images has ended, and no other could be started")

    def _wake_caller(self) -> None:
        if self._board is not None:
            self._board.wake()

    def _wait(self, process: DecodeProcess) -> bool:
        while not (process.failed or self._closed):  # first: each job of a process that failed would wait
            if process.ready.wait(_TICK):
                return True
        return False

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
        self._kill()  # all, before any is waited for
        for process in self._processes:
            if process is not None:
                process.end()
        for thread in self._threads.values():
            thread.join()
        for process in self._processes:
            if process is not None:
                process.end()
        if self._board is not None:
            self._board.close()
        if self._memory is not None:
            self._done.clear()
            self._memory.close()

    def _kill(self) -> None:
        for process in self._processes:
            if process is not None:
                process.kill()
