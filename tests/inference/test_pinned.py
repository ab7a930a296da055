"""Memory that processes share is pinned where that makes copies to a GPU faster."""

import contextlib
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medmamba.imaging.ahead.memory import SharedMemory

pinning = importlib.import_module("medmamba.inference.pinned")
GPU = torch.device("cuda:0")


@pytest.fixture
def memory():
    found = SharedMemory(1 << 20)
    yield found
    found.close()


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the driver; the first entry is the status of the next request to pin."""
    made: list = [0]
    driver = SimpleNamespace(
        cudaHostRegister=lambda _address, size, _flags: made.append(size) or made[0],
        cudaHostUnregister=lambda _address: made.append("unpinned"),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.append("waited"))
    return made


def test_pinned_until_the_end_where_copies_are_fast(memory, calls, monkeypatch):
    monkeypatch.setattr(pinning, "copy_rate", lambda source, device: 1e9)
    with pinning.pinned(memory, [torch.device("cpu"), GPU]) as registered:
        assert registered and calls[1:] == [1 << 20]
    assert calls[2:] == ["waited", "unpinned"]


def test_not_pinned_where_that_makes_copies_slower(memory, calls, monkeypatch):
    shared = np.frombuffer(memory.map, np.uint8).__array_interface__["data"][0]
    monkeypatch.setattr(pinning, "copy_rate", lambda source, device: 1e9 if source.data_ptr() == shared else 2.1e9)
    with pinning.pinned(memory, [GPU]) as registered:
        assert not registered and calls[1:] == [1 << 20, "unpinned"]
    assert len(calls) == 3


def test_not_pinned_any_more_after_a_trial_that_fails(memory, calls, monkeypatch):
    def rate(source, device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(pinning, "copy_rate", rate)
    with pytest.raises(torch.OutOfMemoryError), pinning.pinned(memory, [GPU]):
        pass
    assert calls[-1] == "unpinned"


@pytest.mark.parametrize("devices", [[torch.device("cpu")], [GPU]])
def test_not_pinned_for_a_cpu_or_where_it_cannot_be(memory, calls, devices):
    calls[0] = 1
    with pinning.pinned(memory, devices) as registered:
        assert not registered
    assert calls[1:] == ([] if devices[0].type == "cpu" else [1 << 20])


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_the_rate_is_of_pieces_all_over_the_memory(pieces, monkeypatch):
    seen, clock = [], iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(pinning.time, "perf_counter", lambda: next(clock))
    source = torch.arange(pieces * pinning._PIECE, dtype=torch.int64).to(torch.uint8)
    plain = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, piece, **_: seen.append(piece.data_ptr()) or plain(self, piece)
    )
    assert pinning.copy_rate(source, torch.device("cpu")) == 16 * pinning._PIECE
    assert len(seen) == 32 and len(set(seen)) == (1 if pieces == 1 else 32)
    assert max(seen) == source.data_ptr() + (pieces - 1) * pinning._PIECE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_copies_are_the_same_pinned_or_not(memory):
    values = np.frombuffer(memory.map, np.uint8)
    values[:] = np.random.default_rng(0).integers(0, 256, values.size)
    assert isinstance(pinning.worth_it(memory, GPU), bool)
    with pinning.pinned(memory, [GPU]):
        assert torch.equal(torch.from_numpy(values).to(GPU, non_blocking=True).cpu(), torch.from_numpy(values))
