"""Reading ahead: the same images as without, in order, in bounded memory, whatever happens to a process."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_that_kills import Killer
from PIL import Image

from medmamba.config import PreprocessConfig
from medmamba.imaging.ahead import Order, Prepared, Unread, pool, read_ahead
from medmamba.imaging.ahead.process import DecodeProcess
from medmamba.imaging.image import FrameNeeded
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import adapt_channels, normalise, preprocess, resize
from medmamba.imaging.resample import resample

ORDER = Order(PreprocessConfig(input_size=(32, 32)))


def picture(seed=0, size=(40, 52, 3)):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    """Eleven files: grey, colour, not resized, 16 bits, bad, absent, and an animation."""
    shapes = [(40, 52, 3), (32, 32, 3), (64, 32), (32, 32)]
    for i in range(8):
        array = picture(i, shapes[i % 4])
        deep = array.astype(np.uint16) * 200 if i == 6 else array
        Image.fromarray(deep).save(tmp_path / f"{i}.png")
    (tmp_path / "8.png").write_text("no image")
    pages = [Image.fromarray(picture(i)) for i in (1, 2)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    return [tmp_path / name for name in (*(f"{i}.png" for i in range(9)), "absent.png", "a.tiff")]


def collect(chunks):
    found = []
    for chunk in chunks:
        for item in chunk.items:
            found.append(item)
            if isinstance(item, Prepared):
                item.pixels = item.pixels.copy()
        chunk.release()
    return found


def test_processes_give_what_this_thread_gives(files):
    alone = collect(read_ahead(files, ORDER, workers=0))
    for workers, chunk in ((1, 3), (2, 2)):
        ahead = read_ahead(iter(files), ORDER, workers=workers, chunk=chunk, wait=True)
        for one, other in zip(alone, collect(ahead), strict=True):
            assert type(one) is type(other) and one.source == other.source
            if isinstance(one, Prepared):
                assert one.notes == other.notes and one.deep == other.deep and one.pixels.dtype == other.pixels.dtype
                np.testing.assert_array_equal(one.pixels, other.pixels)
            else:
                assert one.error == other.error and type(one.cause) is type(other.cause)
    assert [type(item) for item in alone] == [Prepared] * 8 + [Unread] * 3
    assert isinstance(alone[-1].cause, FrameNeeded) and other.cause.n_frames == 2


def test_what_is_here_already_stays_here(files):
    arrays = [picture(i) for i in range(5)]
    found = collect(read_ahead([*arrays, files[0]], ORDER, workers=1, chunk=2, wait=True))
    assert [item.source for item in found] == ["numpy array"] * 5 + ["0.png"]


def test_a_million_images_take_no_more_memory_than_a_few(files):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield files[1]

    chunks = read_ahead(endless(), ORDER, workers=1, chunk=4, ahead=2)
    for _ in range(10):
        next(chunks).release()
    assert taken <= 4 * (10 + 2 + 2 + 1)
    chunks.close()


def test_more_is_asked_for_while_what_is_done_waits(files):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield files[1]

    chunks = read_ahead(endless(), ORDER, workers=1, chunk=1, ahead=4, wait=True)
    first = next(chunks)
    pool, before = chunks.gi_frame.f_locals["pool"], taken
    deadline = time.monotonic() + 60
    while 1 not in pool._done and time.monotonic() < deadline:
        if pool._board is None:
            time.sleep(0.01)
        else:
            pool._attend(pool._board, 0.01)  # as the caller does when it comes by
    assert 1 in pool._done
    first.release()
    next(chunks).release()
    assert taken > before
    chunks.close()


def test_a_chunk_that_is_kept_is_an_error_not_a_wait_without_end(files):
    chunks = read_ahead([files[1]] * 100, ORDER, workers=1, chunk=1, ahead=1)
    with pytest.raises(RuntimeError, match="release"):
        for _chunk in chunks:
            pass


@pytest.mark.parametrize("always", [False, True])
def test_a_process_that_ends_loses_no_image(files, always):
    killer = Killer(files[2], os.getpid(), always)
    sources = [files[0], killer, files[1], *files[3:6]]
    found = collect(read_ahead(sources, ORDER, workers=1, chunk=3, wait=True))
    kinds = [Prepared] * 6
    if always:
        kinds[1] = Unread
        assert "ended the process" in found[1].error
    assert [type(item) for item in found] == kinds


def test_a_process_has_its_next_job_before_it_has_answered(files, monkeypatch):
    sent, most = 0, 0
    plain_send, plain_receive = DecodeProcess.send, DecodeProcess.receive

    def send(self, *job):
        nonlocal sent, most
        plain_send(self, *job)
        sent += 1
        most = max(most, sent)

    def receive(self):
        nonlocal sent
        answer = plain_receive(self)
        sent -= 1
        return answer

    monkeypatch.setattr(DecodeProcess, "send", send)
    monkeypatch.setattr(DecodeProcess, "receive", receive)
    contents = [path.read_bytes() * 40 for path in files[:8]] * 4  # more than the pipe between them holds
    found = collect(read_ahead(contents, ORDER, workers=1, chunk=4, wait=True))
    assert most == 2 and sent == 0 and [type(item) for item in found] == [Prepared] * 32


def test_the_callers_thread_feeds_processes_that_do_as_they_should(files):
    chunks = read_ahead([str(f) for f in files] * 40, ORDER, workers=2, chunk=2, ahead=2, wait=True)
    count = alone = 0
    for chunk in chunks:
        reading = chunks.gi_frame.f_locals["pool"]
        count += len(chunk.items)
        alone += sorted(reading._board.sent) == [0, 1] and not any(t.is_alive() for t in reading._threads.values())
        chunk.release()
    assert count == 40 * len(files) and alone > 10 * len(files)


@pytest.mark.parametrize("listens", [True, False])
def test_threads_feed_processes_where_pipes_cannot_be_waited_for(files, monkeypatch, listens):
    monkeypatch.setattr(pool, "can_listen", lambda: listens)
    killer = Killer(files[2], os.getpid(), True)
    sources = [*files[:2], killer, *files[2:6], np.zeros((40, 30), np.uint8), *files[:7]]
    found = collect(read_ahead(sources, ORDER, workers=2, chunk=2, wait=True))
    assert [i for i, item in enumerate(found) if isinstance(item, Unread)] == [2]
    assert [item.source for item in found[8:]] == [f"{i}.png" for i in range(7)]


def test_jobs_of_a_process_that_ended_are_not_blamed(files):
    killer = Killer(files[2], os.getpid(), True)
    sources = [*files[:2], killer, *files[:7]]
    found = collect(read_ahead(sources, ORDER, workers=1, chunk=2, ahead=8, wait=True))
    assert [i for i, item in enumerate(found) if isinstance(item, Unread)] == [2]
    assert [item.source for item in found[3:]] == [f"{i}.png" for i in range(7)]


def test_what_cannot_be_sent_is_read_here(files):
    class Name(str):
        __module__ = "elsewhere"

    found = collect(read_ahead([*files[:3], Name(files[3]), *files[4:7]], ORDER, workers=2, chunk=2, wait=True))
    assert [item.source for item in found] == [f"{i}.png" for i in range(7)]


def test_an_error_while_a_job_is_sent_reaches_the_caller(files, monkeypatch):
    def send(self, *job):
        raise MemoryError("no memory for a job")

    monkeypatch.setattr(DecodeProcess, "send", send)
    with pytest.raises(MemoryError, match="for a job"):
        collect(read_ahead(files, ORDER, workers=2, chunk=2, wait=True))


def test_a_script_without_a_guard_works_and_leaves_nothing_behind(files, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom medmamba.imaging.ahead import Order, read_ahead\n"
        "from medmamba.config import PreprocessConfig\n"
        f"paths = {[str(f) for f in files]!r} * 3\n"
        "n = 0\n"
        "for chunk in read_ahead(paths, Order(PreprocessConfig(input_size=(32, 32))), workers=2, chunk=2, wait=True):\n"
        "    n += len(chunk.items); chunk.release()\n"
        "print('torch' in sys.modules, n)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["False", "33"] and not done.stderr


def test_children_end_with_a_parent_that_is_killed(files, tmp_path):
    code = (
        "import sys, time\nfrom medmamba.imaging.ahead import Order, read_ahead\n"
        "from medmamba.config import PreprocessConfig\nfrom medmamba.imaging.ahead import decoders\n"
        f"chunks = read_ahead([{str(files[0])!r}] * 1000, Order(PreprocessConfig(input_size=(32, 32))), workers=1, "
        "chunk=1, wait=True)\nnext(chunks)\n"
        "pool = chunks.gi_frame.f_locals['pool']\nprint(pool._processes[0]._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    said = tmp_path / "said"
    with said.open("w") as errors:
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 120
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child) and not said.read_text()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(7, 90), (64, 48), (150, 33), (33, 52)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resampling_is_that_of_pytorch(interpolation, size, channels):
    array = picture(3, (64, 48, channels))
    expected = F.interpolate(
        torch.from_numpy(array).permute(2, 0, 1)[None].float(), size, mode=interpolation, antialias=True
    )[0].permute(1, 2, 0)
    for given in (array, array.astype(np.float32)):
        np.testing.assert_allclose(resample(given, size, interpolation), expected.numpy(), atol=0.01)


@pytest.mark.parametrize("crop", ["squash", "center", "pad"])
@pytest.mark.parametrize(("channels", "in_chans"), [(1, 3), (3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_preprocessing_is_that_of_the_definition(crop, channels, in_chans, kind):
    array = picture(4, (50, 71, channels))
    array = array if kind is np.uint8 else array.astype(np.float32) / 255
    config = PreprocessConfig(input_size=(33, 40), crop_mode=crop)
    pixels = torch.from_numpy(load_image(array).pixels.copy()).permute(2, 0, 1)
    expected = normalise(resize(adapt_channels(pixels, in_chans)[None], config)[0], config)
    torch.testing.assert_close(preprocess(load_image(array), config, in_chans), expected, atol=1e-4, rtol=0)


def test_pixels_that_were_changed_count():
    image = load_image(picture())
    assert image.levels is not None and image.size == (40, 52)
    image.pixels[:] = 0.5
    assert image.levels is None
    assert preprocess(image, PreprocessConfig(input_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)).unique() == 0.5


def test_levels_are_not_the_callers_array():
    array = picture()
    image = load_image(array)
    before = array.copy()
    array[:] = 0
    np.testing.assert_array_equal(image.levels, before)
