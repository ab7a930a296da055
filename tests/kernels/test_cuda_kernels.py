"""The CUDA kernels against the float64 definition: on a GPU where there is one, else in an emulator (cuda_emulator.h)
that runs their source on the CPU, thread by thread, compiled by the C++ compiler of the `ziglang` package."""

import contextlib
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

import medmamba
from medmamba import selective_scan_2d
from medmamba.kernels.backends import cuda as cuda_backend
from medmamba.kernels.backends import eager as torch_backend
from medmamba.kernels.backends.cuda import Plan
from medmamba.kernels.cuda import nvrtc

CUDA = cuda_backend.BACKEND.why_not() is None
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


def emulate(monkeypatch, processors):
    """A GPU of so many processors."""

    class Properties:
        multi_processor_count, shared_memory_per_block_optin = processors, 100_000

    monkeypatch.setattr(nvrtc, "load_kernel", emulated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(nvrtc, "current_stream", lambda device: 0)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=2)


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """`nvrtc.load_kernel` without a compiler and a GPU; gives the list of what is compiled."""
    compiled = []

    class Kernel:
        def __init__(self, code, *_):
            if not code.startswith(b"good"):
                raise nvrtc.CudaError("no code")

    class Library:
        def nvrtcVersion(self, *_):
            return 0

    def compile_kernel(source, flags, capability):
        compiled.append(flags)
        return b"good code"

    monkeypatch.undo()  # of the emulator
    monkeypatch.setenv("MEDMAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "Kernel", Kernel)
    monkeypatch.setattr(nvrtc, "compiler", Library)
    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return compiled


def load(value=1):
    """As a new process would: past the cache in memory."""
    return nvrtc.load_kernel.__wrapped__("sum.cu", "sum_parts", "ppll", (("PARTS", value),), 0, 0)


def test_machine_code_is_kept_and_made_anew_where_it_is_damaged(compilations):
    load(), load()
    assert compilations == [["-DPARTS=1"]]
    load(2)
    assert len(compilations) == 2
    for path in nvrtc.cache_folder().iterdir():
        assert path.suffix == ".bin"
        path.write_bytes(b"half")
    load()
    assert len(compilations) == 3
    load()
    assert len(compilations) == 3


def test_without_a_place_to_keep_code_it_is_compiled_each_time(compilations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDMAMBA_CACHE", str(tmp_path / "file"))
    load(), load()
    assert len(compilations) == 2


# --- problems -------------------------------------------------------------------------------------------------------


problem = functools.partial(problem_2d, device=DEVICE)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def saved_states(x, N):
    B, H, W, C = x.shape
    return x.new_full((B, 4, -(-H * W // cuda_backend.CHUNK), N, C), torch.nan, dtype=torch.float32)


def check(tensors, forward=None, backward=None):
    double = [t.double() for t in tensors]
    x, A = tensors[0], tensors[4]
    states, none = saved_states(x, A.shape[2]), x.new_empty(0)
    exact, loop = (torch_backend.BACKEND.scan_2d(*t, none) for t in (double, tensors))
    for saved in (none, states):
        y = cuda_backend.BACKEND.scan_2d(*tensors, saved, plan=forward)
        assert_within_budget([y], [loop], [exact], "y")
    assert states.isfinite().all()

    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    grads = cuda_backend.BACKEND.scan_2d_backward(dy, *tensors, states, plan=backward)
    exact = torch_backend.BACKEND.scan_2d_backward(dy.double(), *double, none)
    loop = torch_backend.BACKEND.scan_2d_backward(dy, *tensors, none)
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
def test_through_the_operator(monkeypatch):
    """As users call it: PyTorch checks there that outputs share no memory. On a CPU the emulator runs the kernels."""
    monkeypatch.setattr(cuda_backend.BACKEND, "why_not", lambda: None)
    monkeypatch.setattr(cuda_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    tensors = [t.requires_grad_() for t in problem(H=3, W=7, C=32, R=3)]
    found, expected = (
        torch.autograd.grad(selective_scan_2d(*tensors, backend=backend).square().sum(), tensors)
        for backend in ("cuda", "torch")
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))
    nothing = [t[:0].detach().requires_grad_() if t.ndim > 3 else t for t in tensors]
    y = selective_scan_2d(*nothing, backend="cuda")
    assert y.shape == (0, 3, 7, 32)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), nothing))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    check(problem(H=4, W=6, C=32, dtype=dtype))


@pytest.mark.slow
@runs
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("per_thread", [2, 4])
def test_every_plan_computes_the_same(lanes, per_thread):
    check(problem(H=5, W=4, C=64, R=2), Plan(32, lanes), Plan(64, per_thread=per_thread))


@pytest.mark.slow
@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_in_large_pieces(dtype):
    """Channels that are read 16 bytes at a time, a length that ends within a group of tokens."""
    check(problem(H=7, W=5, C=72, R=4, dtype=dtype), Plan(32), Plan(48))


def test_long_lines_are_divided_and_short_ones_share_lanes(monkeypatch):
    emulate(monkeypatch, processors=132)
    cuda_backend.forward_plan.cache_clear()
    plan = cuda_backend.forward_plan
    try:
        assert plan(16, 88 * 88, 32, 0) == Plan(32, 1, 33, resident=16)  # as many programs as are resident at once
        assert plan(16, 22 * 22, 128, 0)[:3] == (32, 4, 1) and plan(1, 88 * 88, 32, 0)[:3] == (32, 4, 99)
        assert plan(128, 56 * 56, 96, 0)[:3] == (32, 1, 1) and plan(1, 56 * 56, 96, 0)[:3] == (32, 4, 33)
    finally:
        plan.cache_clear()


@pytest.mark.slow
@runs
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("segments", [1, 2])
def test_lanes_that_share_channels(lanes, segments):
    """Channels that are no multiple of the lanes, a length that is no multiple of the tile."""
    check(problem(H=5, W=7, C=41, R=4, N=16 - 2 * segments), Plan(32, lanes, segments))


@pytest.mark.slow
@runs
@pytest.mark.parametrize("segments", [2, 3, 9])
@pytest.mark.parametrize("lanes", [1, 4])
def test_segments_compute_the_same(segments, lanes):
    """Of unequal length, the last cut short; more segments than tiles."""
    check(problem(H=9, W=7, C=34, R=4), Plan(32, lanes, segments), Plan(32))


@runs
def test_views_are_read_where_they_lie():
    """Half of a wider map, a map that lies column by column, a gradient that is one number for all."""
    tensors = problem(H=3, W=5, C=32, R=4)
    x, proj = tensors[:2]
    expected = cuda_backend.BACKEND.scan_2d(*tensors, x.new_empty(0))
    states, ones = saved_states(x, 16), torch.ones_like(x)
    cuda_backend.BACKEND.scan_2d(*tensors, states)
    gradients = cuda_backend.BACKEND.scan_2d_backward(ones, *tensors, states)
    half = torch.cat((x, x + 1), -1).chunk(2, -1)[0]
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (half, columns):
        for codes in (proj, torch.cat((proj, proj + 1), -1).chunk(2, -1)[0]):
            views = [view, codes, *tensors[2:]]
            assert torch.equal(cuda_backend.BACKEND.scan_2d(*views, x.new_empty(0)), expected)
            found = cuda_backend.BACKEND.scan_2d_backward(ones[:1, :1, :1, :1].expand_as(x), *views, states)
            assert all(map(torch.equal, found, gradients))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@gpu
@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        dict(H=56, W=56, C=96, R=3),
        dict(H=28, W=28, C=192, R=6),
        dict(H=14, W=14, C=384, R=12),
        dict(H=7, W=7, C=768, R=24),
        dict(H=7, W=7, C=1024, R=32),
        dict(H=7, W=31, C=48, R=2, N=8),
        dict(H=31, W=7, C=48, R=2, N=24),  # more states than these kernels take
        dict(H=1, W=1, C=96, R=3),
    ],
    ids=str,
)
def test_at_full_size(shape, dtype):
    check(problem(B=2, dtype=dtype, **shape))


@gpu
def test_operator():
    tensors = [t.requires_grad_() for t in problem(H=6, W=9, C=32)]
    arguments = (*tensors, "cuda", cuda_backend.CHUNK)
    torch.library.opcheck(torch.ops.medmamba.scan_2d.default, arguments)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(dtype):
    tensors = [t.requires_grad_() for t in problem(B=8, H=28, W=28, C=192, R=6, dtype=dtype)]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            y = selective_scan_2d(*tensors, backend="cuda")
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), tensors)))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@gpu
def test_model_compiles_and_trains(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # would flip a ReLU here and there
    model = medmamba.create_model("test", num_classes=4, drop_path_rate=0.0).to(DEVICE)
    images = torch.randn(4, 3, 64, 64, device=DEVICE)
    gradients = []
    for backend, network in (("torch", model), ("cuda", torch.compile(model, fullgraph=True))):
        model.set_scan_backend(backend)
        model.zero_grad()
        network(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    largest = max(g.abs().max().item() for g in gradients[0])  # some are zero but for rounding: biases before a norm
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-3 * largest)
