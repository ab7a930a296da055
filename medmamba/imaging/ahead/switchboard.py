"""Lets one thread speak with many processes, where the system can wait for several pipes at once.

With a thread for each process, every answer wakes one of them, which takes the interpreter from the caller's thread and
has to wake it again. Both take longer than reading a message, and with many processes the caller waits for most of the
time.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .process import DecodeProcess


@dataclass
class Job:
    """Images to read into a slot of the shared memory.

    Attributes:
        number: of the chunk, in order.
    """

    number: int
    slot: int
    sources: list[Any]


class Switchboard:
    """The processes that the caller's thread feeds.

    Attributes:
        sent: jobs that each of these processes has, by its place in `processes`.

    Args:
        processes: all there are; what is in a place may change while it is not in `sent`.
    """

    def __init__(self, processes: Sequence[DecodeProcess | None]) -> None:
        self.sent: dict[int, deque[Job]] = {}
        self._processes = processes
        self._pipes: dict[int, int] = {}
        self._offered: deque[tuple[int, deque[Job]]] = deque()
        self._selector = selectors.DefaultSelector()
        self._woken, self._waking = os.pipe()
        for end in (self._woken, self._waking):
            os.set_blocking(end, False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def offer(self, index: int, sent: deque[Job]) -> None:
        """Hands a process over, with the jobs that it has not answered; any thread may do that."""
        self._offered.append((index, sent))
        self.wake()

    def wake(self) -> None:
        """Ends the wait in `listen`, or the next; any thread may do that."""
        with contextlib.suppress(OSError):  # full, so it will end anyway, or closed
            os.write(self._waking, b"\0")

    def listen(self, timeout: float) -> list[int]:
        """Waits until processes have answered or ended, `timeout` seconds at most; returns the places of these."""
        found = []
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                os.read(self._woken, 4096)
            else:
                found.append(key.data)
        while self._offered:
            index, sent = self._offered.popleft()
            process = self._processes[index]
            assert process is not None
            self.sent[index], self._pipes[index] = sent, process.pipe
            self._selector.register(process.pipe, selectors.EVENT_READ, index)
        return found

    def drop(self, index: int) -> deque[Job]:
        """Gives a process back, and returns the jobs that it has not answered."""
        self._selector.unregister(self._pipes.pop(index))
        return self.sent.pop(index)

    def close(self) -> None:
        self._selector.close()
        os.close(self._woken)
        os.close(self._waking)


def can_listen() -> bool:
    """Returns whether the system can wait for several pipes at once."""
    return os.name != "nt"
