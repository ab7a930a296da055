"""Inference leaves a model as it is, whatever mode its modules are in, and answers the same from many threads."""

import copy
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import medmamba
from medmamba.explain import assess, explain, scan_field
from medmamba.explain.randomness import PrivateRandom
from medmamba.inference.predict import predict, predict_logits
from medmamba.utils.modes import eval_view, frozen_view, unwrap


def picture(seed=0, side=32):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def mixed() -> medmamba.MedMamba:
    """In train mode but for one stage, with dropout, drop path and statistics that matter."""
    torch.manual_seed(0)
    model = medmamba.create_model("test", num_classes=3, drop_path_rate=0.5, drop_rate=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    model.train()
    model.stages[0].eval()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(3)
    return model


def state_of(model: nn.Module) -> list:
    """Everything of a model and of the generators that inference could change, to be compared bit by bit."""
    found: list = [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()]  # noqa: NPY002
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), module.training))
        for key, value in sorted(module.__dict__.items()):
            if isinstance(value, dict):
                found.append((name, key, id(value), [(k, id(v)) for k, v in value.items()]))
            elif key not in ("training", "_blocks", "_plain"):  # the last two: kept results of fused models
                found.append((name, key, id(value)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else tensor.grad.numpy().tobytes()
        found.append((name, tensor.requires_grad, tensor._version, tensor.detach().numpy().tobytes(), grad))
    return found


def reference(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def test_no_inference_changes_a_model(mixed, tmp_path):
    expected = reference(mixed).predict(picture()).logits
    before = state_of(mixed)
    assert mixed.predict(picture()).logits == expected
    assert predict_logits(mixed, torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    for method in ("saliency", "smoothgrad", "gradient_shap", "gradcam", "integrated_gradients"):
        found = explain(mixed, picture(), method, 1)
    assert found.logit == pytest.approx(expected[1], abs=1e-5)
    assess(mixed, explain(mixed, picture(), "smoothgrad", 1, samples=2), random_models=1, repeats=1)
    scan_field(mixed, picture())
    with pytest.raises(ValueError):  # interrupted in the middle
        explain(mixed, picture(), lambda model, x, target: model.train()(x) / 0 * torch.ones(3, 3))
    assert state_of(mixed) == before


def test_a_run_that_is_cancelled_leaves_the_model(mixed):
    before = state_of(mixed)
    with pytest.raises(medmamba.explain.ExplainCancelled):
        explain(mixed, picture(), "occlusion", progress=lambda share: share < 0.3)
    assert state_of(mixed) == before


@pytest.mark.slow
def test_eight_threads_with_a_model_in_train_mode(mixed):
    """Predictions and explanations at once, while another thread switches the model's mode and draws random numbers."""
    still = reference(mixed)
    images = [picture(seed) for seed in range(4)]
    expected = [still.predict(image).logits for image in images]
    maps = {m: explain(still, images[0], m, 1).attribution for m in ("smoothgrad", "gradient_shap", "gradcam")}
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            mixed.train()
            mixed.stages[0].eval()
            torch.rand(3)
            np.random.rand(3)  # noqa: NPY002

    def work(i):
        wrong = 0
        for j in range(12):
            if (i + j) % 4 == 3:
                method = list(maps)[(i + j) // 4 % 3]
                wrong += not np.array_equal(explain(mixed, images[0], method, 1).attribution, maps[method])
            else:
                wrong += mixed.predict(images[(i + j) % 4]).logits != expected[(i + j) % 4]
        return wrong

    flags = [m.training for m in mixed.modules()]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    other = threading.Thread(target=disturb)
    other.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
    assert [m.training for m in mixed.modules()] == flags


def test_a_view_is_cheaper_than_switching_modes(mixed):
    import time
    import timeit

    model = medmamba.create_model("nano", num_classes=3)

    def switch():
        model.eval()
        model.train(True)

    assert min(timeit.repeat(lambda: eval_view(model), number=5, repeat=7, timer=time.process_time)) < min(
        timeit.repeat(switch, number=5, repeat=7, timer=time.process_time)
    )


def test_a_view_shares_weights_and_sees_training(mixed):
    view = eval_view(mixed)
    assert type(view) is type(mixed) and not any(m.training for m in view.modules())
    assert all(a is b for a, b in zip(view.parameters(), mixed.parameters(), strict=True))
    assert all(a is b for a, b in zip(view.buffers(), mixed.buffers(), strict=True))
    with torch.no_grad():
        mixed.head.bias.add_(1)
        torch.testing.assert_close(view(torch.zeros(1, 3, 32, 32)), reference(mixed)(torch.zeros(1, 3, 32, 32)))
    before = state_of(mixed)
    view.head = nn.Identity()
    view.train()
    assert state_of(mixed) == before


def test_modules_used_twice_stay_one(mixed):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ModuleList([shared]), nn.Dropout())
    view = eval_view(model)
    assert view[0] is view[1][0] and view[0] is not shared


def test_hooks_of_the_user_run_with_their_module(mixed):
    seen, inputs = [], []
    mixed.register_forward_hook(lambda module, args, output: seen.append(module is mixed))
    mixed.head.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(module is mixed.head), with_kwargs=True
    )
    mixed.stages[1].map.register_forward_hook(lambda module, args, output: seen.append(module is mixed.stages[1].map))
    mixed.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0].shape))
    before = state_of(mixed)
    mixed.predict(picture())
    assert sorted(seen) == [True] * 3 and inputs == [(1, mixed.config.dims[-1])]
    handle = mixed.head.register_forward_hook(lambda module, args, output: output * 0)
    assert mixed.predict(picture()).logits == [0, 0, 0]
    handle.remove()
    assert state_of(mixed) == before


def test_a_weight_made_by_a_hook(mixed):
    mixed.head = nn.utils.spectral_norm(mixed.head)  # its hook iterates in train mode, and sets the weight
    expected = reference(mixed).predict(picture()).logits
    before = state_of(mixed)
    assert mixed.predict(picture()).logits == expected
    assert state_of(mixed) == before


@pytest.mark.parametrize(
    "wrap", ["data_parallel", "compiled", "compiled_in_place", "fused", "subclass", "parametrized"]
)
def test_models_in_wrappers(mixed, wrap):
    expected = reference(mixed).predict(picture()).logits
    model = mixed
    if wrap == "data_parallel":
        model = nn.DataParallel(mixed)
    elif wrap == "compiled":
        model = torch.compile(mixed, backend="eager")
    elif wrap == "compiled_in_place":
        mixed.compile(backend="eager")
    elif wrap == "fused":
        model = reference(mixed).fuse()
    elif wrap == "subclass":
        model = type("Mine", (medmamba.MedMamba,), {})(mixed.config)
        model.load_state_dict(mixed.state_dict())
    elif wrap == "parametrized":
        nn.utils.parametrize.register_parametrization(mixed.head, "weight", nn.Identity())
    before = state_of(unwrap(model))
    assert predict(model, picture()).logits == pytest.approx(expected, abs=1e-5)
    assert explain(model, picture(), "saliency", 1).logit == pytest.approx(expected[1], abs=1e-5)
    assert state_of(unwrap(model)) == before


def test_a_subclass_answers_with_its_own_forward(mixed):
    class Doubled(medmamba.MedMamba):
        def forward_head(self, features, pre_logits=False):
            found = super().forward_head(features, pre_logits)
            return found if pre_logits else 2 * found

    model = Doubled(mixed.config)
    model.load_state_dict(mixed.state_dict())
    once, twice = (m.predict(picture()).logits for m in (mixed, model))
    assert twice == pytest.approx([2 * z for z in once], rel=1e-5)


def test_forward_set_on_an_instance_runs_in_the_view(mixed):
    expected = reference(mixed).predict(picture()).logits
    inner = type(mixed.head).forward
    mixed.head.forward = functools.partial(lambda self, x: inner(self, x) * (2 if self.training else 1), mixed.head)
    mixed.drop.forward = mixed.drop.forward  # bound to the original, whose dropout is active
    assert mixed.predict(picture()).logits == expected


def test_outputs_that_are_no_logits_are_refused(mixed):
    mixed.head = nn.Linear(mixed.config.dims[-1], 5)
    with pytest.raises(ValueError, match="reset_classifier"):
        mixed.predict(picture())


def test_private_random_numbers_are_those_of_the_seed():
    torch.manual_seed(3)
    expected = [torch.rand(4), torch.randn(3), torch.normal(0.0, torch.ones(5)), torch.empty(3).uniform_(-1, 1)]
    expected += [nn.init.trunc_normal_(torch.empty(2, 2)), torch.randperm(6), torch.randn(4)]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with PrivateRandom(3):
        found = [torch.rand(4), torch.randn(3), torch.normal(0.0, torch.ones(5)), torch.empty(3).uniform_(-1, 1)]
        found += [nn.init.trunc_normal_(torch.empty(2, 2)), torch.randperm(6), torch.randn_like(torch.empty(4))]
        nn.Linear(2, 2, device="meta")  # draws nothing
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_view_can_be_differentiated_moved_and_hooked(mixed):
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    before = state_of(mixed)
    view = frozen_view(mixed, torch.float64)
    view.head.register_forward_hook(lambda *args: None)
    view(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in view.parameters())
    view.half()
    assert state_of(mixed) == before


def test_evaluation_leaves_a_model_in_train_mode_as_it_is(mixed):
    pytest.importorskip("accelerate")
    from medmamba.data import ImageDataset, Record
    from medmamba.evaluation import evaluate_model

    class Reader:
        def read(self, record):
            return medmamba.load_image(picture(record.source))

    index = ImageDataset([Record(i, i % 3) for i in range(6)], mixed.config.labels, Reader())
    expected = reference(mixed)
    before = state_of(mixed)
    found = evaluate_model(mixed, index, None, device="cpu", resamples=0)
    assert state_of(mixed) == before
    logits = [expected.predict(picture(i)).logits for i in range(6)]
    np.testing.assert_allclose(found.logits, logits, atol=0.05)  # decoded images are kept in 8 bits
    with pytest.raises(ValueError, match="frame would have no effect"):
        evaluate_model(mixed, index, None, frame=0)


def test_views_of_a_fused_model_prepare_its_kernels_once(mixed):
    fused = reference(mixed).fuse()
    assert fused._blocks is None
    blocks = eval_view(fused)._prepared()
    assert eval_view(fused)._prepared() is blocks and fused._prepared() is blocks
    frozen = frozen_view(fused, torch.float64)._prepared()  # of other weights: stays with its view
    assert frozen is not blocks and fused._prepared() is blocks
    fused.double()
    assert fused._blocks is None and eval_view(fused)._prepared() is not blocks
    copied = copy.deepcopy(eval_view(fused))
    assert copied.predict(picture()).logits == fused.predict(picture()).logits
