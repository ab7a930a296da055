"""The process that reads images: takes jobs from its standard input until that ends.

It never imports the caller's main module, so a script needs no `if __name__ == "__main__"`, and it never touches a GPU.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from .memory import attach
from .messages import put, receive, send
from .order import Deferred, Order, Prepared, Unread, prepare

_FETCHES = 8  # remote objects that are waited for at the same time


def main(setup: dict[str, Any], jobs: BinaryIO, answers: BinaryIO) -> None:
    """Serves until the parent closes its end.

    Args:
        setup: "memory", the key of the shared memory, and "nice", added to this process's niceness.
        jobs: first a pickled `Order`, then pickled (offset, bytes, sources).
        answers: an empty message when ready; then one per job, see `messages.put`. A message that begins with "!" is
            the traceback of a bug.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if setup.get("nice") and hasattr(os, "nice"):
        os.nice(setup["nice"])
    memory = memoryview(attach(setup["memory"]))
    order: Order = pickle.loads(receive(jobs))
    send(answers, b"")
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_jobs, args=(jobs, waiting), name="medmamba-jobs", daemon=True).start()
    while (job := waiting.get()) is not None:
        offset, size, sources = job
        try:
            answer = put(_prepare_all(sources, order), memory[offset : offset + size])
        except Exception:
            answer = b"!" + traceback.format_exc().encode("utf-8", "replace")
        send(answers, answer)


def _take_jobs(jobs: BinaryIO, waiting: queue.SimpleQueue[Any]) -> None:
    """Takes jobs from the pipe as they come: were it full, the parent would wait there, not for the answers."""
    try:
        while True:
            waiting.put(pickle.loads(receive(jobs)))
    except EOFError:  # the parent is done, or gone
        pass
    finally:  # also after a job that makes no sense
        waiting.put(None)


def _prepare_all(sources: list[Any], order: Order) -> list[Prepared | Unread]:
    if len(sources) > 1 and any(isinstance(source, Deferred) and source.slow for source in sources):
        with ThreadPoolExecutor(_FETCHES) as pool:
            return list(pool.map(lambda source: prepare(source, order), sources))
    return [prepare(source, order) for source in sources]


def boot() -> None:
    """Begins with the line of JSON that the parent sends first; what libraries print goes to standard error."""
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        main(json.loads(jobs.readline()), jobs, answers)
    except (BrokenPipeError, EOFError):  # the parent is gone: nobody is left to tell
        os._exit(1)
