"""The parent's end of a process that reads images."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from typing import Any, BinaryIO, cast

from .memory import SharedMemory
from .messages import receive, send
from .order import Deferred, Order

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.stdin.buffer.readline()); "
    "from medmamba.imaging.ahead.child import boot; boot()"
)
# One core each, nothing on GPUs; glibc reuses the memory of one image for the next, without a page fault per page.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class ProcessGone(Exception):
    """The process has ended in the middle of a job."""


class DecodeProcess:
    """A process that reads images into shared memory; one thread at a time uses it.

    Attributes:
        ready: set once it can be given jobs.
        failed: it could not start; it never will be ready.
        pipe: the file descriptor of its answers.
    """

    def __init__(self, memory: SharedMemory, order: Order, nice: int = 0) -> None:
        self._memory = memory
        self.ready = threading.Event()
        self.failed = False
        self.ended = False
        environment = {**os.environ, **_ENVIRONMENT}
        environment.pop("PYTHONINSPECT", None)
        options: dict[str, Any] = {"pass_fds": memory.handles} if memory.handles else {}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                **options,
            )
        except (OSError, ValueError, TypeError):
            self.failed = self.ended = True
            return
        # Not buffered: whoever waits for the pipe would not learn of an answer that is in a buffer.
        self._jobs, self._answers = cast(BinaryIO, self._process.stdin), cast(Any, self._process.stdout).raw
        self.pipe: int = self._answers.fileno()
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        lines = [path, {"memory": memory.key, "nice": nice}]
        self._first = "".join(json.dumps(line) + "\n" for line in lines).encode(), pickle.dumps(order)
        threading.Thread(target=self._start, name="medmamba-start", daemon=True).start()

    def _start(self) -> None:
        try:
            self._jobs.write(self._first[0])
            send(self._jobs, self._first[1])
            receive(self._answers)
            self.ready.set()
        except (EOFError, OSError, ValueError):
            self.failed = True

    def send(self, sources: list[Any], offset: int, size: int) -> None:
        """Asks for images to be read into a part of the shared memory; `receive` has the answer, in order.

        The process takes jobs at any time, so this does not wait for those that were sent before.

        Raises:
            PicklingError, AttributeError, TypeError: a source cannot be sent; nothing has been.
        """
        job = pickle.dumps((offset, size, sources))
        with contextlib.suppress(OSError, ValueError):  # it has ended, as `receive` notices
            send(self._jobs, job)

    def receive(self) -> bytes:
        """Waits for the next answer, a message that `messages.take` understands.

        Raises:
            ProcessGone: it has ended, by one of these images or by somebody else; the caller calls `end`.
            RuntimeError: a bug, with the traceback of the process.
        """
        try:
            answer = receive(self._answers)
        except (EOFError, OSError, ValueError):
            raise ProcessGone from None
        if answer[:1] == b"!":
            raise RuntimeError(f"a process that reads images failed:\n{answer[1:].decode('utf-8', 'replace')}")
        return answer

    def run(self, sources: list[Any], offset: int, size: int) -> bytes:
        """Does both, see `send` and `receive`."""
        self.send(sources, offset, size)
        return self.receive()

    def kill(self) -> None:
        """Begins to end the process."""
        with contextlib.suppress(OSError, AttributeError):  # it has ended, or could not be started
            self._process.kill()

    def end(self) -> None:
        """Ends the process at once; it holds nothing that needs saving."""
        if self.ended:
            return
        self.ended = True
        self.kill()
        self._process.wait()
        for stream in (self._jobs, self._answers):
            with contextlib.suppress(OSError, ValueError):
                stream.close()


def can_start() -> bool:
    """Returns whether this interpreter can be started again as a process of its own."""
    return (
        bool(sys.executable) and not getattr(sys, "frozen", False) and sys.platform not in ("emscripten", "wasi", "ios")
    )


def portable(source: Any) -> bool:
    """Returns whether another process can read this image, or would get a copy of pixels that are here already."""
    if isinstance(source, Deferred):
        return source.portable and type(source).__module__ != "__main__"
    return isinstance(source, str | os.PathLike | bytes) and type(source).__module__ != "__main__"
