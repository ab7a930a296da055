"""Reading ahead where something fails: a process at rest, the start of processes, the system's limits, slow names."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medmamba.config import PreprocessConfig
from medmamba.imaging.ahead import Order, Prepared, pool, process, read_ahead

ORDER = Order(PreprocessConfig(input_size=(32, 32)))


@pytest.fixture
def files(tmp_path):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(4)]


def collect(chunks):
    found = []
    for chunk in chunks:
        found += chunk.items
        chunk.release()
    return found


def pool_of(chunks):
    return chunks.gi_frame.f_locals["pool"]


def until(condition, meanwhile):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        meanwhile()
    assert condition()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_ends_while_it_has_nothing_to_do(files, monkeypatch, failing):
    chunks = read_ahead(files * 5, ORDER, workers=1, chunk=1, ahead=2, wait=True)
    held = [next(chunks) for _ in range(4)]
    reading = pool_of(chunks)
    board, ended = reading._board, reading._processes[0]
    until(lambda: 0 in board.sent and not board.sent[0], lambda: reading._attend(board, 0.05))
    drop, closed = board.drop, []
    board.drop = lambda index: closed.append(ended._answers.closed) or drop(index)
    ended.kill()
    ended._process.wait()
    boots = ["raise SystemExit(1)"] * failing + [process._BOOT] * 9  # of those in its place
    plain = reading._start
    monkeypatch.setattr(reading, "_start", lambda: monkeypatch.setattr(process, "_BOOT", boots.pop(0)) or plain())
    for chunk in held:
        chunk.release()
    items = [item for chunk in held for item in chunk.items] + collect(chunks)
    assert closed == [False]  # as long as somebody has it open, the system reports a pipe that was closed first
    assert [item.source for item in items] == [f.name for f in files] * 5
    assert all(isinstance(item, Prepared) for item in items)


def test_processes_read_while_images_are_named(files, monkeypatch):
    monkeypatch.setattr(pool, "_HELD_UP", -1.0)  # naming any image takes longer
    events = []

    class Named(os.PathLike):
        __module__ = "elsewhere"  # not a script's own

        def __init__(self, number):
            self.number, self.path = number, str(files[number % 4])

        def __fspath__(self):
            return self.path

        def __reduce__(self):
            events.append(("sent", self.number))
            return Path, (self.path,)

    def names():
        for number in range(10**6):
            events.append(("named", number))
            yield Named(number)

    chunks = read_ahead(names(), ORDER, workers=1, chunk=1, ahead=8, wait=True)
    next(chunks).release()
    reading = pool_of(chunks)
    until(lambda: 0 in reading._board.sent, lambda: next(chunks).release())
    held = []
    while reading._free or reading._submitted > reading._wanted + 1:
        held.append(next(chunks))
    start = reading._submitted
    for chunk in held:
        chunk.release()
    for _ in held:
        next(chunks).release()
    chunks.close()
    assert events.index(("sent", start)) < events.index(("named", start + 2))


def test_too_many_open_files_to_listen(files, monkeypatch):
    def full(_processes):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pool, "Switchboard", full)
    found = collect(read_ahead(files * 3, ORDER, workers=1, chunk=2, wait=True))
    assert [item.source for item in found] == [f.name for f in files] * 3


def test_processes_that_cannot_start(files, monkeypatch):
    monkeypatch.setattr(process, "_BOOT", "raise SystemExit(1)")
    found = collect(read_ahead(files * 3, ORDER, workers=2, chunk=2, wait=True))
    assert [item.source for item in found] == [f.name for f in files] * 3


def test_no_job_waits_for_a_process_that_failed():
    def wait(_timeout):
        raise AssertionError("waits")

    failed = SimpleNamespace(failed=True, ready=SimpleNamespace(wait=wait))
    assert not pool.Pool._wait(SimpleNamespace(_closed=False), failed)


def test_one_image_that_cannot_be_sent_takes_one_process_from_the_caller(files, monkeypatch):
    class Name(str):
        __module__ = "elsewhere"

    chunks = read_ahead([*files * 20, Name(files[0]), *files * 20], ORDER, workers=3, chunk=1, ahead=3, wait=True)
    next(chunks).release()
    reading = pool_of(chunks)
    until(lambda: len(reading._board.sent) == 3, lambda: next(chunks).release())
    plain, begun = reading._begin_thread, []
    monkeypatch.setattr(reading, "_begin_thread", lambda *job: begun.append(job[0]) or plain(*job))
    assert all(isinstance(item, Prepared) for item in collect(chunks))
    assert len(begun) == 1


def test_many_calls_in_turn_and_at_once_leave_nothing_behind(files):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files where Linux lists them")

    def call(found):
        for _ in range(2):
            found += [item.source for item in collect(read_ahead(files * 2, ORDER, workers=1, chunk=2, wait=True))]
            early = read_ahead(files * 9, ORDER, workers=1, chunk=1)
            next(early)
            early.close()

    call([])
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    results = [[], []]
    threads = [threading.Thread(target=call, args=(found,)) for found in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: threading.active_count() <= before[1], lambda: time.sleep(0.01))
    assert len(os.listdir("/proc/self/fd")) <= before[0]
    assert results == [[f.name for f in files] * 4] * 2
