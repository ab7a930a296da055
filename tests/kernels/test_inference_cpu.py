"""The C functions around the scan, against plain PyTorch: odd sizes, halves of wider maps, every element type."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medmamba.kernels.backends import cpu
from medmamba.kernels.block import inference_cpu as fused

pytestmark = pytest.mark.skipif(not cpu.BACKEND.available(), reason="there is no C library for this platform")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
widths = pytest.mark.parametrize("C", [4, 12, 36, 96])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def every_instruction_set(monkeypatch, request):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "best_variant", lambda: request.param)


def pytest_generate_tests(metafunc):
    variants = range(cpu.best_variant() + 1) if cpu.BACKEND.available() else [0]
    metafunc.parametrize("every_instruction_set", variants, indirect=True)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.is_contiguous()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@dtypes
@widths
def test_mix_split(C, dtype):
    x, left, right = (torch.randn(2, 3, 7, c, dtype=dtype) for c in (C, C // 2, C // 2))
    scale, shift, weight, bias = torch.randn(4, C // 2).unbind()
    mixed = x.float() + torch.stack((left.float().relu(), right.float()), -1).flatten(-2)
    out, a, b = fused.mix_split(x, (left, right), (scale, shift, weight, bias, 1e-5))
    close(out, mixed, dtype)
    first, second = mixed.chunk(2, -1)
    close(a, first * scale + shift, dtype)
    close(b, F.layer_norm(second, (C // 2,), weight, bias), dtype)
    same, a, _ = fused.mix_split(x, None, (scale, shift, weight, bias, 1e-5))
    assert same is x
    close(a, x.float()[..., : C // 2] * scale + shift, dtype)
    out, *nothing = fused.mix_split(x, (left, right), None)
    close(out, mixed, dtype)
    assert nothing == [None, None]


@dtypes
@widths
def test_norms(C, dtype):
    x = torch.randn(2, 5, 7, C, dtype=dtype)
    weight, bias = torch.randn(2, 4 * C).unbind()
    parts = [x.float()[:, i:4:2, j:6:2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    close(fused.gather_norm(x, weight, bias, 1e-5), F.layer_norm(torch.cat(parts, -1), (4 * C,), weight, bias), dtype)
    weight, bias = weight[:C].contiguous(), bias[:C].contiguous()
    close(fused.norm(x, weight, bias, 1e-5), F.layer_norm(x.float(), (C,), weight, bias), dtype)


@dtypes
@widths
@pytest.mark.parametrize("size", [(1, 1), (3, 8)], ids=str)
def test_depthwise_silu(size, C, dtype):
    x = torch.randn(2, *size, 2 * C, dtype=dtype).chunk(2, -1)[1]  # pixels that do not follow each other
    weight, bias = torch.randn(C, 1, 3, 3), torch.randn(C)
    expected = F.silu(F.conv2d(x.float().permute(0, 3, 1, 2), weight, bias, padding=1, groups=C)).permute(0, 2, 3, 1)
    close(fused.depthwise_silu(x, weight.flatten(1).T.contiguous(), bias), expected, dtype)


@dtypes
def test_scan_gate(dtype):
    C, R, N = 36, 3, 5
    x, gate = torch.randn(2, 3, 4, C, dtype=dtype), torch.randn(2, 3, 4, 2 * C, dtype=dtype).chunk(2, -1)[1]
    proj = torch.randn(2, 3, 4, 4, R + 2 * N, dtype=dtype)
    scan = torch.randn(4, C, R), torch.randn(4, C), -torch.rand(4, C, N), torch.randn(4, C)
    weight, bias = torch.randn(2, C).unbind()
    y = cpu.BACKEND.scan_2d(x, proj, *scan, x.new_empty(0, dtype=torch.float32)).float()
    expected = F.layer_norm(y, (C,), weight, bias) * F.silu(gate.float())
    close(fused.scan_gate(x, proj, *scan, gate, weight, bias, 1e-5), expected, dtype)


def test_extreme_numbers():
    big = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")]).view(1, 1, 1, 8)
    weight, bias = torch.zeros(9, 8), torch.zeros(8)
    weight[4] = 1
    found = fused.depthwise_silu(big, weight, bias)
    torch.testing.assert_close(found, F.silu(big), rtol=1e-5, atol=1e-7, equal_nan=True)
    out, *_ = fused.mix_split(torch.zeros(1, 1, 1, 16), (big, torch.zeros(1, 1, 1, 8)), None)
    assert out.isnan().sum() == 1
