"""A queue that runs dependent commands on the available GPUs, several at a time; used by `python -m hub.zoo all`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medmamba.cli.training_options import STOPPED

GRACE = 20.0  # seconds for a stopped command to write its checkpoint


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        words: arguments of the Python interpreter.
        result: file that a finished run leaves; if it exists already, the job is skipped.
        after: names of the jobs it depends on.
        gpu: whether it occupies a slot on a GPU.
    """

    name: str
    words: tuple[str, ...]
    result: Path
    after: tuple[str, ...] = ()
    gpu: bool = True


class Queue:
    """Starts jobs in the given order, each once its dependencies have finished and a GPU slot is free.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, one per GPU; a single "" for CPU only.
        per_device: concurrent jobs per device: while one starts, reads or validates, another computes.
        logs: folder for the output of each job, NAME.log.
        seconds: stop all jobs (SIGTERM) after this time; the next run resumes them. None: run to the end.
    """

    def __init__(
        self, jobs: Sequence[Job], devices: Sequence[str], per_device: int, logs: Path, seconds: float | None = None
    ):
        self.jobs, self.devices, self.per_device, self.logs, self.seconds = jobs, devices, per_device, logs, seconds
        self.waiting = [job for job in jobs if not job.result.exists()]
        self.running: dict[str, tuple[Job, str, subprocess.Popen, float]] = {}
        self.failed: dict[str, int] = {}
        self._stopping = False
        self._began = time.monotonic()

    def run(self) -> int:
        """Runs all jobs; returns exit code 0 (all finished), 1 (a job failed) or 3 (stopped; call again to resume)."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with _stop_on_signals() as signals:
            try:
                while self.waiting or self.running:
                    over = self.seconds is not None and time.monotonic() - self._began > self.seconds
                    if over or signals:
                        self._stopping = True
                        break
                    self._collect()
                    self._start_what_can()
                    if not self.running and self.waiting:
                        break  # all remaining jobs depend on one that failed
                    time.sleep(0.1)
            finally:
                self._stop_all()
        for job in self.waiting:
            self._say(f"{job.name}: not finished" if self._stopping else f"{job.name}: not run, a dependency failed")
        return 1 if self.failed else STOPPED if self._stopping else 0

    def _start_what_can(self) -> None:
        used = Counter(device for job, device, *_ in self.running.values() if job.gpu)
        pending = {job.name for job in self.waiting} | set(self.running) | set(self.failed)
        for job in list(self.waiting):
            if pending.intersection(job.after):
                continue
            device = min(self.devices, key=lambda name: used[name])
            if job.gpu and used[device] >= self.per_device:
                continue
            if job.gpu:
                used[device] += 1
            self.waiting.remove(job)
            with (self.logs / f"{job.name}.log").open("ab") as log:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1"}
                process = subprocess.Popen(
                    [sys.executable, *job.words], env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.running[job.name] = job, device, process, time.monotonic()
            self._say(f"{job.name}: started{f' on GPU {device}' if job.gpu and device else ''}")

    def _collect(self) -> None:
        for name, (job, _, process, since) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            if code == 0 and job.result.exists():
                self._say(f"{name}: finished after {time.monotonic() - since:.0f} s")
            elif self._stopping or code == STOPPED:  # a terminal interrupts all processes
                self.waiting.insert(0, job)
                self._say(f"{name}: stopped after {time.monotonic() - since:.0f} s, can be resumed")
            else:
                self.failed[name] = code
                lines = (self.logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
                self._say(f"{name}: failed with exit code {code}\n    " + "\n    ".join(lines[-8:]))

    def _stop_all(self) -> None:
        for *_, process, _ in self.running.values():
            process.terminate()
        limit = time.monotonic() + GRACE
        for *_, process, _ in self.running.values():
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._collect()

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f}] {text}", flush=True)


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of acting on them, so that the queue can stop its jobs."""
    found: list[int] = []
    before = {number: signal.signal(number, lambda n, _: found.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
