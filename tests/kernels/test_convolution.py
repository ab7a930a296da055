"""The 3x3 convolution of decoders against PyTorch in float64: on a GPU, or in the emulator of test_cuda_kernels.py."""

import pytest
import torch
import torch.nn.functional as F
from test_cuda_kernels import CUDA, DEVICE, emulate, gpu, runs

from medmamba.kernels.block import convolution
from medmamba.kernels.block.convolution import PLANS, Plan, arranged, conv3x3

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=2)


def problem(B, H, W, C, S=0, O=16, enlarge=False, dtype=torch.float16):
    torch.manual_seed(0)
    shrink = 2 if enlarge else 1
    x = torch.randn(B, H // shrink, W // shrink, C).to(dtype)
    skip = torch.randn(B, H, W, S).to(dtype) if S else None
    weight = (torch.randn(O, C + S, 3, 3) / (3 * (C + S) ** 0.5)).to(dtype)
    return [None if t is None else t.to(DEVICE) for t in (x, skip, weight, torch.randn(O).to(dtype))]


def check(B, H, W, C, S=0, O=16, enlarge=False, head=False, dtype=torch.float16, plan=None):
    x, skip, weight, bias = problem(B, H, W, C, S, O, enlarge, dtype)
    found = conv3x3(x, skip, arranged(weight, head), bias, enlarge=enlarge, head=head, plan=plan)
    joined = x.double().permute(0, 3, 1, 2)
    joined = F.interpolate(joined, scale_factor=2.0, mode="nearest") if enlarge else joined
    joined = joined if skip is None else torch.cat([joined, skip.double().permute(0, 3, 1, 2)], 1)
    expected = F.conv2d(joined, weight.double(), bias.double(), padding=1)
    expected = expected if head else expected.relu().permute(0, 2, 3, 1)
    assert found.shape == expected.shape and found.dtype == dtype
    # Sums are in float32, so what is left is the rounding of the result.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-4)


@runs
@pytest.mark.parametrize("dtype", [HALVES[0], pytest.param(HALVES[1], marks=pytest.mark.slow)], ids=str)
def test_an_enlarged_map_and_a_skip_connection(dtype):
    check(2, 6, 18, 64, 32, O=32, enlarge=True, dtype=dtype)


@runs
def test_a_head_writes_maps():
    check(2, 5, 17, 16, O=1, head=True)


@pytest.mark.slow
@runs
@pytest.mark.parametrize("plan", [*PLANS, Plan(16, 16), Plan(8, 16), None], ids=str)
def test_every_launch(plan):
    check(1, 18, 20, 32, 16, O=64, enlarge=True, plan=plan)


@pytest.mark.slow
@runs
@pytest.mark.parametrize("classes", [3, 8, 11])
def test_heads_of_several_classes(classes):
    check(1, 3, 2, 32, O=classes, head=True, dtype=torch.bfloat16)
    check(1, 3, 2, 48, O=classes, head=True, plan=Plan(4, 8))


@runs
def test_values_beyond_the_type_become_infinite_and_nan_stays():
    x, _, weight, bias = problem(1, 4, 4, 16)
    x[0, 0, 0, 0], bias[1] = torch.nan, 7e4
    found = conv3x3(x, None, arranged(weight), bias)
    assert found[0, 3, 3, 1] == torch.inf and not found[0, 3, 3].isnan().any()
    assert found[0, :2, :2].isnan().all(), "where ReLU alone would give 0"


def test_a_launch_fills_the_gpu(monkeypatch):
    emulate(monkeypatch, processors=132)
    convolution.conv_plan.cache_clear()
    few, many = (convolution.conv_plan(batch, 44, 44, 64, 0) for batch in (1, 64))
    assert few == Plan(4, 16) and many == Plan(8, 64)
    assert convolution.conv_plan(16, 352, 352, 16, 0) == Plan(16, 16)
    convolution.conv_plan.cache_clear()


@gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", [*PLANS, Plan(16, 16), Plan(8, 16), None], ids=str)
def test_sizes_of_a_segmenter(batch, dtype, plan):
    """Each launch on the maps of a U-Net with the nano encoder at 352 pixels."""
    for side, C, S, O in ((22, 256, 128, 128), (44, 128, 64, 64), (88, 64, 32, 32), (176, 32, 0, 16), (352, 16, 0, 16)):
        if plan is None or O % plan.columns == 0:
            check(batch, side, side, C, S, O, enlarge=True, dtype=dtype, plan=plan)
            check(batch, side, side, O, O=O, dtype=dtype, plan=plan)
    check(batch, 352, 352, 16, O=1, head=True, dtype=dtype)
