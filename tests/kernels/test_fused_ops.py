"""What surrounds the scan, by its CUDA kernels against the plain expressions in float64: values and all gradients. On a
GPU where there is one, else in the emulator of test_cuda_kernels.py."""

import contextlib
import copy
import functools

import pytest
import torch
from test_cuda_kernels import CUDA, DEVICE, emulate, gpu, runs
from torch import nn

import medmamba
from medmamba.kernels.block import eligibility, training, training_conv
from medmamba.kernels.cuda import nvrtc
from medmamba.model import ConvBranch, DropPath
from medmamba.model import network as pieces
from medmamba.training.graphed_step import GraphedStep

TYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if not CUDA:
        emulate(monkeypatch, processors=1)  # few programs, so that each has several turns
        monkeypatch.setattr(eligibility, "_on_cuda_backend", lambda x, backend: True)


@contextlib.contextmanager
def plain():
    """The expressions that define the layers, wherever the tensors are."""
    kept = eligibility._on_cuda_backend
    eligibility._on_cuda_backend = lambda x, backend: False
    try:
        yield
    finally:
        eligibility._on_cuda_backend = kept


@contextlib.contextmanager
def launches():
    """The list of kernels that are launched."""
    names, kept = [], training.launch

    def launch(kernel, grid, threads, on, *arguments):
        names.append(known.get(id(kernel)))
        return kept(kernel, grid, threads, on, *arguments)

    known, load = {}, nvrtc.load_kernel

    def load_kernel(file, name, *rest):
        kernel = load(file, name, *rest)
        known[id(kernel)] = name
        return kernel

    caches = training._norm_kernel, training._conv_plan, training._mix_kernel, training_conv._kernel
    for cache in caches:
        cache.cache_clear()
    training.launch, nvrtc.load_kernel = launch, load_kernel
    try:
        yield names
    finally:
        training.launch, nvrtc.load_kernel = kept, load


# --- problems -------------------------------------------------------------------------------------------------------


def norm(channels):
    layer = nn.LayerNorm(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    return layer


def branch(channels):
    layers = ConvBranch(channels)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    return layers


def depthwise(channels):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class EverySecond(DropPath):
    """Drops every second image."""

    def keep_mask(self, x):
        return (torch.arange(len(x), device=x.device) % 2 == 0).float().view(-1, 1, 1, 1) / (1 - self.rate)


ALL = DropPath(0.0)  # drops none

# Each: the layer it needs, the shapes of its maps, and the call; C is the width of the widest norm or convolution.
PROBLEMS = {
    "split_norm": lambda B, H, W, C: (norm(C), [(B, H, W, 2 * C)], lambda m, x: pieces.split_norm(x, m)),
    "conv_branch": lambda B, H, W, C: (branch(C), [(B, H, W, C)], lambda m, x: pieces.conv_branch(x, m)),
    "conv_silu": lambda B, H, W, C: (depthwise(C), [(B, H, W, 2 * C)], lambda m, x: pieces.conv_silu(x, m)),
    "gate_project": lambda B, H, W, C: (
        nn.Sequential(norm(C), nn.Linear(C, C // 2, bias=False)),
        [(B, H, W, C), (B, H, W, 2 * C)],
        lambda m, y, wide: pieces.gate_project(y, wide.chunk(2, -1)[1], *m),
    ),
    "channel_norm": lambda B, H, W, C: (norm(C), [(B, H, W, C)], lambda m, x: pieces.channel_norm(x, m)),
    "merge_norm": lambda B, H, W, C: (norm(4 * C), [(B, H, max(W, 2), C)], lambda m, x: pieces.merge_norm(x, m)),
    "mix": lambda B, H, W, C: (
        nn.Identity(),
        [(B, H, W, 2 * C), (B, H, W, C), (B, H, W, C)],
        lambda m, x, left, right: pieces.mix(x, left, right, ALL),
    ),
    "mix with dropped paths": lambda B, H, W, C: (
        nn.Identity(),
        [(B, H, W, 2 * C), (B, H, W, C), (B, H, W, C)],
        lambda m, x, left, right: pieces.mix(x, left, right, EverySecond(0.3)),
    ),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


def problem(name, shape, dtype):
    """Layer, maps and call, in float64 but all numbers such that `dtype` holds them."""
    torch.manual_seed(0)
    layer, shapes, call = PROBLEMS[name](*shape)
    layer = layer.to(dtype).double().to(DEVICE)
    return layer, [torch.randn(size).to(dtype).double().to(DEVICE) for size in shapes], call


def backward(outputs, inputs):
    """Gradients along random numbers that every type holds."""
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, along))


def listed(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def evaluate(layer, maps, call, dtype, parameters=None):
    """All outputs, the gradients of all maps, and those of all parameters, which are of `parameters` or `dtype`."""
    layer = copy.deepcopy(layer).to(parameters or dtype)
    maps = [m.detach().to(dtype).requires_grad_() for m in maps]
    mixed = parameters is not None and parameters != dtype
    with torch.autocast(DEVICE, dtype) if mixed else contextlib.nullcontext():
        outputs = listed(call(layer, *maps))
    grads = backward(outputs, [*maps, *layer.parameters()])
    return [y.detach() for y in outputs], grads[: len(maps)], grads[len(maps) :]


def check(name, shape, dtype, parameters=None):
    """At most twice the error of the expressions in the same type, and what these may have been lucky by."""
    setting = problem(name, shape, dtype)
    with plain():
        exact, usual = evaluate(*setting, torch.float64), evaluate(*setting, dtype)
    found = evaluate(*setting, dtype, parameters)
    units = 8 if dtype == torch.float32 else 1  # a GPU's fast roots, exponentials and divisions are off by two each
    for kind, *groups in zip(("output", "gradient of map", "gradient of parameter"), found, usual, exact, strict=True):
        for i, (f, u, e) in enumerate(zip(*groups, strict=True)):
            what = f"{name}, {kind} {i}"
            assert f.shape == e.shape and f.dtype == (parameters if parameters and "parameter" in kind else dtype), what
            error, budget = ((t.double() - e).abs().max() for t in (f, u))
            allowed = 2 * budget + units * torch.finfo(dtype).eps * e.abs().max()
            assert error <= allowed, f"{what}: error {error:.2e}, the expression's {budget:.2e}, allowed {allowed:.2e}"


# --- values and gradients -------------------------------------------------------------------------------------------


# Compiling for the emulator takes half a second for each; each shape and each type is in the fast part once.
SHAPES = [(2, 3, 7, 12), (1, 5, 4, 48), (3, 2, 1, 4)]
CASES = [
    pytest.param(shape, dtype, marks=[] if i == j else pytest.mark.slow)
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(TYPES)
]


@runs
@problems
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_gradients(name, shape, dtype):
    check(name, shape, dtype)


@pytest.mark.slow
@runs
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_project", (2, 19, 17, 8)),  # more rows than programs take at a time
        ("split_norm", (1, 9, 11, 96)),
        ("split_norm", (1, 1, 5, 388)),  # a warp per row, of which it does not fill all lanes
        ("gate_project", (1, 2, 3, 516)),
        ("merge_norm", (2, 7, 9, 96)),
        ("merge_norm", (1, 2, 3, 512)),
        ("conv_silu", (2, 6, 35, 4)),  # several turns and strips
        ("conv_silu", (1, 2, 9, 96)),
        ("conv_silu", (1, 1, 3, 1028)),  # three blocks of channels, the last cut short
    ],
    ids=str,
)
def test_other_sizes(name, shape):
    check(name, shape, torch.float32)
    check(name, shape, torch.bfloat16)


@pytest.mark.slow
@runs
@problems
def test_parameters_in_float32(name):
    """As under autocast: the map has 16 bits, parameters and their gradients have 32."""
    check(name, (2, 5, 6, 24), torch.bfloat16, torch.float32)


@runs
@problems
def test_same_bits_every_time(name):
    setting = problem(name, (2, 9, 10, 24), torch.bfloat16)
    first, second = ([t for group in evaluate(*setting, torch.bfloat16) for t in group] for _ in range(2))
    assert all(map(torch.equal, first, second))


def columns(m):
    """The same map, lying column by column."""
    return m.transpose(1, 2).contiguous().transpose(1, 2)


def shifted(m):
    """The same numbers, at an address from which four cannot be read at once."""
    return torch.cat((m.new_zeros(1), m.flatten()))[1:].view(m.shape)


@pytest.mark.slow
@runs
@problems
def test_wherever_the_numbers_lie(name, monkeypatch):
    layer, maps, call = problem(name, (2, 3, 5, 8), torch.float32)
    layer, maps = layer.float(), [m.float() for m in maps]
    expected = [t for group in evaluate(layer, maps, call, torch.float32) for t in group]

    def launch(kernel, grid, threads, on, *arguments, launch=training.launch):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.numel() > len(on)]  # not one per image
        assert all(t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors)  # of a GPU, which stops there
        return launch(kernel, grid, threads, on, *arguments)

    monkeypatch.setattr(training, "launch", launch)

    def found(view):
        inputs = [m.clone().requires_grad_() for m in maps]
        outputs = listed(call(layer, *map(view, inputs)))
        return [*outputs, *backward(outputs, [*inputs, *layer.parameters()])]

    for view in (columns, shifted):
        assert all(map(torch.equal, found(view), expected))
    for parameter in layer.parameters():
        parameter.data = shifted(parameter.data)
    assert all(map(torch.equal, found(lambda m: m), expected))


@runs
@problems
def test_gradients_that_are_one_number_for_all(name):
    """What a mean hands back has strides of zero."""
    layer, maps, call = problem(name, (2, 3, 5, 8), torch.float32)
    layer, gradients = layer.float(), []
    for ones in (lambda y: y.new_ones(()).expand_as(y), torch.ones_like):
        inputs = [m.float().requires_grad_() for m in maps]
        outputs = listed(call(layer, *inputs))
        gradients.append(torch.autograd.grad(outputs, [*inputs, *layer.parameters()], [*map(ones, outputs)]))
    assert all(map(torch.equal, *gradients))


@runs
@pytest.mark.parametrize("name", [name for name in PROBLEMS if "mix" not in name])
def test_only_some_gradients_are_wanted(name):
    layer, maps, call = problem(name, (2, 3, 5, 8), torch.float32)
    layer, maps = layer.float(), [m.float() for m in maps]
    _, of_maps, of_parameters = evaluate(layer, maps, call, torch.float32)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(backward(listed(call(layer, *maps)), [*layer.parameters()]), of_parameters)
    inputs = [m.requires_grad_() for m in maps]
    bias = list(layer.parameters())[1]
    close(backward(listed(call(layer, *inputs)), [bias]), of_parameters[1:2])
    layer.requires_grad_(False)
    close(backward(listed(call(layer, *inputs)), inputs), of_maps)
    with torch.no_grad():
        assert not any(y.requires_grad for y in listed(call(layer, *map(torch.Tensor.detach, inputs))))


@runs
@problems
def test_second_derivatives_are_refused(name):
    layer, maps, call = problem(name, (1, 2, 3, 8), torch.float32)
    inputs = [m.float().requires_grad_() for m in maps]
    outputs = listed(call(layer.float(), *inputs))
    first = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[-1].sum().backward()


@runs
@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norms_remember(dtype, momentum):
    """The running statistics of the expression, which knows of the biases of the convolutions."""
    layer, (x,), _ = problem("conv_branch", (2, 5, 6, 24), dtype)
    x = (3 + 2 * x).to(dtype)
    branches = [copy.deepcopy(layer).float() for _ in range(2)]
    mixed = torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)
    for each in branches:
        for norm in (each[0], each[2], each[5]):
            norm.momentum, norm.running_mean, norm.running_var = momentum, torch.ones(24), torch.full((24,), 2.0)
        each.to(DEVICE)
        with mixed, plain() if each is branches[1] else contextlib.nullcontext():
            pieces.conv_branch(x, each)
    for name, buffer in branches[1].named_buffers():
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(branches[0].get_buffer(name), buffer, **tolerance, msg=name)
        assert "running" not in name or (momentum == 0) == bool((buffer == buffer[0]).all())


@runs
def test_batch_norm_of_numbers_far_from_zero():
    layer, (x,), call = problem("conv_branch", (2, 9, 10, 8), torch.float32)
    x = (x + 1000).float().double()
    with plain():
        exact = evaluate(layer, [x], call, torch.float64)
    found = evaluate(layer, [x], call, torch.float32)
    for f, e in zip(found[0] + found[1], exact[0] + exact[1], strict=True):
        assert (f.double() - e).abs().max() < 1e-3 * e.abs().max()


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
    "forward": ["norm_forward", *NORM, *NORM, *NORM, "batch_apply", "conv_forward", "norm_forward", "mix_forward"],
    "backward": ["mix_backward", "norm_forward", "norm_backward", "conv_backward", "conv_input", "relu_gradient"]
    + ["add_partials", *NORM_BACK, *NORM_BACK, *NORM_BACK, "norm_backward"],
}
KERNELS = 4 * (2 + sum(map(len, BLOCK.values())))  # of a step: blocks of four stages, and the norm before each


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
        around = ["norm_forward"], ["norm_backward"]  # of patches
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
