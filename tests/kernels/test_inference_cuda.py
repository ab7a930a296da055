"""The inference kernels around the scan, and whole models that run on them: on a GPU where there is one, else in the
emulator of test_cuda_kernels.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_cuda_kernels import (
    DEVICE,
    dtypes,
    gpu,
    problem,
    runs,
    without_a_gpu,  # noqa: F401, runs for each test
)

import medmamba
from medmamba import selective_scan_2d
from medmamba.kernels.block import between, eligibility, patches
from medmamba.kernels.block import inference as fused


def maps(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2 ** (-9 if dtype == torch.float16 else -7)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@runs
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        pytest.param(channels, dtype, marks=[] if i == j else pytest.mark.slow)
        for i, channels in enumerate((4, 36, 132))
        for j, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
    ],
    ids=str,
)
def test_mix_split(channels, dtype):
    C = channels
    x, left, right = (maps(2, 3, 2, n, dtype=dtype, seed=n + i) for i, n in enumerate((C, C // 2, C // 2)))
    scale, shift, weight, bias = (maps(C // 2, dtype=torch.float32, seed=i) for i in range(4))
    out, next_left, next_right = fused.mix_split(x, (left, right), (scale, shift, weight, bias, 1e-5))
    mixed = torch.stack((left.relu(), right), -1).flatten(3)
    close(out, x.float() + mixed.float(), dtype)
    first, second = (x.float() + mixed.float()).chunk(2, -1)
    close(next_left, first * scale + shift, dtype)
    close(next_right, F.layer_norm(second, (C // 2,), weight, bias), dtype)

    same, next_left, next_right = fused.mix_split(x, None, (scale, shift, weight, bias, 1e-5))
    assert same is x
    close(next_left, x.float()[..., : C // 2] * scale + shift, dtype)
    out, *nothing = fused.mix_split(x, (left, right), None)
    close(out, x.float() + mixed.float(), dtype)
    assert nothing == [None, None]


@runs
@dtypes
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_gather_norm(size, dtype):
    H, W, C = *size, 12
    x = maps(2, H, W, C, dtype=dtype)
    weight, bias = maps(4 * C, dtype=torch.float32), maps(4 * C, dtype=torch.float32, seed=1)
    cut = x.float()[:, : H // 2 * 2, : W // 2 * 2]
    parts = [cut[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = F.layer_norm(torch.cat(parts, -1), (4 * C,), weight, bias)
    close(fused.gather_norm(x, weight, bias, 1e-5), expected, dtype)
    weight, bias = weight[:C].contiguous(), bias[:C].contiguous()
    close(fused.norm(x, weight, bias, 1e-5), F.layer_norm(x.float(), (C,), weight, bias), dtype)


@runs
@dtypes
@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((1, 1), (2, 1)),
        ((3, 8), (8, 2)),
        ((2, 19), (4, 2)),
        pytest.param((5, 19), (8, 1), marks=pytest.mark.slow),
        pytest.param((7, 7), (4, 4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_depthwise_silu(size, tiles, dtype, monkeypatch):
    monkeypatch.setattr(fused, "TILES", (tiles, tiles))
    C = 6
    wide = maps(2, *size, 2 * C, dtype=dtype)
    x = wide.chunk(2, -1)[0]  # pixels that do not follow each other
    weight, bias = maps(C, 1, 3, 3, dtype=torch.float32), maps(C, dtype=torch.float32, seed=1)
    expected = F.silu(F.conv2d(x.float().permute(0, 3, 1, 2), weight, bias, padding=1, groups=C)).permute(0, 2, 3, 1)
    close(fused.depthwise_silu(x, weight.flatten(1).T.contiguous(), bias), expected, dtype)


def plain_patches(x, conv):
    return conv(x).permute(0, 2, 3, 1)


@runs
@pytest.mark.parametrize(
    ("size", "channels", "patch", "layout"),
    [
        ((8, 12), 3, 4, torch.channels_last),
        ((9, 14), 3, 4, torch.contiguous_format),  # rows that are not aligned, and pixels that no patch takes
        pytest.param((9, 14), 3, 4, torch.channels_last, marks=pytest.mark.slow),
        pytest.param((8, 12), 1, 4, torch.contiguous_format, marks=pytest.mark.slow),
        pytest.param((8, 12), 3, 4, torch.contiguous_format, marks=pytest.mark.slow),
        pytest.param((6, 7), 2, 2, torch.channels_last, marks=pytest.mark.slow),
        pytest.param((6, 7), 5, 3, torch.contiguous_format, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_patches(size, channels, patch, layout):
    """In two dtypes, under autocast, and from a view; all with the gradients of the weights."""
    conv = torch.nn.Conv2d(channels, 8, patch, stride=patch).to(DEVICE)
    images = maps(2, channels, *size, dtype=torch.float32).contiguous(memory_format=layout)
    wide = torch.cat((images, images), 3)[..., : size[1]]
    assert eligibility.fits_embed_patches(images, conv) and not eligibility.fits_embed_patches(
        images.clone().requires_grad_(), conv
    )
    for x in (images, wide, wide.bfloat16()):
        for enabled in (False, True):
            layer = copy.deepcopy(conv).to(x.dtype)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                found = patches.embed_patches(x, layer)
            expected = plain_patches(x.float(), conv)
            assert found.is_contiguous() and found.dtype == (torch.bfloat16 if enabled else x.dtype)
            tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
            weight = maps(*found.shape, dtype=torch.float32)
            of = layer.weight, layer.bias, conv.weight, conv.bias
            gradients = torch.autograd.grad((found * weight).sum(), of[:2])
            for g, e in zip(gradients, torch.autograd.grad((expected * weight).sum(), of[2:]), strict=True):
                torch.testing.assert_close(g.float(), e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@runs
@dtypes
def test_scan_gate(dtype):
    tensors = problem(B=2, H=3, W=4, C=36, dtype=dtype)
    wide = maps(2, 3, 4, 72, dtype=dtype)
    weight, bias = maps(36, dtype=torch.float32), maps(36, dtype=torch.float32, seed=1)
    y = selective_scan_2d(*[t.double() for t in tensors], backend="torch").float()
    expected = F.layer_norm(y, (36,), weight, bias) * F.silu(wide[..., 36:].float())
    actual = fused.scan_gate(*tensors, wide.chunk(2, -1)[1], weight, bias, 1e-5)
    assert actual.is_contiguous()
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@runs
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((8, 16, 32, 64), None), ((8, 16, 32, 64), torch.bfloat16), ((32, 64, 128, 256), torch.float16)],
    ids=str,
)
def test_fused_model(dims, dtype, monkeypatch):
    """All feature maps of the model by these kernels, against its layers one by one."""
    monkeypatch.setattr(between, "takes_tensor", lambda device: True)
    torch.manual_seed(0)
    model = medmamba.create_model("test", num_classes=3, dims=dims, depths=(2, 1, 1, 1)).to(DEVICE)
    with torch.no_grad():
        for module in model.modules():  # so that nothing is one or zero by chance
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.5, 1.5)
    model.eval()
    images = torch.randn(2, 3, 48, 36, device=DEVICE)
    with torch.inference_mode():
        expected = model.forward_pyramid(images)
        fused = model.fuse(dtype)
        found = fused.cuda_pyramid(images)
    narrow = [blocks[0].begin is not None for blocks in fused._prepared().blocks]
    assert narrow == [dims[0] == 32] * 4
    tolerance = 1e-3 if dtype is None else 0.1
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), e, rtol=tolerance, atol=tolerance * e.abs().max().item())


@pytest.mark.parametrize("expand", [1, 2, 3])
def test_one_kernel_between_scans_needs_as_many_channels_in_them_as_in_the_block(expand, monkeypatch):
    monkeypatch.setattr(between, "takes_tensor", lambda device: True)
    model = medmamba.create_model("test", dims=(32, 64, 128, 256), ssm_expand=expand).eval()
    blocks = model.fuse(torch.bfloat16)._prepared().blocks
    assert [(stage[0].begin is not None, stage[0].end is not None) for stage in blocks] == [(expand == 2,) * 2] * 4


@gpu
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_fused_model_runs_by_itself(dtype):
    torch.manual_seed(0)
    model = medmamba.create_model("nano", num_classes=4).eval().to(DEVICE)
    images = torch.randn(3, 3, 100, 68, device=DEVICE)
    fast = model.fuse(dtype)
    with torch.inference_mode():
        assert fast._runs_fused(images)
        expected, found = model(images), fast(images)
    graphed = fast.graphed(torch.zeros_like(images))
    assert torch.equal(graphed(images), found)
    with pytest.raises(ValueError, match="takes"):
        graphed(images[:1])
    tolerance = 1e-3 if dtype is None else 0.05
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
