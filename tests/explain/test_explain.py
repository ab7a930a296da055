"""Attribution: right maps on a model whose evidence is known, honest numbers, and no trace left on the model."""

import functools
import io
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import medmamba
from medmamba.explain import ExplainCancelled, compare, explain, layers, methods
from medmamba.explain.explanation import to_image_size
from medmamba.explain.regions import grid, make_baseline, superpixels
from medmamba.explain.subject import default_batch_size, frozen_view, resolve_target
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import normalise, preprocess
from medmamba.utils.precision import FullPrecision

METHODS = list(methods())


def squares(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dark noise with one square of 8 pixels somewhere, red (class 1) or blue (class 0): images (n, 3, 32, 32) in
    [0, 1], classes, and the upper left corners (n, 2)."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 32, 32, generator=g) * 0.4
    classes = torch.randint(0, 2, (n,), generator=g)
    corners = torch.randint(0, 25, (n, 2), generator=g)
    for image, label, (top, left) in zip(images, classes, corners, strict=True):
        image[:, top : top + 8, left : left + 8] = 0.2
        image[0 if label else 2, top : top + 8, left : left + 8] = 1
    return images, classes, corners


@functools.cache
def train() -> medmamba.MedMamba:
    """A model that has learned the colour of the square, in a second or two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = medmamba.create_model("test", num_classes=2, id2label={0: "blue", 1: "red"})
        images, classes, _ = squares(512, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            picked = torch.randint(0, 512, (32,))
            loss = F.cross_entropy(model(images[picked] * 2 - 1), classes[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
    images, classes, _ = squares(100, 2)
    with torch.no_grad():
        assert (model.eval()(images * 2 - 1).argmax(1) == classes).float().mean() > 0.95
    return model


@pytest.fixture
def trained() -> medmamba.MedMamba:
    return train()


def picture(i: int = 0, seed: int = 3) -> np.ndarray:
    return squares(i + 1, seed)[0][i].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "method",
    [
        "integrated_gradients",
        "feature_ablation",
        pytest.param("gradient_shap", marks=pytest.mark.slow),
        pytest.param("occlusion", marks=pytest.mark.slow),
    ],
)
def test_the_maximum_of_the_map_is_on_the_square(trained, method):
    images, classes, corners = squares(24, 3)
    hits = 0
    for image, label, (top, left) in zip(images, classes.tolist(), corners.tolist(), strict=True):
        few = {"n_steps": 20, "max_steps": 20} if method == "integrated_gradients" else {}
        map_ = explain(trained, image.permute(1, 2, 0).numpy(), method, label, **few).attribution
        y, x = np.unravel_index(map_.argmax(), map_.shape)
        # Windows and superpixels reach a little over the edge.
        hits += top - 2 <= y < top + 10 and left - 2 <= x < left + 10
    assert hits >= 12  # by chance: 3


def test_values_against_their_definitions(trained):
    config = trained.config.preprocess
    x = preprocess(load_image(picture()), config)[None].requires_grad_()
    logit = trained(x)[0, 1]
    (gradient,) = torch.autograd.grad(logit, x)
    x = x.detach()
    start = make_baseline(x, "blur", config)

    def expect(method: str, values: torch.Tensor, **options) -> None:
        got = explain(trained, picture(), method, 1, **options).attribution
        np.testing.assert_allclose(got, values.numpy(), rtol=1e-3, atol=1e-4 * values.abs().max().item())

    expect("saliency", gradient.abs().amax(1)[0])
    expect("input_x_gradient", (gradient * x).sum(1)[0])
    cells = grid(32, 32, 16)
    falls = torch.zeros(32, 32)
    with torch.no_grad():
        whole = (logit - trained(start)[0, 1]).item()
        for cell in range(16):
            covered = torch.where(cells == cell, start, x)
            falls[cells == cell] = (logit - trained(covered)[0, 1]).item()
    expect("feature_ablation", falls, segments="grid", n_segments=16, baseline="blur")
    expect("occlusion", falls, window=8, stride=8, baseline="blur")
    expect("occlusion", torch.full((32, 32), whole), window=32, baseline="blur")
    # Without noise and with one baseline, it is integrated gradients at random points.
    shap = explain(trained, picture(), "gradient_shap", 1, samples=200, noise=0, baselines=("blur",)).attribution
    integrated = explain(trained, picture(), "integrated_gradients", 1, baseline="blur").attribution
    assert np.corrcoef(shap.ravel(), integrated.ravel())[0, 1] > 0.95
    # With little noise, it is the gradient.
    smooth = explain(trained, picture(), "smoothgrad", 1, noise=1e-4, samples=2).attribution
    saliency = explain(trained, picture(), "saliency", 1).attribution
    assert np.corrcoef(smooth.ravel(), saliency.ravel())[0, 1] > 0.99


def test_baselines(trained):
    config = medmamba.PreprocessConfig(input_size=(32, 32), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = normalise(pixels, config)

    def shown(kind) -> torch.Tensor:
        return make_baseline(x, kind, config) * torch.tensor(config.std).view(3, 1, 1) + torch.tensor(config.mean).view(
            3, 1, 1
        )

    assert shown("black").abs().max() < 1e-6
    assert (shown(0.25) - 0.25).abs().max() < 1e-6
    assert (shown("grey") - torch.tensor(config.mean).view(3, 1, 1)).abs().max() < 1e-6
    assert (shown("mean") - pixels.mean((2, 3), keepdim=True)).abs().max() < 1e-5
    assert shown("blur").std() < 0.2 * pixels.std()
    assert shown("blur").mean() == pytest.approx(pixels.mean().item(), abs=0.02)


def test_evidence_for_one_class_is_evidence_against_the_other(trained):
    red = explain(trained, picture(), "occlusion", "red").attribution
    blue = explain(trained, picture(), "occlusion", "blue").attribution
    assert np.corrcoef(red.ravel(), blue.ravel())[0, 1] < -0.8


@pytest.mark.parametrize("baseline", ["mean", "black", "grey", "blur", 0.25])
def test_integrated_gradients_are_complete(trained, baseline):
    e = explain(trained, picture(), "integrated_gradients", baseline=baseline)
    x = preprocess(load_image(picture()), trained.config.preprocess)[None]
    with torch.no_grad():
        ends = trained(torch.cat((x, make_baseline(x, baseline, trained.config.preprocess))))[:, e.target]
    difference = (ends[0] - ends[1]).item()
    assert e.diagnostics["converged"]
    assert abs(e.attribution.sum() - difference) <= 0.0101 * abs(difference)
    assert e.diagnostics["logit_difference"] == pytest.approx(difference, rel=1e-3)
    assert e.diagnostics["completeness_error"] <= 0.01


def test_integrated_gradients_take_more_steps_until_complete_and_say_so_if_they_run_out(trained):
    coarse = explain(trained, picture(), "integrated_gradients", n_steps=10, max_steps=10)
    fine = explain(trained, picture(), "integrated_gradients", n_steps=10)
    assert not coarse.diagnostics["converged"]
    assert any("did not converge" in note for note in coarse.notes)
    assert fine.diagnostics["converged"]
    assert fine.diagnostics["steps"] > 10


def test_gradcam_of_the_last_stage_sums_to_the_logit(trained):
    """The classifier is linear in the mean of that map, so its Grad-CAM must sum to the logit less the bias. A map
    taken from the channels-last side would not."""
    x_size = (64, 96)  # a map of 2x3, so that exchanged height and width show
    model = frozen_view(trained)
    model.config = model.config.replace(preprocess=medmamba.PreprocessConfig(input_size=x_size))
    image = np.random.default_rng(0).random((*x_size, 3), dtype=np.float32)
    e = explain(model, image, "gradcam", 1)
    assert e.parameters["layer_size"] == [2, 3]
    from captum.attr import LayerGradCam

    x = preprocess(load_image(image), model.config.preprocess)[None].requires_grad_()
    cam = LayerGradCam(model, model.stages[3].map).attribute(x, target=1)
    assert cam.shape == (1, 1, 2, 3)
    assert cam.sum().item() == pytest.approx(e.logit - model.head.bias[1].item(), rel=1e-4)
    expected = F.interpolate(cam, x_size, mode="bilinear")[0, 0].detach().numpy()
    np.testing.assert_allclose(e.attribution, expected, rtol=1e-4, atol=1e-6)


def test_gradcam_of_one_pixel_is_constant_to_the_last_bit(trained):
    """Otherwise rounding would rank the pixels."""
    assert np.ptp(explain(trained, picture(), "gradcam", 1).attribution) == 0
    assert np.ptp(explain(trained, picture(), "gradcam", 1, layer="stage1").attribution) > 0


def test_gradcam_of_the_branches(trained):
    """Each half is seen alone: its map is the gradient-weighted sum of its own channels."""
    seen = {}
    model = frozen_view(trained)
    block = model.stages[1].blocks[-1]
    for name, module in (("conv", block.conv), ("scan", block.ssm_map)):
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}) or out.retain_grad())
    x = preprocess(load_image(picture()), model.config.preprocess)[None].requires_grad_()
    model(x)[0, 1].backward()
    for name, features in seen.items():
        weights = features.grad.mean((2, 3), keepdim=True)
        cam = F.interpolate((weights * features).sum(1, keepdim=True), (32, 32), mode="bilinear")[0, 0]
        e = explain(trained, picture(), "gradcam", 1, layer=f"stage2.{name}")
        np.testing.assert_allclose(e.attribution, cam.detach().numpy(), rtol=1e-3, atol=1e-6)
        assert e.title == f"gradcam (stage2.{name})"
        assert (explain(trained, picture(), "gradcam", 1, layer=f"stage2.{name}", relu=True).attribution >= 0).all()
    assert not np.allclose(*[explain(trained, picture(), "gradcam", layer=f"stage2.{b}").attribution for b in seen])


def test_gradcam_costs_one_forward_pass_and_part_of_a_backward(trained, monkeypatch):
    calls = []
    forward = medmamba.MedMamba.forward
    monkeypatch.setattr(medmamba.MedMamba, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    explain(trained, picture(), "gradcam")
    assert calls == [1]


def test_gradcam_keeps_nothing_of_what_comes_before_its_layer(trained, monkeypatch):
    tracked = []
    forward = medmamba.model.network.SSConvSSM.forward
    monkeypatch.setattr(
        medmamba.model.network.SSConvSSM, "forward", lambda self, x: tracked.append(x.requires_grad) or forward(self, x)
    )
    explain(trained, picture(), "gradcam", layer="stage1")
    first = len(trained.stages[0].blocks)
    assert not any(tracked[:first]) and all(tracked[first:]) and len(tracked) > first


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(method="lime"), "unknown method 'lime'; choose one of saliency"),
        (dict(target="green"), "no class is called 'green'; the classes are 0 'blue', 1 'red'"),
        (dict(target=2), "out of range"),
        (dict(target=-1), "out of range"),
        (dict(target=True), "index or label"),
        (dict(target=0.5), "index or label"),
        (dict(method="saliency", n_steps=3), "saliency has no option 'n_steps'; its options and defaults: none"),
        (dict(baseline="white"), "unknown baseline 'white'"),
        (dict(baseline=2.0), r"in \[0, 1\]"),
        (dict(n_steps=0), "n_steps must be a whole number of at least 2"),
        (dict(batch_size=0), "batch_size"),
        (dict(method="gradcam", layer="stage9"), "no layer 'stage9'; choose from stage1.conv, stage1.scan, stage1,"),
        (dict(method="gradcam", layer="stage1.block2.scan"), "no layer"),
        (dict(method="occlusion", window=99), "stride <= window <= 32"),
        (dict(method="occlusion", window=4, stride=5), "stride <= window"),
        (dict(method="smoothgrad", noise=0), "noise must be a positive number"),
        (dict(method="feature_ablation", segments="voronoi"), "superpixels"),
    ],
)
def test_wrong_requests_say_what_is_right(trained, kwargs, message):
    with pytest.raises(ValueError, match=message):
        explain(trained, picture(), **kwargs)


def test_other_models_are_refused(trained):
    with pytest.raises(ValueError, match="need a MedMamba, got Linear"):
        explain(torch.nn.Linear(2, 2), picture())
    with pytest.raises(ValueError, match="no classifier"):
        explain(medmamba.create_model("test", num_classes=0), picture())


def test_targets_by_name():
    config = medmamba.MedMambaConfig(num_classes=4, id2label={0: "Mass", 1: "mass", 2: "Cyst", 3: "7"})
    assert resolve_target("mass", config) == 1
    assert resolve_target("cyst", config) == 2
    assert resolve_target("7", config) == 3
    assert resolve_target("0", config) == 0
    assert resolve_target(np.int64(2), config) == 2
    assert resolve_target(None, config) is None
    with pytest.raises(ValueError, match="no class is called 'MASS'"):
        resolve_target("MASS", config)


def test_the_predicted_class_is_the_default_and_numbers_are_those_of_predict(trained):
    prediction = trained.predict(picture())
    for method in ("gradcam", "occlusion"):
        e = explain(trained, picture(), method)
        assert e.label == prediction.label
        assert e.probability == pytest.approx(prediction.probability, rel=1e-5)
        assert e.logit == pytest.approx(prediction.logits[e.target], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_image_gets_a_map_and_a_warning(trained, method):
    e = explain(trained, np.full((32, 32, 3), 0.5, np.float32), method)
    assert np.isfinite(e.attribution).all()
    assert any("constant" in note for note in e.notes)
    e.overlay_pixels()


def test_an_image_that_equals_the_baseline_has_nothing_to_attribute(trained):
    e = explain(trained, np.zeros((32, 32), np.uint8), "integrated_gradients", baseline="black")
    assert not e.attribution.any()
    assert e.diagnostics["converged"]
    assert any("equals the baseline" in note for note in e.notes)


def test_small_large_grey_rectangular_and_dicom_images(trained, tmp_path):
    rng = np.random.default_rng(0)
    small = explain(trained, rng.integers(0, 256, (9, 17), np.uint8), "gradcam", layer="stage1")
    assert any("smaller than the model's input" in note for note in small.notes)
    assert small.attribution_full.shape == (9, 17)
    large = explain(trained, rng.integers(0, 256, (300, 700, 3), np.uint8), "gradcam", layer="stage1")
    assert large.attribution_full.shape == (300, 700)
    assert any("aspect" in note for note in large.notes)
    assert large.overlay_pixels().shape == (300, 700, 3)
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    ct = explain(trained, pydicom.dcmread(get_testdata_file("CT_small.dcm")), "gradcam", layer="stage1")
    assert ct.attribution_full.shape == (128, 128)
    assert "CompressedSamples" not in json.dumps(ct.to_dict())  # the patient's name


def test_one_channel_models(trained):
    model = medmamba.create_model("test", num_classes=2, in_chans=1).eval()
    for method in METHODS:
        assert explain(model, picture(), method).attribution.shape == (32, 32)


@pytest.mark.parametrize("mode", ["squash", "center", "pad"])
@pytest.mark.parametrize("size", [(60, 100), (100, 60)])
def test_maps_return_to_the_place_in_the_image_that_they_are_about(mode, size):
    config = medmamba.PreprocessConfig(input_size=(32, 32), crop_mode=mode)
    image = np.zeros((*size, 1), np.float32)
    image[30:40, 45:55] = 1
    x = preprocess(load_image(image), config, 1)[0].numpy() + 1  # its own map
    back = to_image_size(x / 2, size, config)
    assert back.shape == size
    weights = back / back.sum()
    assert (weights.sum(1) @ np.arange(size[0])) == pytest.approx(34.5, abs=1)
    assert (weights.sum(0) @ np.arange(size[1])) == pytest.approx(49.5, abs=1)
    ones = to_image_size(np.ones((32, 32), np.float32), size, config)
    assert (ones.min() == 0) == (mode == "center")


def test_files(trained, tmp_path):
    e = explain(trained, picture(), "integrated_gradients", 1)
    record = json.loads(e.save(tmp_path / "e.json").read_text())
    assert record["label"] == "red"
    assert record["parameters"]["baseline"] == "mean"
    assert record["diagnostics"]["converged"] is True
    with np.load(e.save(tmp_path / "e.npz")) as arrays:
        assert np.array_equal(arrays["attribution"], e.attribution)
        assert json.loads(str(arrays["record"])) == record
    with Image.open(e.save(tmp_path / "e.png")) as png:
        assert png.width > 384
        colours = np.asarray(png.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 100
    with pytest.raises(ValueError, match=r"use .png, .npz or .json"):
        e.save(tmp_path / "e.gif")


def test_the_overlay_shows_the_image_at_its_own_resolution(trained):
    """A pixel of the overlay figure is a pixel of the image, and where the map is zero the image is seen unchanged."""
    image = np.random.default_rng(0).integers(0, 256, (400, 500), np.uint8)
    e = explain(trained, image, "saliency")
    object.__setattr__(e, "attribution", np.zeros_like(e.attribution))
    buffer = io.BytesIO()
    e.overlay().savefig(buffer)
    with Image.open(buffer) as png:
        shown = np.asarray(png.convert("L")).astype(int)
    rows, cols = shown.shape
    best = min(
        np.abs(shown[y : y + 400, x : x + 500] - image).mean() for y in range(rows - 400 + 1) for x in range(8, 17)
    )
    assert best < 1.5


def test_an_image_without_contrast_is_stretched_in_figures_and_said_to_be(trained):
    """A DICOM file without a window: its full range is not seen on a screen."""
    faint = 0.5 + 0.02 * np.random.default_rng(0).random((32, 32), dtype=np.float32)
    e = explain(trained, faint, "saliency")
    assert any("hardly any contrast" in note for note in e.notes)
    shown = e.overlay_pixels(0.0)[..., 0].astype(float)
    assert shown.std() > 60
    assert np.corrcoef(shown.ravel(), faint.ravel())[0, 1] > 0.99
    normal = explain(trained, picture(), "saliency")
    assert not any("contrast" in note for note in normal.notes)
    expected = np.rint(255 * np.broadcast_to(picture().mean(-1, keepdims=True), (32, 32, 3)))
    assert np.array_equal(normal.overlay_pixels(0.0), expected)


def test_the_bar_says_what_the_colours_mean(trained):
    texts = {
        method: " ".join(axis.get_ylabel() for axis in explain(trained, picture(), method).overlay().axes)
        for method in ("occlusion", "saliency")
    }
    assert "logit: blue against, red for the class" in texts["occlusion"]
    assert "|d logit / d pixel|" in texts["saliency"] and "blue" not in texts["saliency"]


def test_signed_maps_are_centred_on_a_neutral_colour(trained):
    e = explain(trained, np.full((32, 32), 128, np.uint8), "occlusion")
    assert e.signed
    values = np.linspace(-1, 1, 32, dtype=np.float32) * np.ones((32, 1), np.float32)
    object.__setattr__(e, "attribution", values)
    red, _, blue = np.moveaxis(e.overlay_pixels().astype(int), -1, 0)
    assert (red[:, -4:] > blue[:, -4:] + 30).all()
    assert (blue[:, :4] > red[:, :4] + 30).all()
    assert (np.abs(red - blue)[:, 15:17] < 10).all()


def test_no_pyplot_figures(trained):
    """pyplot keeps every figure alive for the life of a server."""
    compare(trained, picture(), ["saliency", "gradcam"]).figure()
    explain(trained, picture(), "gradcam").overlay()
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []


def test_captum_missing_says_how_to_get_it(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install \"medmamba\[explain\]\""):
        explain(trained, picture(), "saliency")


def test_a_method_of_your_own(trained):
    def brightness(model, x, target):
        assert not model.training
        return x.mean((0, 1))

    e = explain(trained, picture(), brightness)
    assert e.method == "brightness"
    np.testing.assert_allclose(e.attribution, (picture() * 2 - 1).mean(-1), atol=1e-5)
    with pytest.raises(ValueError, match=r"map of shape \(3, 32, 32\), expected \(32, 32\)"):
        explain(trained, picture(), lambda model, x, target: x[0])
    with pytest.raises(ValueError, match="not finite"):
        explain(trained, picture(), lambda model, x, target: x[0, 0] / 0)


def test_compare(trained, tmp_path):
    seen = []
    c = compare(
        trained, picture(), ["occlusion", "gradcam:stage2.scan", ("occlusion", {"window": 8})], progress=seen.append
    )
    assert [e.title for e in c.explanations] == ["occlusion", "gradcam (stage2.scan)", "occlusion"]
    assert c.explanations[2].parameters["window"] == 8
    assert len({e.target for e in c.explanations}) == 1
    assert np.allclose(np.diag(c.agreement), 1)
    assert c.agreement[0, 2] > 0.3  # two windows of the same method
    assert len(c.table().splitlines()) == 4
    assert seen == sorted(seen) and seen[-1] == 1
    for suffix in (".png", ".npz", ".json"):
        assert c.save(tmp_path / f"c{suffix}").stat().st_size > 500
    with np.load(tmp_path / "c.npz") as arrays:
        assert arrays["maps"].shape == (3, 32, 32)
        assert arrays["methods"].tolist() == [e.title for e in c.explanations]
    with pytest.raises(ValueError, match="at least one method"):
        compare(trained, picture(), [])
    with pytest.raises(ValueError, match="unknown method"):
        compare(trained, picture(), ["gradcan"])


def test_layers_are_those_of_the_model(trained):
    names = layers(trained)
    assert names[-1] == "stage4"
    assert "stage2.block1.scan" in names
    assert len(layers(medmamba.create_model("nano", num_classes=2))) == 2 * (2 + 2 + 4 + 2) + 3 * 4


def test_superpixels_follow_the_image():
    image = torch.zeros(3, 40, 40)
    image[:, 10:25, 13:30] = 1
    labels = superpixels(image, 16)
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert 8 <= len(labels.unique()) <= 16
    inside, outside = labels[10:25, 13:30].unique(), labels[image[0] == 0].unique()
    assert not set(inside.tolist()) & set(outside.tolist())


def test_grid():
    labels = grid(30, 60, 8)
    assert labels.unique().tolist() == list(range(8))
    assert set(labels.flatten().bincount().tolist()) == {225}
