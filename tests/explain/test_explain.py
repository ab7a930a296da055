"""Attribution: right maps on a model whose evidence is known, honest numbers, and no trace left on the model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explain_cases import picture, squares

import medmamba
from medmamba.explain import explain
from medmamba.explain.regions import grid, make_baseline
from medmamba.explain.subject import frozen_view
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import normalise, preprocess


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
