"""What lies between the scans of two blocks: the kernel against PyTorch in float64, on a GPU or in the emulator."""

import pytest
import torch
import torch.nn.functional as F
from test_cuda_kernels import CUDA, DEVICE, emulate, gpu, runs

from medmamba.kernels.block.between import Begin, End, arranged_linear, between


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=2)


def check(B, H, W, C, dtype, mix=True, split=True, spoil=False):
    torch.manual_seed(0)
    half = C // 2

    def made(*shape, scale=1.0, offset=0.0):
        return (torch.randn(shape) * scale + offset).to(dtype).to(DEVICE)

    x, left, parts, both = made(B, H, W, C), made(B, H, W, half), made(B, 4, H * W, C), made(B, H, W, 2 * C)
    gate = both[..., C:]
    if spoil:
        left[0, 0, 0, 0] = torch.nan
    weights = [made(n, scale=0.3, offset=1.0).float() for n in (C, half, half)]
    biases = [made(n).float() for n in (C, half, half)]
    project, expand = made(half, C, scale=C**-0.5), made(2 * C, half, scale=half**-0.5)
    end = End(weights[0], biases[0], 1e-5, arranged_linear(project))
    begin = Begin(weights[1], biases[1], weights[2], biases[2], 1e-6, arranged_linear(expand))
    found = between(x, (left, parts, gate) if mix else None, end if mix else None, begin if split else None)

    def rounded(t):
        return t.to(dtype).double()

    out = x.double()
    if mix:
        y = F.layer_norm(parts.double().sum(1).view(B, H, W, C), (C,), weights[0].double(), biases[0].double(), 1e-5)
        right = rounded(y * F.silu(gate.double())) @ project.double().T
        out = out + torch.stack([left.double().relu(), right], -1).flatten(-2)
    else:
        assert found[0] is x
    expected = [out, None, None]
    if split:
        expected[1] = out[..., :half] * weights[1].double() + biases[1].double()
        normed = F.layer_norm(out[..., half:], (half,), weights[2].double(), biases[2].double(), 1e-6)
        expected[2] = rounded(normed) @ expand.double().T
    units = torch.finfo(dtype).eps
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if e is not None:  # a factor that rounds the other way shifts a sum by less than the rounding of the largest
            assert f.shape == e.shape and f.dtype == dtype
            torch.testing.assert_close(f.double(), e, rtol=units, atol=2 * units, equal_nan=spoil)
            assert f.isnan().any() == spoil


@runs
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 7, 32), torch.float16), pytest.param((1, 2, 9, 128), torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_block_ends_and_the_next_begins(shape, dtype):
    check(*shape, dtype)


@runs
def test_nan_is_not_hidden_by_relu():
    check(1, 3, 6, 32, torch.float16, split=False, spoil=True)


@pytest.mark.slow
@runs
@pytest.mark.parametrize("C", [32, 64, 96, 256])
def test_only_an_end_or_only_a_beginning(C):
    check(1, 3, 6, C, torch.float16, split=False)
    check(1, 3, 6, C, torch.float16, mix=False)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "C"), [(88, 32), (44, 64), (22, 128), (11, 256), (56, 96), (28, 192)])
def test_sizes_of_a_network_on_a_gpu(side, C, dtype):
    for mix, split in ((True, True), (True, False), (False, True)):
        check(3, side, side, C, dtype, mix, split)
