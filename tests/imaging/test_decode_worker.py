"""The worker process for compressed frames: limits, restarts, threads, forks, and what it gets and leaves behind."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medmamba.imaging.load import ImageError, load_image

pydicom = pytest.importorskip("pydicom", minversion="3.0")
# ruff: noqa: E402

from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from medmamba.imaging.decoding import pool

FILES = ("MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm")
posix = pytest.mark.skipif(os.name == "nt", reason="signals and forks")
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


def shipped(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom comes without {name}")
    return str(path)


def job(data: bytes = b"", **changes):
    options = {
        "rows": 64,
        "columns": 64,
        "samples_per_pixel": 1,
        "bits_allocated": 16,
        "bits_stored": 16,
        "pixel_representation": 1,
        "photometric_interpretation": "MONOCHROME2",
        "planar_configuration": 0,
        "number_of_frames": 1,
    }
    base = {
        "syntax": "1.2.840.10008.1.2.4.80",
        "plugins": ["gdcm", "pylibjpeg", "pyjpegls"],
        "adobe_transform": None,
        "seconds": 240,
        "bytes": 1 << 29,
        "options": options,
    }
    return {**base, **changes}


def frame() -> bytes:
    from pydicom.encaps import get_frame

    return get_frame(pydicom.dcmread(shipped(FILES[0])).PixelData, 0, number_of_frames=1)


def workers() -> list:
    return list(pool._the_pool()._all)


def wait_until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_one_worker_serves_many_frames():
    expected = pydicom.dcmread(shipped("MR_small.dcm")).pixel_array
    load_image(shipped(FILES[0]))
    before = {worker.process.pid for worker in workers()}
    for name in FILES[:3] * 3:
        image = load_image(shipped(name))
        assert image.value_range == (expected.min(), expected.max())
    assert {worker.process.pid for worker in workers()} == before


@posix
def test_a_worker_killed_while_idle_is_replaced():
    image = load_image(shipped(FILES[0]))
    for worker in workers():
        os.kill(worker.process.pid, signal.SIGKILL)
    again = load_image(shipped(FILES[0]))
    assert np.array_equal(image.pixels, again.pixels)


@posix
def test_a_decoder_that_crashes_is_an_error_and_the_next_frame_is_read(monkeypatch):
    """The real thing: GDCM ends its process where a colour stream meets a grey description."""
    codecs = pytest.importorskip("imagecodecs")
    stream = codecs.jpeg2k_encode(np.zeros((64, 64, 3), np.uint8), level=0, reversible=True, codecformat="j2k")
    description = job(syntax="1.2.840.10008.1.2.4.90", plugins=["gdcm"])
    description["options"] |= {"bits_allocated": 8, "bits_stored": 8, "pixel_representation": 0}
    with pytest.raises(pool.WorkerError) as error:
        pool.decode(description, bytes(stream), 1 << 20)
    assert error.value.reason in ("crash", "decode")
    assert load_image(shipped(FILES[0])).size == (64, 64)


@posix
def test_a_worker_that_dies_at_work_is_an_error_of_the_image(monkeypatch):
    real = pool._Worker.decode

    def dying(self, *args):
        os.kill(self.process.pid, signal.SIGSEGV)
        return real(self, *args)

    monkeypatch.setattr(pool._Worker, "decode", dying)
    with pytest.raises(ImageError, match=r"the pixel data \(JPEG-LS .* crashed"):
        load_image(shipped(FILES[0]))
    monkeypatch.undo()
    assert load_image(shipped(FILES[0])).size == (64, 64)


def test_time_is_limited():
    pool.decode(job(), frame(), 8192)  # warm
    with pytest.raises(pool.WorkerError) as error:
        pool.decode(job(seconds=1e-5), frame(), 8192)
    assert error.value.reason == "time"
    header, pixels = pool.decode(job(), frame(), 8192)
    assert header["shape"] == [64, 64] and len(pixels) == 8192


@linux
def test_memory_is_limited():
    description = job(bytes=1 << 20)
    description["options"] |= {"rows": 8192, "columns": 8192}
    with pytest.raises(pool.WorkerError) as error:
        pool.decode(description, frame(), 1 << 30)
    assert error.value.reason in ("memory", "decode", "crash")
    assert len(pool.decode(job(), frame(), 8192)[1]) == 8192


def test_an_answer_larger_than_expected_is_not_taken():
    with pytest.raises(pool.WorkerError) as error:
        pool.decode(job(), frame(), 8191)
    assert error.value.reason == "crash"


def test_limits_and_missing_processes_are_explained(monkeypatch):
    texts = {
        "time": "stopped after 1",
        "memory": "stopped at .* MiB",
        "crash": "crashed",
        "decode": "cannot be decoded",
    }
    for reason, text in {**texts, "start": "cannot be started"}.items():

        def failing(*args, reason=reason):
            raise pool.WorkerError(reason)

        monkeypatch.setattr(pool, "decode", failing)
        with pytest.raises(ImageError, match=text):
            load_image(shipped(FILES[0]))


def test_eight_threads():
    expected = {name: load_image(shipped(name)).pixels for name in FILES}
    wrong = []

    def work(number):
        for turn in range(12):
            name = FILES[(number + turn) % len(FILES)]
            if not np.array_equal(load_image(shipped(name)).pixels, expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(workers()) <= max(2, min(8, os.cpu_count() or 1))


def _size_in_child(path, queue):
    image = load_image(path)
    queue.put((image.pixels.tobytes(), [worker.process.pid for worker in workers()], os.getpid()))


@linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_the_child_has_workers_of_its_own():
    image = load_image(shipped(FILES[0]))
    ours = {worker.process.pid for worker in workers()}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_size_in_child, args=(shipped(FILES[0]), queue))
    child.start()
    pixels, theirs, _ = queue.get(timeout=240)
    child.join()
    assert pixels == image.pixels.tobytes() and child.exitcode == 0
    assert theirs and not ours & set(theirs)
    wait_until(lambda: not any(alive(pid) for pid in theirs))
    assert np.array_equal(load_image(shipped(FILES[0])).pixels, image.pixels)
    assert ours & {worker.process.pid for worker in workers()}


# Without medmamba/__init__, which takes seconds for torch.
SCRIPT = """
    import os, sys, types
    package = sys.modules["medmamba"] = types.ModuleType("medmamba")
    package.__path__ = [sys.argv[2]]
    from medmamba.imaging.load import load_image
    from medmamba.imaging.decoding import pool
    {body}
"""


def script(body: str, **options):
    text = textwrap.dedent(SCRIPT).format(body=textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-c", text, shipped(FILES[0]), str(Path(pool.__file__).parents[2])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])),
        text=True,
        **options,
    )


@linux
def test_a_plain_script_reads_ends_cleanly_and_keeps_its_standard_input():
    """Without `if __name__ == "__main__"`, and the worker must not read what is meant for the script."""
    body = """
load_image(sys.argv[1])
print(pool._the_pool()._all.copy().pop().process.pid, sys.stdin.readline().strip(), sys.stdin.readline().strip())
"""
    process = script(body, stdin=subprocess.PIPE)
    out, err = process.communicate("first\nsecond\n", timeout=120)
    pid, first, second = out.split()
    assert (first, second, err, process.returncode) == ("first", "second", "", 0)
    assert not alive(int(pid))


@linux
def test_a_killed_parent_takes_its_worker_along_even_where_a_fork_holds_the_pipe():
    body = """
load_image(sys.argv[1])
child = os.fork()
if child == 0:
    import time
    time.sleep(600)
    os._exit(0)
print(child, pool._the_pool()._all.copy().pop().process.pid, flush=True)
sys.stdin.read()
"""
    process = script(body, stdin=subprocess.PIPE)
    child, worker = (int(word) for word in process.stdout.readline().split())
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not alive(worker))
    finally:
        os.kill(child, signal.SIGKILL)
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


@linux
def test_no_zombies_and_no_open_pipes():
    load_image(shipped(FILES[0]))
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(pool.WorkerError):
            pool.decode(job(seconds=1e-5), frame(), 8192)
        load_image(shipped(FILES[0]))
    assert len(os.listdir("/proc/self/fd")) <= open_files + 1
    states = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                states.append(fields[0])
    assert "Z" not in states


def test_interrupted_reads_do_not_mix_answers(monkeypatch):
    """After Ctrl-C in the middle of an answer, the next frame must not get the rest of it."""
    expected = {name: load_image(shipped(name)).pixels for name in FILES}
    real = pool._Worker._wait

    def interrupted(self, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._Worker, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_image(shipped(FILES[0]))
    monkeypatch.setattr(pool._Worker, "_wait", real)
    for name in FILES:
        assert np.array_equal(load_image(shipped(name)).pixels, expected[name])


def test_the_worker_gets_pixels_and_their_description_only(monkeypatch):
    sent = []
    real = pool.decode
    monkeypatch.setattr(pool, "decode", lambda *args: sent.append(args) or real(*args))
    ds = pydicom.dcmread(shipped(FILES[0]))
    ds.PatientName, ds.PatientID = "Doe^Jane", "MRN-4711-X"
    load_image(ds)
    description, data, _ = sent[0]
    assert set(description) == {"syntax", "plugins", "adobe_transform", "seconds", "bytes", "options"}
    assert not any(text in repr(description) or text.encode() in data for text in ("Doe", "4711"))
    assert data == frame()


@linux
def test_the_worker_opens_nothing_of_the_user():
    load_image(shipped(FILES[0]))
    for worker in workers():
        folder = Path(f"/proc/{worker.process.pid}")
        targets = [os.readlink(entry) for entry in (folder / "fd").iterdir()]
        assert all(target.startswith(("pipe:", "/dev/null")) for target in targets), targets
        maps = (folder / "maps").read_text()
        assert "libtorch" not in maps
        limits = (folder / "limits").read_text()
        assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]


@pytest.mark.skipif(sys.platform == "win32", reason="as on Linux")
def test_in_data_loader_workers():
    from torch.utils.data import DataLoader

    paths = [shipped(FILES[0])] * 4
    batches = list(DataLoader(_Pixels(paths), batch_size=2, num_workers=2))
    expected = load_image(paths[0]).pixels
    assert len(batches) == 2 and all(np.array_equal(item, expected) for batch in batches for item in batch.numpy())


class _Pixels:
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return load_image(self.paths[index]).pixels


def test_damaged_frames_do_not_cost_a_worker():
    load_image(shipped(FILES[0]))
    before = {worker.process.pid for worker in workers()}
    ds = pydicom.dcmread(shipped(FILES[0]))
    data = bytearray(frame())
    data[60:-200] = bytes(len(data) - 260)
    ds.PixelData = encapsulate([bytes(data)])
    with contextlib.suppress(ImageError):
        load_image(ds)
    assert {worker.process.pid for worker in workers()} == before
