"""The CUDA kernels against the float64 definition: on a GPU where there is one, else in an emulator (cuda_emulator.h)
that runs their source on the CPU, thread by thread, compiled by the C++ compiler of the `ziglang` package."""

import ctypes
import functools
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from scan_problems import assert_within_budget, problem_2d

from medmamba.kernels import cuda_backend, nvrtc, torch_backend
from medmamba.kernels.cuda_backend import Plan

CUDA = cuda_backend.unavailable() is None
DEVICE = "cuda" if CUDA else "cpu"
EMULATOR = Path(__file__).with_name("cuda_emulator.h")
runs = pytest.mark.skipif(
    not CUDA and importlib.util.find_spec("ziglang") is None,
    reason="needs a GPU, or the ziglang package to emulate one",
)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")(test))


# --- the emulator ---------------------------------------------------------------------------------------------------

LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_longlong, "f": ctypes.c_float}
_folder = tempfile.TemporaryDirectory()  # removed when the process ends


@functools.cache
def emulated(file, name, signature, defines, shared, device):
    """Stands in for `nvrtc.load_kernel`."""
    source = nvrtc.kernel_source(file)
    source += (
        f'\nextern "C" void run(void** arguments, int grid, int threads, size_t shared) '
        f"{{ emulator::launch({name}, arguments, grid, threads, shared); }}\n"
    )
    path = Path(_folder.name) / f"{name}-{abs(hash((file, defines)))}.so"
    command = [sys.executable, "-m", "ziglang", "cc", "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
    command += [
        "-fno-sanitize=all",
        "-include",
        str(EMULATOR),
        *(f"-D{k}={v}" for k, v in defines),
        "-o",
        str(path),
        "-",
    ]
    done = subprocess.run(command, input=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(path))

    def launch(grid, threads, stream, *arguments):
        assert len(arguments) == len(signature)
        values = [LETTERS[letter](value) for letter, value in zip(signature, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        library.run(pointers, grid, threads, ctypes.c_size_t(shared))

    return launch


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if CUDA:
        return

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(nvrtc, "load_kernel", emulated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)


# --- problems -------------------------------------------------------------------------------------------------------


problem = functools.partial(problem_2d, device=DEVICE)


def saved_states(x, N):
    B, H, W, C = x.shape
    return x.new_full((B, 4, -(-H * W // cuda_backend.CHUNK), N, C), torch.nan, dtype=torch.float32)


def check(tensors, forward=None, backward=None):
    double = [t.double() for t in tensors]
    x, A = tensors[0], tensors[4]
    states, none = saved_states(x, A.shape[2]), x.new_empty(0)
    exact, loop = (torch_backend.scan_2d_forward(*t, none) for t in (double, tensors))
    for saved in (none, states):
        y = cuda_backend.scan_2d_forward(*tensors, saved, plan=forward)
        assert_within_budget([y], [loop], [exact], "y")
    assert states.isfinite().all()

    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    grads = cuda_backend.scan_2d_backward(dy, *tensors, states, plan=backward)
    exact = torch_backend.scan_2d_backward(dy.double(), *double, none)
    loop = torch_backend.scan_2d_backward(dy, *tensors, none)
    assert_within_budget(grads, loop, exact, ["dx", "dproj", "ddt_weight", "ddt_bias", "dA", "dD"])


# --- values and gradients -------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    "shape",
    [
        dict(H=3, W=7, C=32, R=3),  # two tiles, the second cut short
        dict(H=1, W=1, C=3, R=1, N=5),
        dict(H=5, W=2, C=20, R=1, N=5),  # padded states and channels
        dict(H=2, W=9, C=34, R=18, N=2),  # channels that are no multiple of four, a long code
        dict(B=2, H=4, W=5, C=130, R=6),  # several blocks of channels
    ],
    ids=str,
)
def test_values_and_gradients(shape):
    check(problem(**shape))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check(problem(H=4, W=6, C=32, dtype=dtype))


@runs
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("per_thread", [2, 4])
def test_every_plan_computes_the_same(lanes, per_thread):
    check(problem(H=5, W=4, C=64, R=2), Plan(32, lanes), Plan(64, 1, per_thread))
