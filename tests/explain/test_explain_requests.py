"""Attribution: requests, unusual images, files and figures."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from explain_cases import METHODS, picture
from PIL import Image

import medmamba
from medmamba.explain import compare, explain, layers
from medmamba.explain.explanation import to_image_size
from medmamba.explain.regions import grid, superpixels
from medmamba.explain.subject import resolve_target
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import preprocess


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
