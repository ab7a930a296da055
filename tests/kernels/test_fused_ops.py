"""What surrounds the scan, by its CUDA kernels against the plain expressions in float64: values and all gradients. On a
GPU where there is one, else in the emulator of test_cuda_kernels.py."""

import contextlib
import copy
import functools

import pytest
import torch
from fused_problems import (
    PROBLEMS,
    TYPES,
    backward,
    check,
    evaluate,
    listed,
    plain,
    problem,
    problems,
    without_a_gpu,  # noqa: F401, runs for each test
)
from test_cuda_kernels import DEVICE, runs

from medmamba.kernels.block import training
from medmamba.model import network as pieces

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
def test_nan_is_not_hidden_by_relu():
    layer, (x,), call = problem("conv_branch", (2, 3, 4, 8), torch.float32)
    x[0, 0, 0, 0] = torch.nan
    layer, x = copy.deepcopy(layer).float(), x.float()
    other = copy.deepcopy(layer)
    with plain():
        expected = call(other, x)
    assert expected.isnan().all() and call(layer, x).isnan().all()
    for name, buffer in other.named_buffers():  # nor by the variance, which is no less than zero
        assert torch.equal(layer.get_buffer(name).isnan(), buffer.isnan()), name


@runs
def test_batch_norm_of_numbers_far_from_zero():
    layer, (x,), call = problem("conv_branch", (2, 9, 10, 8), torch.float32)
    x = (x + 1000).float().double()
    with plain():
        exact = evaluate(layer, [x], call, torch.float64)
    found = evaluate(layer, [x], call, torch.float32)
    for f, e in zip(found[0] + found[1], exact[0] + exact[1], strict=True):
        assert (f.double() - e).abs().max() < 1e-3 * e.abs().max()
