"""Attribution: the model is left as it was, batches, precision, progress."""

import numpy as np
import pytest
import torch
from explain_cases import METHODS, picture

import medmamba
from medmamba.explain import ExplainCancelled, explain
from medmamba.explain.subject import default_batch_size, frozen_view
from medmamba.utils.precision import FullPrecision


@pytest.mark.parametrize("method", METHODS)
def test_batches_stay_within_the_limit_and_do_not_change_the_map(trained, monkeypatch, method):
    sizes = []
    forward = medmamba.MedMamba.forward
    monkeypatch.setattr(medmamba.MedMamba, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    few = explain(trained, picture(), method, 1, batch_size=3).attribution
    assert max(sizes) <= 3
    if method in ("smoothgrad", "gradient_shap"):  # draw their noise in batches
        return
    many = explain(trained, picture(), method, 1, batch_size=16).attribution
    np.testing.assert_allclose(few, many, rtol=1e-3, atol=1e-4 * np.abs(many).max())


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_map_and_generators_untouched(trained, method):
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = explain(trained, picture(), method, seed=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    torch.manual_seed(12)
    assert np.array_equal(explain(trained, picture(), method, seed=5).attribution, one.attribution)
    other = explain(trained, picture(), method, seed=6).attribution
    assert np.array_equal(other, one.attribution) == (method not in ("smoothgrad", "gradient_shap"))
    assert one.parameters["seed"] == 5


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(trained, method):
    model = trained
    model.train()
    model.stages[2].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7)
    model.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            explain(model, picture(), method)
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all((p.grad == 7).all() for p in model.parameters())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(m, name) for m in model.modules() for name in hooks)
    finally:
        model.eval().requires_grad_(True).zero_grad(set_to_none=True)


def test_conditions_do_not_change_the_map(trained):
    """Autocast, inference mode, training mode and checkpointing of the caller: the same map to the last bit."""
    expected = explain(trained, picture(), "integrated_gradients", 1)
    trained.train()
    trained.set_grad_checkpointing(True)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = explain(trained, picture(), "integrated_gradients", 1)
    finally:
        trained.eval().set_grad_checkpointing(False)
    assert np.array_equal(got.attribution, expected.attribution)
    assert got.logit == expected.logit


def test_half_precision_weights_are_explained_in_float32(trained):
    e = explain(frozen_view(trained).bfloat16(), picture(), "saliency")
    assert e.attribution.dtype == np.float32
    assert any("bfloat16" in note for note in e.notes)


def test_a_view_is_a_model_of_its_own(trained):
    """Hooks put on the original before go along; those put on the view, and what is set on its modules, stay there."""
    calls = []
    handle = trained.stages[0].register_forward_hook(lambda *args: calls.append("original"))
    try:
        view = frozen_view(trained)
        own = view.stages[0].register_forward_hook(lambda *args: calls.append("view"))
        x = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(trained(x), view(x))
        assert calls == ["original", "original", "view"]
        own.remove()
        view.stages[0] = torch.nn.Identity()
        assert not isinstance(trained.stages[0], torch.nn.Identity)
        pairs = list(zip(trained.parameters(), frozen_view(trained).parameters(), strict=True))
        assert all(a.data_ptr() == b.data_ptr() and not b.requires_grad for a, b in pairs)
    finally:
        handle.remove()


def test_a_view_of_a_fused_model_forgets_what_was_derived_from_other_weights(trained):
    fused = trained.fuse()
    fused._blocks = [[]]  # as its kernels leave it
    assert frozen_view(fused)._blocks is None
    assert fused._blocks == [[]]


def tf32_settings() -> dict:
    found = {}
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for owner, name in (
        (cublas, "allow_tf32"), (cudnn, "allow_tf32"), (torch, "get_float32_matmul_precision"),
        (cublas, "fp32_precision"), (getattr(cudnn, "conv", None), "fp32_precision"),
    ):  # fmt: skip
        try:
            value = getattr(owner, name, None)
            found[str(owner), name] = value() if callable(value) else value
        except RuntimeError:
            found[str(owner), name] = "refused"
    return found


@pytest.mark.parametrize("caller", ["default", "older", "newer"])
def test_full_precision_is_put_back_when_the_last_thread_leaves(caller):
    """Whichever of torch's two interfaces the caller has used to allow TF32."""
    cublas = torch.backends.cuda.matmul
    if caller == "newer" and not hasattr(cublas, "fp32_precision"):
        pytest.skip("this torch has only the older interface")
    try:
        if caller == "older":
            torch.set_float32_matmul_precision("high")
        elif caller == "newer":
            cublas.fp32_precision = "tf32"
        before = tf32_settings()
        one, two = FullPrecision(), FullPrecision()
        one.__enter__()
        two.__enter__()
        one.__exit__()
        assert not cublas.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        two.__exit__()
        after = tf32_settings()
        # Torch's default for cuDNN is TF32, which it calls "none" until someone has set it.
        assert {k: v for k, v in after.items() if before[k] != "none"} == {
            k: v for k, v in before.items() if v != "none"
        }
    finally:
        torch.set_float32_matmul_precision("highest")


def test_default_batch_sizes(monkeypatch):
    assert default_batch_size(torch.device("cpu")) == 8
    for gib, expected in ((2, 8), (8, 16), (80, 128)):
        properties = type("Properties", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert default_batch_size(torch.device("cuda")) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_maps_on_a_gpu_are_those_of_the_cpu(trained):
    """In float32: with TF32, which the caller may have on, the maps would be off in the third digit."""
    model = medmamba.create_model("test", num_classes=2)
    model.load_state_dict(trained.state_dict())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for method in METHODS:
            if method in ("smoothgrad", "gradient_shap"):  # other random numbers
                continue
            here = explain(trained, picture(), method, 1)
            there = explain(model.cuda(), picture(), method, 1)
            assert there.parameters["device"].startswith("cuda")
            largest = np.abs(here.attribution).max()
            # CPUs differ from each other by nearly as much, with the number of threads.
            np.testing.assert_allclose(there.attribution, here.attribution, rtol=1e-3, atol=2e-3 * largest)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_fused_model_gives_the_same_map(trained):
    expected = explain(trained, picture(), "gradcam", 1, layer="stage2.conv").attribution
    got = explain(trained.fuse(), picture(), "gradcam", 1, layer="stage2.conv").attribution
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
def test_progress_rises_to_one(trained, method):
    seen = []
    explain(trained, picture(), method, batch_size=4, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 1
    # A method that plans badly would spend its time at an end of the scale.
    assert method in ("saliency", "input_x_gradient", "gradcam") or max(np.diff(seen)) < 0.5


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("saliency", "input_x_gradient", "gradcam")])
def test_cancelling(trained, method):
    calls = []

    def stop(fraction: float) -> bool:
        calls.append(fraction)
        return len(calls) < 3

    with pytest.raises(ExplainCancelled):
        explain(trained, picture(), method, batch_size=2, progress=stop)
    assert len(calls) == 3

    def fail(fraction: float) -> None:
        raise KeyError("the window was closed")

    with pytest.raises(KeyError, match="the window was closed"):
        explain(trained, picture(), method, progress=fail)
