"""The Triton scan against the float64 definition: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this file again in a process
of its own.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scan_problems
import torch
from scan_problems import assert_within_budget

from medmamba import selective_scan, selective_scan_2d
from medmamba.kernels.backends import eager as torch_backend
from medmamba.kernels.backends import triton as triton_backend
from medmamba.kernels.triton import launch as triton_launch
from medmamba.kernels.triton import plan as triton_plan
from medmamba.kernels.triton.plan import Plan, backward_plan, forward_plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"

pytest.importorskip("triton", reason="Triton has no build for this platform")
runs = pytest.mark.skipif(
    not (INTERPRETED or CUDA), reason="needs a GPU; test_in_the_interpreter runs it in a process of its own"
)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")(test))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """The interpreter takes a millisecond for what a GPU does in a clock cycle."""
    if INTERPRETED:
        for module in (triton_plan, triton_launch, triton_backend):
            monkeypatch.setattr(module, "CHUNK", 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED or CUDA, reason="already running the kernels")
def test_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-x", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if "lambda self: int(self.handle.data)\n" in done.stdout:  # a line of Triton's own, in the traceback
        pytest.skip("the interpreter of this Triton, such as 3.4 to 3.6, does not run with NumPy 2.4 or newer")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


# --- problems and their error budget --------------------------------------------------------------------------------


problem_2d = functools.partial(scan_problems.problem_2d, device=DEVICE)


def problem_1d(B=1, C=8, L=37, N=5, G=4, dtype=torch.float32, softplus=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    u, delta, Bs, Cs = randn(B, C, L), randn(B, C, L), randn(B, G, N, L), randn(B, G, N, L)
    bias = randn(C) - 2
    if not softplus:  # step sizes are positive
        delta, bias = delta.abs() * 0.3, bias.abs() * 0.1
    A = -torch.arange(1, N + 1) * (0.5 + torch.rand(C, N, generator=g))
    return [t.to(DEVICE) for t in (u.to(dtype), delta.to(dtype), A, Bs.to(dtype), Cs.to(dtype), randn(C), bias)]


def saved_states(x, N):
    B, H, W, C = x.shape
    return x.new_full((B, 4, -(-H * W // triton_backend.CHUNK), N, C), torch.nan, dtype=torch.float32)


def check_2d(tensors, forward=None, backward=None):
    double = [t.double() for t in tensors]
    x, A = tensors[0], tensors[4]
    states = saved_states(x, A.shape[2])
    y = triton_backend.BACKEND.scan_2d(*tensors, states, plan=forward)
    none = x.new_empty(0)
    exact, loop = (torch_backend.BACKEND.scan_2d(*t, none) for t in (double, tensors))
    assert_within_budget([y], [loop], [exact], "y")

    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    grads = triton_backend.BACKEND.scan_2d_backward(dy, *tensors, states, plan=backward)
    exact = torch_backend.BACKEND.scan_2d_backward(dy.double(), *double, none)
    loop = torch_backend.BACKEND.scan_2d_backward(dy, *tensors, none)
    assert_within_budget(grads, loop, exact, ["dx", "dproj", "ddt_weight", "ddt_bias", "dA", "dD"])


def check_1d(tensors, softplus=True, plan=None):
    double = [t.double() for t in tensors]
    actual = triton_backend.BACKEND.scan_1d(*tensors, softplus, plan=plan)
    exact, loop = (torch_backend.BACKEND.scan_1d(*t, softplus) for t in (double, tensors))
    assert_within_budget(actual, loop, exact, ["y", "last state"])

    dy = torch.randn(actual[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    grads = triton_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus, plan=plan)
    exact = torch_backend.BACKEND.scan_1d_backward(dy.double(), *double, softplus)
    loop = torch_backend.BACKEND.scan_1d_backward(dy, *tensors, softplus)
    assert_within_budget(grads, loop, exact, ["du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias"])


# --- values and gradients -------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    "shape",
    [
        dict(H=3, W=7, C=16, R=3, N=16),  # two chunks, the second cut short
        dict(H=1, W=1, C=3, R=1, N=5),
        dict(H=5, W=2, C=20, R=1, N=5),  # padded states and channels, two blocks of channels
        dict(H=2, W=5, C=32, R=18, N=2),  # a step size code longer than one block
    ],
    ids=str,
)
def test_2d(shape):
    check_2d(problem_2d(**shape))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_2d_in_half_precision(dtype):
    check_2d(problem_2d(H=3, W=6, R=4, dtype=dtype))


@runs
def test_2d_in_segments():
    check_2d(problem_2d(H=2, W=9, C=8, N=4), Plan(8, 4, segments=2), Plan(16, 4, segments=2))


@runs
def test_2d_of_views():
    """A slice of a wider tensor, as a chunk of in_proj's output is, and transposed memory; sums in the dtype of x."""
    x, proj, *parameters = problem_2d(H=2, W=4, C=8, R=2, N=4)
    wide = torch.cat((x, x), dim=-1).chunk(2, dim=-1)[1]
    transposed = proj.transpose(1, 2).contiguous().transpose(1, 2)
    assert not wide.is_contiguous() and not transposed.is_contiguous()
    plan = Plan(16, 4, half_sums=True)
    check_2d([wide, transposed, *parameters], plan, plan)


@runs
def test_2d_with_long_addresses(monkeypatch):
    monkeypatch.setattr(triton_launch, "MAX_INT32", 0)
    check_2d(problem_2d(H=3, W=2, C=4, R=1, N=2))


@runs
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        (dict(C=8, G=4, N=5, L=18), None),
        (dict(C=16, G=1, N=16, L=1, B=2), None),
        (dict(C=8, G=1, N=4, L=34, softplus=False), Plan(16, 2, segments=3)),
    ],
    ids=str,
)
def test_1d(shape, plan):
    check_1d(problem_1d(**shape), shape.get("softplus", True), plan)


# --- the operators --------------------------------------------------------------------------------------------------


@runs
def test_gradients_reach_the_operator():
    tensors = [t.requires_grad_() for t in problem_2d(H=2, W=3, C=4, R=1, N=2)]
    grads = torch.autograd.grad(selective_scan_2d(*tensors, backend="triton").square().sum(), tensors)
    expected = torch.autograd.grad(selective_scan_2d(*tensors, backend="torch").square().sum(), tensors)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)

    u, delta, A, B, C, D, bias = (t.requires_grad_() for t in problem_1d(C=4, G=2, N=2, L=5))
    z = torch.randn_like(u)
    y = selective_scan(u, delta, A, B, C, D, z, bias, True, backend="triton")
    torch.testing.assert_close(y, selective_scan(u, delta, A, B, C, D, z, bias, True, backend="torch"))


@runs
def test_operator_contract():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    tensors = [t.requires_grad_() for t in problem_2d(H=2, W=2, C=4, R=1, N=2)]
    torch.library.opcheck(
        torch.ops.medmamba.scan_2d.default, (*tensors, "triton", triton_backend.CHUNK), test_utils=tests
    )
    tensors = [t.requires_grad_() for t in problem_1d(C=4, G=2, N=2, L=3)]
    torch.library.opcheck(torch.ops.medmamba.scan_1d.default, (*tensors, True, "triton"), test_utils=tests)


@runs
def test_two_runs_agree_bit_for_bit():
    """In deterministic mode PyTorch fills new memory with NaN, so this finds reads of memory never written, too."""
    size = 28 if CUDA else 2
    tensors = [t.requires_grad_() for t in problem_2d(H=size, W=size, C=96 if CUDA else 20, R=1, N=4)]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            y = selective_scan_2d(*tensors, backend="triton")
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), tensors)))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(H=56, W=56, C=96, R=3),
        dict(H=28, W=28, C=192, R=6),
        dict(H=14, W=14, C=384, R=12),
        dict(H=7, W=7, C=768, R=24),
        dict(H=7, W=31, C=48, R=2, N=24),
    ],
    ids=str,
)
def test_2d_at_full_size(shape, dtype):
    check_2d(problem_2d(B=2, dtype=dtype, **shape))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("L", [1, 49, 784, 3137])
def test_1d_at_full_size(L, G, dtype):
    check_1d(problem_1d(B=2, C=64, G=G, N=16, L=L, dtype=dtype))


@gpu
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("unroll", [2, 4])
@pytest.mark.parametrize("segments", [1, 8])
def test_every_plan_computes_the_same(block, unroll, segments):
    tensors = problem_2d(H=28, W=28, C=192, R=6)
    check_2d(tensors, Plan(block, unroll, segments), Plan(min(block, 32), unroll, segments))


@gpu
def test_memory_does_not_grow_with_the_state():
    """What autograd keeps for the backward pass: a state every CHUNK tokens, not one (B, K, L, C, N) tensor."""
    tensors = [t.requires_grad_() for t in problem_2d(B=8, H=56, W=56, C=96, R=3)]
    before = torch.cuda.memory_allocated()
    y = selective_scan_2d(*tensors, backend="triton")
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= 8 * 4 * 56 * 56 * 96 * 16 * 4 / triton_backend.CHUNK


@gpu
def test_model_compiles_and_captures():
    """The whole model under torch.compile(fullgraph=True) and in a CUDA graph gives the logits of the plain scan."""
    import medmamba

    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).eval().to(DEVICE)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.inference_mode():
        model.set_scan_backend("torch")
        expected = model(images)
        model.set_scan_backend("triton")
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, rtol=1e-3, atol=1e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_trains_under_autocast(dtype):
    import medmamba

    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).to(DEVICE)
    model.set_scan_backend("triton")
    with torch.autocast("cuda", dtype):
        loss = model(torch.randn(2, 3, 64, 64, device=DEVICE)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    tensors = [t.to("cuda:1") for t in problem_2d()]
    expected = selective_scan_2d(*tensors, backend="torch")
    torch.testing.assert_close(selective_scan_2d(*tensors, backend="triton"), expected, rtol=1e-4, atol=1e-4)


# --- without running a kernel ---------------------------------------------------------------------------------------


class Compiler:
    """Stands in for a kernel: compiles what would be launched, for a GPU that need not be there."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps, maxnreg, enable_fp_fusion, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = args[i] if i < len(args) else constants[name]
            if isinstance(value, torch.Tensor):
                signature[name] = types[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif name in constants or value is None:
                signature[name] = "constexpr"
                constexprs[(i,)] = value
            else:
                signature[name] = "i32"
        source = ASTSource(self.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        target = GPUTarget("cuda", self.capability, 32)
        self.binary = triton.compile(
            source, target=target, options={"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        ).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [75, 90, 120])
def test_compiles_for_gpus_old_and_new(capability, monkeypatch):
    from medmamba.kernels.triton import backward as triton_backward
    from medmamba.kernels.triton import forward as triton_forward

    compilers = []
    for module, name in ((triton_forward, "scan_forward_kernel"), (triton_backward, "scan_backward_kernel")):
        compilers.append(Compiler(getattr(module, name), capability))
        monkeypatch.setattr(module, name, compilers[-1])
    monkeypatch.setattr(triton_launch, "sum_parts", lambda parts, dtype: parts[:, 0])
    monkeypatch.setattr(triton_launch, "_precision", lambda device: "tf32x3" if capability >= 80 else "ieee")
    x, proj, *parameters = (t.cpu() for t in problem_2d(H=4, W=4, C=32, R=4, N=4, dtype=torch.bfloat16))
    states = saved_states(x, 4)
    monkeypatch.setattr(triton_backend, "sum_parts", lambda parts, dtype: parts[:, 0])
    triton_backend.BACKEND.scan_2d(x, proj, *parameters, x.new_empty(0), plan=Plan(32, 2))
    triton_backend.BACKEND.scan_2d(x, proj, *parameters, states, plan=Plan(32, 2))
    triton_backend.BACKEND.scan_2d_backward(x, x, proj, *parameters, states, plan=Plan(32, 2))
    assert all(len(c.binary) > 1000 for c in compilers)


def test_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in triton_backend.BACKEND.why_not()
    assert "CUDA" in triton_backend.BACKEND.why_not_on(torch.device("cpu"), torch.float32)
    assert "float64" in triton_backend.BACKEND.why_not_on(torch.device("cuda"), torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = [(6, 1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert "6.1" in triton_backend.BACKEND.why_not()
    capabilities.append((7, 5))  # an old card for the screen, whichever is current, and one that computes
    assert triton_backend.BACKEND.why_not() is None
    assert "cuda:0 has 6.1" in triton_backend.BACKEND.why_not_on(torch.device("cuda:0"), torch.float32)
    assert triton_backend.BACKEND.why_not_on(torch.device("cuda:1"), torch.float32) is None
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in triton_backend.BACKEND.why_not()


def test_interpreter_counts_as_a_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.BACKEND.why_not() is None
    assert triton_backend.BACKEND.why_not_on(torch.device("cpu"), torch.float32) is None


def test_plans(monkeypatch):
    monkeypatch.setattr("medmamba.kernels.triton.plan._processors", lambda device: 132)
    device = torch.device("cuda")
    for make in (forward_plan, backward_plan):
        for batch in (1, 8, 128):
            for length in (1, 49, 196, 784, 3136, 50176):
                for channels in (3, 16, 48, 96, 192, 768, 1000):
                    for state in (1, 5, 16, 64):
                        plan = make(4 * batch, length, channels, state, device)
                        segments, tokens = plan.split(length)
                        assert plan.block & (plan.block - 1) == 0 and plan.block <= 64
                        assert tokens % triton_plan.CHUNK == 0 and (segments - 1) * tokens < length <= segments * tokens
    # A full batch keeps the chip busy without a second walk; a single image does not.
    assert forward_plan(4 * 128, 3136, 96, 16, device).segments == 1
    assert forward_plan(4, 3136, 96, 16, device).segments > 16
    # 96 channels in blocks of 64 would leave a quarter of the threads idle.
    assert forward_plan(4 * 128, 3136, 96, 16, device).block == 32
    assert forward_plan(4 * 128, 784, 192, 16, device).block == 64
