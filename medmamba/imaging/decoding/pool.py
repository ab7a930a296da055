"""A pool of worker processes that decode compressed frames.

One pool per process, started by the first compressed frame. Workers hold no state between frames, so that they may be
killed at any time. They get the compressed frame and the few numbers that describe it over a pipe; nothing is written
to a disk, and nothing else of a file leaves this process. Safe from any number of threads and after a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import Any, BinaryIO, cast

from .worker import LENGTHS, SCRIPT, pack, read_exactly, write_all

_START_SECONDS = 60.0
_GRACE_SECONDS = 20.0  # beyond the limit that the worker keeps itself
_TIMER_STATUS = (-signal.SIGALRM,) if hasattr(signal, "SIGALRM") else (1,)  # 1 is that of faulthandler's timer
_MAX_WORKERS = 8
_MAX_HEADER = 1 << 16
_PIPE_BYTES = 1 << 20
# glibc: memory of one frame is reused for the next, without a page fault per page.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_F_SETPIPE_SZ = 1031  # Linux; in Python's fcntl from 3.10 on, but only there


class WorkerError(RuntimeError):
    """A frame that no worker decoded. `reason` is "decode", "memory", "time", "crash" or "start"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(job: dict[str, Any], data: bytes, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
    """Decodes one frame in a worker.

    Args:
        job: see `decoding.worker`: "syntax", "plugins", "options", "adobe_transform", and the limits "seconds" and
            "bytes" (of memory).
        data: the compressed frame.
        max_bytes: a larger answer is rejected.

    Returns:
        The header of the answer ("dtype", "shape", "photometric") and its pixels.

    Raises:
        WorkerError: not decoded.
    """
    return _the_pool().decode(job, data, max_bytes)


class _Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        self.ready = False
        env = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", **_KEEP_MEMORY)
        env.pop("PYTHONINSPECT", None)
        try:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=env,
                cwd=os.path.dirname(SCRIPT),  # not the user's folder, which may have to be moved or unmounted
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except (OSError, ValueError, TypeError):
            raise WorkerError("start") from None
        self.jobs, self.answers = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        _widen(self.jobs)
        _widen(self.answers)
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        try:
            write_all(self.jobs, pack({"path": path, "parent": os.getpid()}, 0))
        except OSError:
            self.end()
            raise WorkerError("start") from None

    def decode(self, job: dict[str, Any], data: bytes, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
        """Sends a job and return the answer.

        Raises:
            EOFError, OSError: the worker died.
            TimeoutError: it does not answer.
        """
        write_all(self.jobs, pack(job, len(data)), data)
        return self._receive(job["seconds"] + _GRACE_SECONDS, max_bytes)

    def get_ready(self) -> None:
        """Waits until a new worker has imported its decoders.

        Raises:
            WorkerError: it cannot.
        """
        if not self.ready:
            try:
                self._receive(_START_SECONDS, 0)
            except (EOFError, OSError, ValueError):
                raise WorkerError("start") from None
            self.ready = True

    def _receive(self, seconds: float, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
        self._wait(seconds)
        header_size, size = LENGTHS.unpack(read_exactly(self.answers, LENGTHS.size))
        if header_size > _MAX_HEADER or size > max_bytes:
            raise EOFError
        return json.loads(read_exactly(self.answers, header_size)), read_exactly(self.answers, size)

    def _wait(self, seconds: float) -> None:
        # A second guard in case the worker's own timer does not run, for example because the process was stopped.
        if os.name == "nt":
            return
        import select

        poll = select.poll()
        poll.register(self.answers, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise TimeoutError

    def end(self) -> int:
        """Kills the process, collect it and close the pipes.

        Returns its exit status, negative for a signal; one that was ending already keeps its own.
        """
        self.process.kill()
        for stream in (self.jobs, self.answers):
            with contextlib.suppress(OSError):
                stream.close()
        return self.process.wait()

    def abandon(self) -> None:
        """Closes the pipes in a forked process, whose parent owns the worker."""
        for stream in (self.jobs, self.answers):
            stream.close()
        self.process.returncode = 0  # the parent waits for it


class _Pool:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._idle: deque[_Worker] = deque()
        self._all: set[_Worker] = set()
        self._slots = threading.BoundedSemaphore(max(2, min(_MAX_WORKERS, os.cpu_count() or 1)))
        self._closed = False

    def decode(self, job: dict[str, Any], data: bytes, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
        with self._slots:
            worker = self._take()
            fresh = not worker.ready
            try:
                return self._run(worker, job, data, max_bytes)
            except WorkerError as error:
                if fresh or error.reason != "crash":
                    raise
            # An earlier frame may have damaged the worker, or it was killed: the result must not depend on that.
            return self._run(self._start(), job, data, max_bytes)

    def _take(self) -> _Worker:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._start()
            if worker.process.poll() is None:
                return worker
            self._drop(worker)

    def _start(self) -> _Worker:
        if self._closed:
            raise WorkerError("start")
        worker = _Worker()
        self._all.add(worker)
        return worker

    def _drop(self, worker: _Worker) -> int:
        self._all.discard(worker)
        return worker.end()

    def _run(
        self, worker: _Worker, job: dict[str, Any], data: bytes, max_bytes: int
    ) -> tuple[dict[str, Any], bytearray]:
        try:
            worker.get_ready()
            header, pixels = worker.decode(job, data, max_bytes)
        except TimeoutError:
            self._drop(worker)
            raise WorkerError("time") from None
        except (EOFError, OSError, ValueError):
            timed_out = self._drop(worker) in _TIMER_STATUS
            raise WorkerError("time" if timed_out else "crash") from None
        except BaseException:  # interrupted halfway through an answer
            self._drop(worker)
            raise
        self._idle.append(worker)
        if "error" in header:
            raise WorkerError(str(header["error"]))
        return header, pixels

    def close(self) -> None:
        """Ends all workers, also those at work."""
        self._closed = True
        while self._all:
            with contextlib.suppress(KeyError):
                worker = self._all.pop()
                worker.process.kill()
                worker.process.wait()
        self._idle.clear()

    def abandon(self) -> None:
        """Lets go of the parent's workers in a forked process."""
        for worker in list(self._all):
            worker.abandon()
        self._all.clear()
        self._idle.clear()


_pool: _Pool | None = None
_pool_lock = threading.Lock()
_watching_forks = False


def _the_pool() -> _Pool:
    global _pool, _watching_forks
    pool = _pool
    if pool is not None and pool.pid == os.getpid():
        return pool
    with _pool_lock:
        if _pool is None or _pool.pid != os.getpid():
            from multiprocessing.util import Finalize

            pool = _Pool()
            # Runs at the end of this process, also where it is a worker of multiprocessing, which skips atexit.
            Finalize(None, pool.close, exitpriority=0)
            if hasattr(os, "register_at_fork") and not _watching_forks:
                os.register_at_fork(after_in_child=_after_fork)
                _watching_forks = True
            _pool = pool
        return _pool


def _after_fork() -> None:
    """Forgets the parent's pool; its lock may have been held by a thread that does not exist here."""
    global _pool, _pool_lock
    _pool_lock = threading.Lock()
    if _pool is not None and _pool.pid != os.getpid():
        _pool.abandon()
        _pool = None


def _widen(stream: BinaryIO) -> None:
    """Lets a whole frame into the pipe at once, where the system allows; spares switches between the processes."""
    if sys.platform.startswith("linux"):
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(stream.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
