"""The CUDA kernels around the scan: in a whole model, at full size on a GPU, and when plain expressions run instead."""

import contextlib

import pytest
import torch
from fused_problems import (
    ALL,
    TYPES,
    branch,
    check,
    norm,
    plain,
    problems,
    without_a_gpu,  # noqa: F401, runs for each test
)
from test_cuda_kernels import DEVICE, gpu, runs
from torch import nn

import medmamba
from medmamba.kernels.block import training, training_conv
from medmamba.kernels.block.plan import plan_for
from medmamba.kernels.cuda import nvrtc
from medmamba.model import network as pieces
from medmamba.training.graphed_step import GraphedStep

dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)


AROUND = ("train.cu", "train_conv.cu", "batch.cu", "whole.cu")  # the scan


def forget():
    """Forgets kernels that were loaded."""
    kernels = training.norm_kernel, training.conv_plan, training.mix_kernel, training.sum_kernel, training_conv._kernel
    for cache in (*kernels, plan_for):
        cache.cache_clear()


@contextlib.contextmanager
def launches():
    """The list of kernels around the scan that are launched."""
    names, load = [], nvrtc.load_kernel

    def load_kernel(file, name, *rest):
        kernel = load(file, name, *rest)

        def launched(*arguments):
            names.append(name)
            kernel(*arguments)

        return launched if file in AROUND else kernel

    forget()
    nvrtc.load_kernel = load_kernel
    try:
        yield names
    finally:
        nvrtc.load_kernel = load
        forget()


# --- when the expressions run instead -------------------------------------------------------------------------------


def ran(call):
    """The kernels that a call launches."""
    with launches() as names:
        call()
    return names


@runs
def test_modules_with_hooks_are_called():
    x, layer, calls = torch.randn(1, 2, 3, 16, device=DEVICE), norm(8).to(DEVICE), []
    assert ran(lambda: pieces.split_norm(x, layer)) == ["norm_forward"]
    handle = layer.register_forward_hook(lambda *args: calls.append(1))
    assert ran(lambda: pieces.split_norm(x, layer)) == [] and calls == [1]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    try:
        assert ran(lambda: pieces.split_norm(x, layer)) == [] and calls == [1, 1]
    finally:
        handle.remove()
    assert ran(lambda: pieces.split_norm(x, layer)) == ["norm_forward"]


@runs
def test_what_the_kernels_do_not_cover():
    def x(channels, dtype=torch.float32):
        return torch.randn(1, 4, 4, channels, dtype=dtype, device=DEVICE)

    class Other(nn.LayerNorm):
        pass

    def conv(channels=8, **options):
        return nn.Conv2d(channels, channels, **{"kernel_size": 3, "padding": 1, "groups": channels, **options}).to(
            DEVICE
        )

    def layer(channels, kind=nn.LayerNorm, **options):
        return kind(channels, **options).to(DEVICE)

    def changed(index, **attributes):
        """A branch of which one layer is another."""
        layers = branch(8).to(DEVICE)
        for name, value in attributes.items():
            setattr(layers[index], name, value)
        return layers

    def hooked(layers):
        layers[3].register_forward_hook(lambda *_: None)
        return layers

    def linear(channels):
        return nn.Linear(channels, 4, bias=False).to(DEVICE)

    uncovered = [
        lambda: pieces.channel_norm(x(6), layer(6)),
        lambda: pieces.channel_norm(x(8), layer(8, Other)),
        lambda: pieces.channel_norm(x(8), layer(8, bias=False)),
        lambda: pieces.channel_norm(x(8), layer(8, elementwise_affine=False)),
        lambda: pieces.channel_norm(x(8, torch.float64), layer(8).double()),
        lambda: pieces.channel_norm(x(8)[:0], layer(8)),
        lambda: pieces.channel_norm(nn.Parameter(x(8)), layer(8)),
        lambda: pieces.channel_norm(x(4096), layer(4096)),
        lambda: pieces.merge_norm(x(8)[:, :1], layer(32)),
        lambda: pieces.gate_project(x(8), x(8), layer(8), nn.Linear(8, 4).to(DEVICE)),
        lambda: pieces.gate_project(x(8), x(8), Other(8).to(DEVICE), linear(8)),
        lambda: pieces.conv_branch(x(8), branch(8).to(DEVICE).eval()),
        lambda: pieces.conv_branch(x(6), branch(6).to(DEVICE)),
        lambda: pieces.conv_branch(x(8), changed(0, momentum=None)),
        lambda: pieces.conv_branch(x(8), changed(2, running_mean=None, running_var=None)),
        lambda: pieces.conv_branch(x(8), changed(4, bias=None)),
        lambda: pieces.conv_branch(x(8), changed(4, padding_mode="reflect")),
        lambda: pieces.conv_branch(x(8), changed(1, dilation=(2, 2), padding=(2, 2))),
        lambda: pieces.conv_branch(x(8), nn.SyncBatchNorm.convert_sync_batchnorm(branch(8).eval()).to(DEVICE)),
        lambda: pieces.conv_branch(x(8), hooked(branch(8).to(DEVICE))),
        lambda: pieces.conv_silu(x(16), conv(bias=False)),
        lambda: pieces.conv_silu(x(16), conv(dilation=2, padding=2)),
        lambda: pieces.conv_silu(x(16), conv(padding_mode="circular")),
        lambda: pieces.conv_silu(x(16), conv(kernel_size=5, padding=2)),
        lambda: pieces.conv_silu(x(16), conv(groups=4)),
        lambda: pieces.mix(x(8), x(4), x(4, torch.bfloat16), ALL),
        lambda: pieces.mix(x(12), x(6), x(6), ALL),
        lambda: pieces.mix(x(8), x(4)[:, :1], x(4)[:, :1], ALL),
        lambda: pieces.gate_project(x(8), x(8)[:, :1], layer(8), linear(8)),
        lambda: torch.func.grad(lambda x: pieces.mix(x, x[..., :4], x[..., 4:], ALL).sum())(x(8)),
        lambda: torch.compile(lambda x: pieces.channel_norm(x, layer(8)), backend="eager")(x(8)),
        lambda: torch.jit.trace(lambda x: pieces.channel_norm(x, layer(8)), x(8), check_trace=False),
    ]
    for i, call in enumerate(uncovered):
        assert ran(call) == [], f"number {i}"
    with pytest.raises(RuntimeError, match="dtype"):  # what the expression says of two types without autocast
        pieces.gate_project(x(8, torch.bfloat16), x(8, torch.bfloat16), layer(8).bfloat16(), linear(8))
    assert ran(lambda: pieces.channel_norm(x(8), layer(8))) == ["norm_forward"]
    with plain():
        assert ran(lambda: pieces.channel_norm(x(8), layer(8))) == []


@runs
def test_fake_tensors_meet_no_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(1, 4, 4, 8)
        assert ran(lambda: pieces.channel_norm(x, nn.LayerNorm(8))) == []


# --- the whole model ------------------------------------------------------------------------------------------------


NORM = ["batch_sums", "batch_stats", "batch_apply"]


NORM_BACK = ["batch_apply", "batch_gradient_sums", "add_partials", "batch_gradient"]


BLOCK = {
    "forward": [
        "prepare_block",
        "norm_forward",
        *NORM,
        *NORM,
        *NORM,
        "batch_apply",
        "conv_forward",
        "norm_forward",
        "mix_forward",
    ],
    "backward": ["mix_backward", "relu_gradient", *NORM_BACK, *NORM_BACK, *NORM_BACK]
    + ["norm_forward", "norm_backward", "conv_backward", "conv_input", "norm_backward", "finish_block"],
}


KERNELS = 4 * (3 + sum(map(len, BLOCK.values())))  # of a step: blocks of four stages, and the norm before each


def network(variant="test", **options):
    torch.manual_seed(0)
    model = medmamba.create_model(variant, num_classes=3, **options).to(DEVICE).train()
    with torch.no_grad():
        for module in model.modules():  # so that nothing is one or zero by chance
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    return model


def step(model, images, autocast=None):
    """The logits, and all gradients by name."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)  # of the dropped paths
    with torch.autocast(DEVICE, autocast) if autocast else contextlib.nullcontext():
        logits = model(images)
    (logits.float() * torch.arange(1, 4, device=logits.device)).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return logits.detach(), {"images": images.grad, **gradients}


def distance(a, b):
    """Of two sets of gradients, relative to the second."""
    squares = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return (squares / sum(b[n].double().square().sum() for n in b)).sqrt().item()


@pytest.mark.slow
@runs
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model(checkpointing, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # would flip a ReLU here and there
    model, images = network(drop_path_rate=0.5), torch.randn(4, 3, 64, 44, device=DEVICE)
    with plain():
        expected, gradients = step(model, images)
    model.set_grad_checkpointing(checkpointing)
    with launches() as names:
        logits, found = step(model, images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert distance(found, gradients) < 1e-4
    largest = max(g.abs().max().item() for g in gradients.values())  # some are zero but for rounding
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)
    if not checkpointing:
        around = ["norm_forward"], ["norm_backward", "add_partials"]  # of patches
        forward = 4 * (around[0] + BLOCK["forward"])
        backward = 4 * (BLOCK["backward"] + around[1])
        assert names == forward + backward


@pytest.mark.slow
@runs
def test_model_under_autocast():
    """The stream of the blocks stays in 16 bits, and gradients are as near to those in float32 as without kernels."""
    model, images = network(drop_path_rate=0.0), torch.randn(4, 3, 64, 64, device=DEVICE)
    types = set()
    with plain():
        _, exact = step(model, images)
        _, usual = step(model, images, torch.bfloat16)
    handles = [
        module.register_forward_hook(lambda m, i, y: types.update([i[0].dtype, y.dtype]))
        for stage in model.stages
        for module in stage.blocks
    ]
    with launches() as names:
        logits, found = step(model, images, torch.bfloat16)
    assert len(names) == KERNELS, "not all went through the kernels"
    assert types == {torch.bfloat16} and logits.dtype == torch.bfloat16
    assert all(found[n].dtype == torch.float32 and found[n].isfinite().all() for n in found)
    assert distance(found, exact) < 1.3 * distance(usual, exact) + 0.01
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@runs
def test_hooks_on_the_maps_see_and_steer_them():
    """What attribution reads: outputs and gradients of the places to hook, also with dropped paths."""
    model, images = network(drop_path_rate=0.6), torch.randn(8, 3, 32, 32, device=DEVICE)
    block = model.stages[3].blocks[0]
    seen = []
    for _ in range(2):
        maps = {}
        handles = [
            module.register_forward_hook(lambda m, i, y, k=key, maps=maps: maps.update({k: y}) or y.retain_grad())
            for key, module in (("conv", block.conv), ("ssm", block.ssm_map), ("stage", model.stages[3].map))
        ]
        with launches() as names, plain() if seen else contextlib.nullcontext():
            step(model, images)
        assert bool(names) != bool(seen)
        seen.append(maps)
        for handle in handles:
            handle.remove()
    dropped = (seen[0]["ssm"].grad == 0).all(dim=(1, 2, 3))
    assert 0 < dropped.sum() < 8
    for key in ("conv", "ssm", "stage"):
        torch.testing.assert_close(seen[0][key], seen[1][key], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen[0][key].grad, seen[1][key].grad, rtol=1e-3, atol=1e-5)
        assert seen[0][key].grad.abs().max() > 0


# --- on a GPU -------------------------------------------------------------------------------------------------------


@gpu
@dtypes
@problems
@pytest.mark.parametrize("shape", [(64, 56, 56, 48), (64, 28, 28, 96), (64, 14, 14, 192), (64, 7, 7, 384)], ids=str)
def test_at_full_size(name, shape, dtype):
    """The maps of `tiny`; twice as wide are those within the scan branch."""
    check(name, shape, dtype)
    if name in ("gate_project", "conv_silu"):
        check(name, (*shape[:3], 2 * shape[3]), dtype)


@gpu
def test_the_backend_switches_the_kernels():
    model, images = network(), torch.randn(2, 3, 64, 64, device=DEVICE)
    assert len(ran(lambda: step(model, images))) == KERNELS
    model.set_scan_backend("torch")
    assert ran(lambda: step(model, images)) == []
    model.set_scan_backend("cuda")
    assert len(ran(lambda: step(model, images))) == KERNELS


@gpu
def test_an_environment_variable_switches_the_kernels(monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SCAN", "torch")
    assert ran(lambda: step(network(), torch.randn(2, 3, 64, 64, device=DEVICE))) == []


@gpu
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
def test_tiny(autocast, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    rate = 0.0 if autocast else 0.2  # in another type, other paths are dropped
    model, images = network("tiny", drop_path_rate=rate), torch.randn(8, 3, 224, 224, device=DEVICE)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    with plain():
        logits, exact = step(model, images)
        usual = step(model, images, autocast)[1]
    found_logits, found = step(model, images, autocast)
    if autocast is None:
        torch.testing.assert_close(found_logits, logits, rtol=1e-3, atol=1e-3)
        assert distance(found, exact) < 1e-2
    else:
        assert distance(found, exact) < 1.3 * distance(usual, exact) + 0.01


@gpu
def test_in_a_cuda_graph_and_the_same_bits_every_time(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = network(drop_path_rate=0.5).to(memory_format=torch.channels_last)
    images, targets = torch.randn(8, 3, 64, 64, device=DEVICE), torch.eye(3, device=DEVICE)[torch.arange(8) % 3]

    def loss(images, targets):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return nn.functional.cross_entropy(model(images), targets)

    def gradients():
        return [p.grad.clone() for p in model.parameters()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        start = [b.clone() for b in model.buffers()]
        eager = []
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(1)
            loss(images, targets).backward()
            eager.append(gradients())
        for buffer, value in zip(model.buffers(), start, strict=True):
            buffer.copy_(value)
        replay = GraphedStep(model, loss, images, targets)
        for _ in range(2):
            torch.manual_seed(1)
            replay(images, targets)
            for found, expected in zip(gradients(), eager[0], strict=True):
                torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3 * float(expected.abs().max()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *eager))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current():
    model, images = network(), torch.randn(2, 3, 64, 64, device=DEVICE)
    expected = step(model, images)[1]
    found = step(model.to("cuda:1"), images.to("cuda:1"))[1]
    assert distance({n: g.to(DEVICE) for n, g in found.items()}, expected) < 1e-4
