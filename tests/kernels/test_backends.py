"""Every backend implements the protocol of `kernels/backends/base.py`, and every piece of the network has a kernel."""

import inspect

import pytest
import torch

from medmamba.kernels import available_backends
from medmamba.kernels.backends import Backend
from medmamba.kernels.block import registry, replaceable
from medmamba.kernels.dispatch import BACKENDS, PREFERENCE, load_backend
from medmamba.model import network

METHODS = ("why_not", "why_not_on", "scan_2d", "scan_2d_backward", "scan_1d", "scan_1d_backward")


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_implement_the_protocol(name):
    backend = load_backend(name)
    assert isinstance(backend, Backend) and backend.name == name
    assert isinstance(backend.chunk, int) and backend.chunk >= 0
    for method in METHODS:
        expected = inspect.signature(getattr(Backend, method)).parameters
        found = inspect.signature(getattr(type(backend), method)).parameters
        assert list(found)[: len(expected)] == list(expected), method
        assert all(found[extra].default is None for extra in list(found)[len(expected) :]), method
    assert backend.available() == (backend.why_not() is None) == (available_backends()[name] is None)
    assert not backend.supports(torch.device("cpu"), torch.int64)


def test_names_of_backends_are_known():
    assert set(BACKENDS) == {"native", "cuda", "triton", "mamba_ssm", "torch"}
    assert {name for names in PREFERENCE.values() for name in names} < set(BACKENDS)


def test_kernels_replace_pieces_of_the_network():
    for name, (fits, run) in registry._kernels.items():
        piece = getattr(network, name)
        arguments = list(inspect.signature(piece.__wrapped__).parameters)
        assert arguments == list(inspect.signature(fits).parameters) == list(inspect.signature(run).parameters)
    with pytest.raises(KeyError):
        replaceable("no_such_kernel")
