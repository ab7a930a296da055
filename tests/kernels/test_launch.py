"""Launching from several threads, against a driver that is not there: what each launch hands over is its own."""

import contextlib
import ctypes
import struct
import sys
import threading

import pytest
import torch

from medmamba.kernels.cuda import nvrtc
from medmamba.kernels.once import once

SIGNATURE = "ppillf"


@pytest.fixture
def impatient():
    """Threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Driver:
    """Reads arguments when a kernel is launched, as the CUDA driver does."""

    def __init__(self, signature=SIGNATURE):
        self.format = struct.Struct("@" + "".join(nvrtc.FORMATS[letter] for letter in signature))
        self.sizes = [struct.calcsize(nvrtc.FORMATS[letter]) for letter in signature]
        self.kinds = [nvrtc.FORMATS[letter] for letter in signature]
        self.current = threading.local()  # context, as its device + 1
        self.seen, self.lost, self.retained = [], set(), []

    def __getattr__(self, name):
        return lambda *arguments: 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = getattr(self.current, "context", None)
        return 0

    def cuCtxSetCurrent(self, context):
        self.current.context = context.value
        return 0

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.retained.append(device.value)
        context._obj.value = device.value + 1
        return 0

    def cuLaunchKernel(self, function, *rest):
        *size, stream, pointers, extra = rest
        if threading.get_ident() in self.lost:
            self.lost.discard(threading.get_ident())
            return nvrtc.INVALID_CONTEXT
        values = []
        for pointer, kind, width in zip(pointers, self.kinds, self.sizes, strict=True):
            values += struct.unpack(kind, ctypes.string_at(pointer, width))
        self.seen.append((stream.value, getattr(self.current, "context", None), values))
        return 0


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(nvrtc, "driver", lambda: found)
    nvrtc._primary_context.cache_clear()
    yield found
    nvrtc._primary_context.cache_clear()


def run_threads(work, count=8):
    """Calls work(0), work(1), ... at the same time, and raises what one of them raised."""
    errors, start = [], threading.Barrier(count)

    def each(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=each, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_each_launch_carries_its_own_arguments(driver, impatient):
    kernel = nvrtc.Kernel(b"code", "kernel", SIGNATURE, 0, 0)

    def work(thread):
        for turn in range(2000):
            number = 1 + thread * 10_000 + turn
            kernel(1, 32, number, *[number] * 5, float(number))

    run_threads(work, 4)
    assert len(driver.seen) == 4 * 2000
    wrong = [(stream, values) for stream, _, values in driver.seen if any(value != stream for value in values)]
    assert not wrong, f"{len(wrong)} launches carried another one's arguments, such as {wrong[0]}"


def test_a_launch_within_a_launch_carries_its_own_arguments(driver):
    """As a finaliser or a signal handler may make between any two steps of Python."""
    kernel = nvrtc.Kernel(b"code", "kernel", SIGNATURE, 0, 0)
    launch = driver.cuLaunchKernel

    def interrupted(*arguments):
        kernel._launch = launch
        kernel(1, 32, 7, *[7] * 6)
        return launch(*arguments)

    kernel._launch = interrupted
    kernel(1, 32, 5, *[5] * 6)
    assert [values for _, _, values in driver.seen] == [[7] * 6, [5] * 6]


def test_a_launch_that_fails_disturbs_no_later_one(driver):
    kernel = nvrtc.Kernel(b"code", "kernel", SIGNATURE, 0, 0)
    with pytest.raises(struct.error):
        kernel(1, 32, 3, *[3] * 5)
    kernel._launch = lambda *arguments: 1
    with pytest.raises(nvrtc.CudaError, match="kernel does not launch on 1 blocks of 32 threads"):
        kernel(1, 32, 3, *[3] * 6)
    kernel._launch = driver.cuLaunchKernel
    kernel(1, 32, 4, *[4] * 6)
    assert driver.seen[-1][2] == [4] * 6


@pytest.mark.parametrize("context", [None, 1], ids=["a thread without a context", "that of another GPU"])
def test_a_thread_gets_the_context_of_the_kernel(driver, context):
    kernel = nvrtc.Kernel(b"code", "kernel", SIGNATURE, 0, 1)

    def work(_):
        driver.current.context = context
        driver.lost.add(threading.get_ident())  # the driver refuses the first launch
        kernel(1, 32, 5, *[5] * 6)

    run_threads(work)
    assert [entry[1] for entry in driver.seen] == [2] * 8
    assert driver.retained == [1], "kept once, however many threads"


class GPU:
    """What `nvrtc.launch` asks a tensor for."""

    def __init__(self, device):
        self.device = device

    def get_device(self):
        return self.device


def test_launches_happen_on_the_device_of_the_tensor(driver, monkeypatch):
    """With another GPU current; each GPU has its own current stream."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(nvrtc, "current_stream", lambda index: 100 + index)
    launched = []

    def kernel(grid, threads, stream, *arguments):
        launched.append((current[0], grid, stream, arguments))

    data = torch.zeros(3)
    nvrtc.launch(kernel, 4, 32, GPU(1), data, None, 2.5)
    nvrtc.launch(kernel, 5, 32, GPU(0), 7)
    nvrtc.launch(kernel, 0, 32, GPU(1), 8)  # an empty batch
    assert launched == [(1, 4, 101, (data.data_ptr(), 0, 2.5)), (0, 5, 100, (7,))]
    assert current == [0]


def test_an_entry_is_made_once_whichever_threads_ask(impatient):
    made, at_work = [], threading.Event()

    @once
    def build(key, name):
        made.append(key)
        if key == "slow":
            assert at_work.wait(240), "another key waited for this one"
        return object()

    found = [[] for _ in range(8)]

    def work(thread):
        if thread == 0:
            found[0].append(build("quick", "a"))
            at_work.set()
        found[thread].append(build("slow", "b"))

    run_threads(work)
    assert sorted(made) == ["quick", "slow"]
    assert len({id(each[-1]) for each in found}) == 1
    build.cache_clear()
    assert build("quick", "a") is not found[0][0]


def test_what_could_not_be_made_is_tried_again():
    attempts = []

    @once
    def build(key):
        attempts.append(key)
        if len(attempts) == 1:
            raise ValueError("not yet")
        return key

    with pytest.raises(ValueError, match="not yet"):
        build(1)
    assert build(1) == 1 and build(1) == 1 and attempts == [1, 1]


def test_kept_machine_code_is_whole_or_refused(tmp_path, impatient):
    path = tmp_path / "kernels" / "name.bin"
    codes = [bytes([i]) * 100_000 for i in range(8)]

    def work(thread):
        for _ in range(20):
            nvrtc._keep(path, codes[thread])
            assert nvrtc._kept(path) in codes

    run_threads(work)
    assert [p.name for p in path.parent.iterdir()] == ["name.bin"]
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40] + b"?" + content[41:], b""):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="is damaged"):
            nvrtc._kept(path)
