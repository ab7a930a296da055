"""`medmamba.selective_scan` over its whole public parameter grid, on every backend: values, last state, all gradients.

Through the operator, as users call it: PyTorch checks there that outputs share no memory, which tests of a backend's
own functions do not see. By default a seeded sample runs, with every form of B and C; `-m slow` runs the whole grid,
`-m gpu` the whole grid on a GPU. Triton's interpreter must be chosen before Triton is imported, hence a process of its
own.
"""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_cuda_kernels import emulate

from medmamba import available_backends, selective_scan
from medmamba.kernels.backends import cpu as native
from medmamba.kernels.backends import cuda as cuda_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("constant", "shared", "one group", "two groups", "a group each")
LENGTHS = (1, 2, 15, 16, 17, 49, 63, 64, 65)  # around the chunks of all backends
LONG = (128, 196, 784, 1024, 2049, 4096)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


class Case(NamedTuple):
    length: int
    B: str
    C: str
    D: bool
    z: bool
    delta_bias: bool
    softplus: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        on = [name for name in ("D", "z", "delta_bias", "softplus") if getattr(self, name)]
        return f"L={self.length}, B {self.B}, C {self.C}, {'+'.join(on) or 'plain'}, {str(self.dtype)[6:]}"


def cases(lengths, every=1):
    flags = (False, True)
    return [Case(*c) for c in itertools.product(lengths, FORMS, FORMS, flags, flags, flags, flags, TYPES)][::every]


GRID = cases(LENGTHS) + cases(LONG, every=7)


def sample(count, seed, most=4096):
    """Of the grid, with every pair of forms of B and C before a second one of any."""
    shuffled = [case for case in GRID if case.length <= most]
    random.Random(seed).shuffle(shuffled)
    rank: dict[tuple[str, str], int] = {}
    ranked = [(rank.setdefault((c.B, c.C), 0), rank.update({(c.B, c.C): rank[c.B, c.C] + 1}), c) for c in shuffled]
    return [c for *_, c in sorted(ranked, key=lambda entry: entry[0])[:count]]


def tensors(case, device="cpu", batch=2, channels=4, N=3):
    """By name, None where the case has none. Maps are in the dtype of the case, parameters in float32, as in Mamba."""
    g = torch.Generator().manual_seed(hash_of(case))

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    groups = {"one group": 1, "two groups": 2, "a group each": channels}

    def projection(form):
        if form == "constant":
            return randn(channels, N)
        shape = (batch, N, case.length) if form == "shared" else (batch, groups[form], N, case.length)
        return randn(*shape).to(case.dtype)

    sizes = (batch, channels, case.length)
    delta, bias = (
        (randn(*sizes) - 2, randn(channels)) if case.softplus else (randn(*sizes).abs() / 9, randn(channels).abs() / 9)
    )
    found = dict(
        u=randn(*sizes).to(case.dtype),
        delta=delta.to(case.dtype),
        A=-torch.arange(1.0, N + 1) * (0.5 + torch.rand(channels, N, generator=g)),
        B=projection(case.B),
        C=projection(case.C),
        D=randn(channels) if case.D else None,
        z=randn(*sizes).to(case.dtype) if case.z else None,
        delta_bias=bias if case.delta_bias else None,
    )
    return {name: None if t is None else t.to(device).requires_grad_() for name, t in found.items()}


def hash_of(case):
    return GRID.index(case)


def definition(softplus, u, delta, A, B, C, D, z, delta_bias):
    """Equation 2 of the Mamba paper, token by token, with autograd."""
    batch, channels, length = u.shape
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if softplus else dt

    def tokens(t):  # (batch, channels, N) each
        if t.ndim == 2:
            return [t.expand(batch, *t.shape)] * length
        t = t.unsqueeze(1) if t.ndim == 3 else t
        return t.repeat_interleave(channels // t.shape[1], dim=1).unbind(-1)

    h, ys = u.new_zeros(batch, channels, A.shape[1]), []
    for u_t, dt_t, B_t, C_t in zip(u.unbind(-1), dt.unbind(-1), tokens(B), tokens(C), strict=True):
        h = torch.exp(dt_t.unsqueeze(-1) * A) * h + (dt_t * u_t).unsqueeze(-1) * B_t
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def evaluate(function, inputs):
    """Values and gradients along fixed random numbers, by name."""
    y, last = function(**inputs)
    given = {name: t for name, t in inputs.items() if t is not None}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    grads = torch.autograd.grad(y, list(given.values()), dy)
    return dict(y=y.detach(), last=last.detach()) | dict(zip(given, grads, strict=True))


def check(case, backend, device="cpu", by=None):
    """Against the definition in float64, or against the backend `by` on the CPU in float32."""
    inputs = tensors(case, device)

    def run(name, **given):
        return selective_scan(**given, delta_softplus=case.softplus, return_last_state=True, backend=name)

    found = evaluate(lambda **given: run(backend, **given), inputs)
    wider = torch.float32 if by else torch.float64
    exact = {n: None if t is None else t.detach().cpu().to(wider).requires_grad_() for n, t in inputs.items()}
    expected = evaluate(
        (lambda **given: run(by, **given)) if by else (lambda **given: definition(case.softplus, **given)), exact
    )
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        f = found[name]
        assert f.shape == e.shape and f.dtype == (torch.float32 if name == "last" else inputs.get(name, f).dtype), name
        error = (f.cpu().double() - e.double()).abs().max()
        # Two roundings to the type of the maps, where z comes between; the recurrence itself is in float32. Gradients
        # of what all tokens share are sums of terms so rounded, which may cancel.
        roundings = 8 if name in ("A", "D", "delta_bias") else 4
        limit = 1e-4 if case.dtype == torch.float32 else roundings * torch.finfo(case.dtype).eps
        allowed = limit * e.abs().max() + 1e-6
        assert error <= allowed, f"{backend}, {case}: {name} is off by {error:.1e}, allowed are {allowed:.1e}"


def check_all(chosen, *args, **kwargs):
    failed = []
    for case in chosen:
        try:
            check(case, *args, **kwargs)
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} of {len(chosen)} fail, such as\n" + "\n".join(failed[:5])


def on_the_cpu(monkeypatch, backend):
    """Lets a backend of GPUs run, `cuda` in the emulator."""
    if backend == "cuda":
        pytest.importorskip("ziglang", reason="compiles the emulator")
        emulate(monkeypatch, processors=2)
        monkeypatch.setattr(cuda_backend.BACKEND, "why_not", lambda: None)
        monkeypatch.setattr(cuda_backend.BACKEND, "why_not_on", lambda device, dtype: None)
    elif reason := available_backends()[backend]:
        pytest.skip(reason)


@pytest.mark.skipif(INTERPRETED, reason="runs in the process that started this one")
@pytest.mark.parametrize(
    ("backend", "count"),
    [("native", 100), ("torch", 30), ("cuda", 1), pytest.param("cuda", 6, marks=pytest.mark.slow)],
)
def test_a_sample(backend, count, monkeypatch):
    on_the_cpu(monkeypatch, backend)
    check_all(sample(count, seed=len(backend), most=4096 if backend == "native" else 65), backend)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.skipif(INTERPRETED, reason="runs in the process that started this one")
@pytest.mark.parametrize("backend", ["native", "torch", "cuda"])
def test_the_whole_grid(backend, monkeypatch):
    on_the_cpu(monkeypatch, backend)
    check_all(GRID, backend)


@pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs it in a process of its own")
def test_a_sample_in_triton(monkeypatch):
    on_the_cpu(monkeypatch, "triton")
    count = int(os.environ.get("MEDMAMBA_TEST_CASES", "0"))
    check_all(sample(count, seed=1) if count else few(2), "triton")


def few(count):
    """The interpreter takes seconds for each."""
    forms = [("one group", "shared"), ("two groups", "constant")]
    return [
        next(c for c in sample(len(GRID), seed) if form == (c.B, c.C) and c.length <= 2)
        for seed, form in enumerate(forms[:count])
    ]


def interpret(count):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MEDMAMBA_TEST_CASES": str(count)}
    command = [sys.executable, "-m", "pytest", __file__, "-x", "-p", "no:cacheprovider", "-k", "in_triton"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if "lambda self: int(self.handle.data)\n" in done.stdout:  # a line of Triton's own, in the traceback
        pytest.skip("the interpreter of this Triton, such as 3.4 to 3.6, does not run with NumPy 2.4 or newer")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout, "nothing ran"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="already running it")
def test_in_the_interpreter():
    interpret(0)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.skipif(INTERPRETED, reason="already running it")
def test_more_of_the_grid_in_the_interpreter():
    interpret(300)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton", "mamba_ssm"])
def test_the_whole_grid_on_a_gpu(backend, dtype):
    """Against the CPU's library in float32, which the tests above hold against the definition."""
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    by = "native" if native.BACKEND.why_not() is None else None
    check_all([case for case in GRID if case.dtype == dtype], backend, "cuda", by)
