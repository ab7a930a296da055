"""A block in training as one function: when it runs as such, and its gradients where only some are wanted. Whole models
of such blocks are in test_fused_ops_model.py."""

import copy

import pytest
import torch
from fused_problems import plain, without_a_gpu  # noqa: F401, the latter runs for each test
from test_cuda_kernels import DEVICE, runs
from test_fused_ops_model import forget
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medmamba.inference.fingerprint import stamp
from medmamba.kernels.block import eligibility, whole
from medmamba.kernels.block.plan import likes
from medmamba.kernels.block.training_conv import branch_parts
from medmamba.kernels.cuda import nvrtc
from medmamba.model.network import DropPath, SSConvSSM


def block(drop_path=0.0):
    torch.manual_seed(0)
    made = SSConvSSM(16, d_state=4, expand=2, dt_rank=3, drop_path=drop_path).to(DEVICE).train()
    with torch.no_grad():
        for module in made.modules():  # so that nothing is one or zero by chance
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    return made


def test_observed_and_other_blocks_run_as_pieces(monkeypatch):
    x = torch.randn(2, 4, 4, 16, device=DEVICE)
    assert eligibility.fits_block(x, block())
    calls = []
    names = "conv", "norm", "ssm", "ssm_map", "drop_path", "ssm.in_proj", "ssm.conv", "ssm.out_norm", "conv.3"
    for name in (*names, "ssm.out_proj", "conv.1"):
        watched = block()
        layer = watched.get_submodule(name)
        layer.forward = lambda *inputs, run=layer.forward: calls.append(1) or run(*inputs)
        assert not eligibility.fits_block(x, watched), name
        assert eligibility.fits_split_norm(x, watched.norm) == (name != "norm")
        assert eligibility.fits_conv_branch(x[..., :8], watched.conv) == (not name.startswith("conv"))
        hooked = block()
        hooked.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        assert not eligibility.fits_block(x, hooked), name

    def changed(change):
        made = block()
        change(made)
        return made

    def patched(made):
        made.ssm.forward = lambda x: x

    def narrow(made):
        made.ssm.in_proj.weight = nn.Parameter(torch.zeros(8, 8, device=DEVICE))

    others = {
        "evaluation": lambda made: made.eval(),
        "another layer of the hook": lambda made: setattr(made, "ssm_map", nn.ReLU()),
        "another projection": lambda made: setattr(made.ssm, "in_proj", nn.Linear(8, 32, device=DEVICE)),
        "a method of its own": patched,
        "another width": lambda made: setattr(made.ssm, "out_proj", nn.Linear(16, 4, bias=False, device=DEVICE)),
        "weights in float64": lambda made: made.double(),
        "a weight that is not as wide as the layer says": narrow,
        "weights elsewhere": lambda made: setattr(made.ssm, "dt_weight", nn.Parameter(made.ssm.dt_weight.to("meta"))),
    }
    for what, change in others.items():
        assert not eligibility.fits_block(x, changed(change)), what
    assert not eligibility.fits_block(x[..., :12], block()) and not eligibility.fits_block(x[:0], block())
    ran = []
    monkeypatch.setattr(whole.Block, "apply", lambda *_: ran.append(1) or x)
    block()(x)
    assert ran == [1]


class Quantised(torch.Tensor):
    """Stands in for a subclass without memory of its own, whose address is 0."""


@pytest.mark.parametrize(
    "name", ["norm.weight", "conv.1.weight", "conv.5.bias", "ssm.in_proj.weight", "ssm.conv.weight", "ssm.dt_weight"]
)
def test_kernels_take_no_address_of_other_tensors(name):
    made, x = block(), torch.randn(2, 4, 4, 16, device=DEVICE)
    owner, _, parameter = name.rpartition(".")
    layer = made.get_submodule(owner)
    setattr(layer, parameter, nn.Parameter(getattr(layer, parameter).detach().as_subclass(Quantised)))
    assert not eligibility.fits_block(x, made)
    assert eligibility.fits_split_norm(x, made.norm) == (owner != "norm")
    assert eligibility.fits_conv_branch(x[..., :8], made.conv) == (not owner.startswith("conv"))
    assert eligibility.fits_conv_silu(torch.randn(2, 4, 4, 32, device=DEVICE), made.ssm.conv) == (owner != "ssm.conv")


def test_modes_that_see_each_operation_meet_no_kernel():
    """Selective checkpointing, for one, keeps results of convolutions, which a kernel changes where they lie."""
    x = torch.randn(2, 4, 4, 16, device=DEVICE)
    assert eligibility.kernels_run(x, None)
    with FlopCounterMode(display=False):
        assert not eligibility.kernels_run(x, None)


@pytest.fixture
def idle(monkeypatch):
    """Kernels that do nothing."""
    forget()
    monkeypatch.setattr(nvrtc, "load_kernel", lambda *_: lambda *_: None)
    yield
    forget()


@pytest.mark.parametrize("run", [SSConvSSM.forward, SSConvSSM.run_pieces])
def test_what_was_made_from_old_statistics_is_noticed(idle, run):
    """Prediction keeps a copy of the network for as long as no version of its tensors changes."""
    layer, x = block(), torch.randn(2, 4, 4, 16, device=DEVICE)
    before = stamp(layer)
    run(layer, x)
    assert stamp(layer) != before
    for norm in layer.conv:
        if isinstance(norm, nn.BatchNorm2d):
            norm.num_batches_tracked = None
    before = stamp(layer)
    run(layer, x)
    assert stamp(layer) != before


def test_saved_tensors_may_come_back_at_any_address(idle, monkeypatch):
    """Kernels read several numbers at a time, which a GPU refuses at other addresses than multiples of their size."""
    taken = {}

    def load_kernel(file, name, *_):
        return lambda grid, threads, stream, *arguments: taken.update({name: arguments})

    monkeypatch.setattr(nvrtc, "load_kernel", load_kernel)
    forget()

    def elsewhere(t):
        room = t.new_empty(t.numel() + 1)[1:]
        return room.copy_(t.flatten()).view(t.shape)

    layer, x = block().to(torch.bfloat16), torch.randn(2, 4, 4, 16, device=DEVICE).bfloat16()
    for norm in (layer.conv[0], layer.conv[2], layer.conv[5]):
        norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, elsewhere):
        SSConvSSM.forward(layer, x).sum().backward()
    assert all(taken["scan_backward"][i] % 16 == 0 for i in (0, 1, 3, 4, 5, 6, 7))
    assert taken["norm_backward"][3] % 16 == 0


@pytest.mark.parametrize("run", [SSConvSSM.forward, SSConvSSM.run_pieces])
def test_second_derivatives_are_refused_also_of_a_sum(idle, run):
    """Whose gradient is one, which needs no gradient itself; weights are frozen, as for a Hessian of the input."""
    x = torch.randn(2, 4, 4, 16, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(block().requires_grad_(False), x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_other_defaults_of_pytorch():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        mask = DropPath(0.5).train().keep_mask(torch.randn(2, 4, 4, 8))
    finally:
        torch.set_default_dtype(kept)
    assert mask.dtype == torch.float32, "kernels read it as such"
    with torch.device("meta"):
        assert likes((2, 3))[0].device.type == "cpu", "plans outlive the setting"


def plain_tensors(made):
    """As nn.DataParallel copies a module, and FSDP flattens one."""
    for module in made.modules():
        parameters, module._parameters = module._parameters, {}
        for name, parameter in parameters.items():
            setattr(module, name, None if parameter is None else parameter.view_as(parameter))
    return made


def test_layers_may_hold_plain_tensors():
    made, x = plain_tensors(block()), torch.randn(2, 4, 4, 16, device=DEVICE)
    assert eligibility.fits_block(x, made) and eligibility.fits_conv_branch(x[..., :8], made.conv)
    norms, parameters = branch_parts(made.conv)
    assert len(norms) == 3 and [id(p) for p in parameters[:2]] == [id(made.conv[0].weight), id(made.conv[0].bias)]


@pytest.mark.slow
@runs
@pytest.mark.parametrize("moved", ["backward under autocast", "saved tensors contiguous"])
def test_gradients_whatever_surrounds_the_backward_pass(moved):
    layer, x = block(), torch.randn(2, 5, 3, 16, device=DEVICE, requires_grad=True)
    along = torch.randn(2, 5, 3, 16, device=DEVICE)

    def gradients(out):
        return torch.autograd.grad((out * along).sum(), (x, *layer.parameters()))

    assert eligibility.fits_block(x, layer)
    expected = gradients(layer(x))
    if moved == "backward under autocast":
        found = layer(x)
        with torch.autocast(DEVICE, torch.bfloat16):
            found = gradients(found)
    else:  # as torch.autograd.graph.save_on_cpu brings them back
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
        ):
            found = layer(x)
        found = gradients(found)
    largest = max(float(g.abs().max()) for g in expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.slow
@runs
@pytest.mark.parametrize("wanted", ["all", "scan branch", "convolution branch", "norms", "input"])
def test_gradients_of_some_parameters(wanted):
    layer, x = block(), torch.randn(2, 5, 3, 16, device=DEVICE)
    x.requires_grad_(wanted in ("all", "input"))
    for name, parameter in layer.named_parameters():
        branch = "convolution branch" if name.startswith("conv.") else "norms" if "norm" in name else "scan branch"
        parameter.requires_grad_(wanted in ("all", branch))
    along = torch.randn(2, 5, 3, 16, device=DEVICE)

    def gradients(layer):
        leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
        return torch.autograd.grad((layer(x) * along).sum(), leaves)

    with plain():
        expected = gradients(copy.deepcopy(layer))
    assert eligibility.fits_block(x, layer)
    found = gradients(layer)
    largest = max(float(g.abs().max()) for g in expected)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.slow
@runs
def test_channels_last_parameters_get_such_gradients():
    layer, x = block(), torch.randn(2, 5, 3, 16, device=DEVICE)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    found = []
    for each in (layer, other):
        assert eligibility.fits_block(x, each)
        each(x).square().mean().backward()
        found.append([p.grad for p in each.parameters()])
    largest = max(float(g.abs().max()) for g in found[0])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * largest)
    for parameter, gradient in zip(other.parameters(), found[1], strict=True):
        strides = zip(parameter.shape, gradient.stride(), parameter.stride(), strict=True)
        assert all(size == 1 or found == expected for size, found, expected in strides)


@pytest.mark.slow
@runs
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=["autocast", "weights", "both"])
def test_gradients_in_sixteen_bits(kind):
    """As those of the pieces, which other tests compare with the definition; parameters in float32 under autocast, in
    the type of the map, and in another 16-bit type under autocast."""
    layer, x = block(), torch.randn(2, 5, 3, 16, device=DEVICE).bfloat16()
    along = torch.randn(2, 5, 3, 16, device=DEVICE)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(kind)

    def gradients(layer, run):
        with torch.autocast(DEVICE, torch.bfloat16):
            assert eligibility.fits_block(x, layer)
            out = run(layer, x)
        found = torch.autograd.grad((out * along).sum(), [*layer.parameters()])
        assert all(g.dtype == kind for g in found)
        return torch.cat([g.flatten().float() for g in found])

    found, expected = (gradients(copy.deepcopy(layer), run) for run in (SSConvSSM.__call__, SSConvSSM.run_pieces))
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
@runs
def test_parameters_of_several_types():
    """As where norms and A_log stay in float32: they are not read, nor are their gradients rounded, in 16 bits."""
    layer, x = block().to(torch.bfloat16), torch.randn(2, 5, 3, 16, device=DEVICE).bfloat16()
    wide = [layer.ssm.A_log, layer.ssm.dt_weight, layer.conv[0].weight, layer.norm.bias]
    for parameter in wide:
        parameter.data = parameter.data.float() + torch.rand_like(parameter.data.float()) * 1e-3
    for norm in (layer.conv[0], layer.conv[2], layer.conv[5]):
        norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    assert eligibility.fits_block(x, layer)
    along = torch.randn(2, 5, 3, 16, device=DEVICE)

    def gradients(layer, run):
        found = torch.autograd.grad((run(layer, x) * along).sum(), [*layer.parameters()])
        assert [g.dtype for g in found] == [p.dtype for p in layer.parameters()]
        return found

    found, expected = (gradients(copy.deepcopy(layer), run) for run in (SSConvSSM.__call__, SSConvSSM.run_pieces))
    for parameter, gradient in zip(layer.parameters(), found, strict=True):
        if any(parameter is p for p in wide):
            assert not torch.equal(gradient, gradient.bfloat16().float())
    both = [torch.cat([g.flatten().float() for g in each]) for each in (found, expected)]
    assert (both[0] - both[1]).norm() < 0.01 * both[1].norm()


@pytest.mark.slow
@runs
def test_a_frozen_block():
    layer, x = block().requires_grad_(False), torch.randn(2, 5, 3, 16, device=DEVICE)
    with plain():
        expected = copy.deepcopy(layer)(x)
    assert eligibility.fits_block(x, layer)
    found = layer(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
