"""Explanations of masks and boxes: the scores that are explained, and the scan inside and outside of a lesion."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)
pytest.importorskip("captum")

from segmentation_data import disc

from medmamba.explain import assess, box_score, compare, explain, mask_reach, mask_score, scan_field
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import preprocess


@pytest.fixture(scope="module")
def segmenter():
    from medmamba.segmentation import create_segmenter

    torch.manual_seed(0)
    return create_segmenter("test", ("disc", "rim"), size=64).eval()


@pytest.fixture(scope="module")
def exclusive():
    from medmamba.segmentation import create_segmenter

    torch.manual_seed(0)
    return create_segmenter("test", ("disc", "rim"), exclusive=True, size=64).eval()


@pytest.fixture(scope="module")
def detector():
    from medmamba.detection import create_detector

    torch.manual_seed(0)
    return create_detector("test", ("bright", "dark"), size=64, channels=64).eval()


@pytest.fixture(scope="module")
def image():
    return disc((64, 64), 3)


def test_the_score_of_a_mask_is_the_mean_logit_inside(segmenter, image):
    pixels, mask = image
    score = mask_score(segmenter, pixels, "rim", region=mask)
    found = explain(score, pixels, "saliency")
    x = preprocess(load_image(pixels), segmenter.config.preprocess, 3)[None]
    with torch.no_grad():
        expected = segmenter(x)[0, 1][torch.from_numpy(mask)].mean().item()
    assert found.logit == pytest.approx(expected, abs=1e-4) and found.label == "rim"
    assert found.probability == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-4)
    assert segmenter.encoder.patch_embed.proj.weight.requires_grad  # the model is as it was


def test_the_score_of_exclusive_classes_is_against_all_others(exclusive, image):
    pixels, _ = image
    one = np.zeros((64, 64), bool)
    one[20, 30] = True
    found = explain(mask_score(exclusive, pixels, "disc", region=one), pixels, "saliency")
    x = preprocess(load_image(pixels), exclusive.config.preprocess, 3)[None]
    with torch.no_grad():
        assert found.probability == pytest.approx(exclusive(x).softmax(1)[0, 1, 20, 30].item(), abs=1e-5)


@pytest.mark.slow
def test_evidence_for_a_mask_is_complete(segmenter, image):
    """Integrated gradients of the score add up to its change."""
    pixels, mask = image
    found = explain(mask_score(segmenter, pixels, "disc", region=mask), pixels, "integrated_gradients")
    assert found.diagnostics["completeness_error"] < 0.02
    assert found.attribution_full.shape == (64, 64)


@pytest.mark.slow
def test_methods_are_compared_and_checked_for_a_mask(segmenter, image):
    pixels, mask = image
    score = mask_score(segmenter, pixels, "disc", region=mask)
    found = compare(score, pixels, ["saliency", "gradcam:stage3.scan", "occlusion"])
    assert len(found.explanations) == 3 and "gradcam" in found.table()
    trust = assess(score, found.explanations[1], perturbations=6, random_models=1, repeats=1, steps=4, random_orders=2)
    assert trust.randomisation is not None and 0 <= trust.randomisation.similarity <= 1
    assert trust.infidelity is not None
    cascade = assess(score, found.explanations[0], ("randomisation",), random_models=1, cascade=True).randomisation
    assert cascade.steps[0]["randomised"] == "classifier" and len(cascade.steps) == 5


def test_the_predicted_mask_is_taken_and_nothing_predicted_is_said(segmenter, image):
    import dataclasses

    pixels, _ = image
    predicted = segmenter.predict(pixels)
    largest = segmenter.config.classes[int(predicted.masks.sum((1, 2)).argmax())]
    if predicted.masks.any():
        assert mask_score(segmenter, pixels).config.id2label == {0: largest}
    never = type(segmenter)(dataclasses.replace(segmenter.config, thresholds=(1.0, 1.0))).eval()
    with pytest.raises(ValueError, match=r"finds no disc or rim.*region="):
        mask_score(never, pixels)


def test_wrong_requests_are_named(segmenter, detector, image):
    pixels, mask = image
    with pytest.raises(ValueError, match=r"region is .*image"):
        mask_score(segmenter, pixels, "disc", region=mask[:10])
    with pytest.raises(ValueError, match="no pixel"):
        mask_score(segmenter, pixels, "disc", region=mask & False)
    with pytest.raises(ValueError, match="name the class"):
        mask_score(segmenter, pixels, region=mask)
    with pytest.raises(ValueError, match="no class 'cyst'"):
        mask_score(segmenter, pixels, "cyst")
    with pytest.raises(ValueError, match="takes a MedMambaSegmenter, got MedMambaDetector"):
        mask_score(detector, pixels)
    with pytest.raises(ValueError, match=r"mask_score\(model"):
        explain(segmenter, pixels)


def test_the_score_of_a_box_is_the_logit_behind_it(detector, image):
    pixels, _ = image
    found = detector.predict(pixels, score=0.0).boxes
    assert found
    box = found[0]
    score = box_score(detector, pixels, box)
    explained = explain(score, pixels, "saliency")
    assert explained.label == box.label
    # The reported score is sqrt(class x centre-ness), so that of the class alone is at least its square.
    assert explained.probability >= box.score**2 - 1e-4
    assert np.isfinite(explained.attribution).all() and explained.attribution.max() > 0


def test_a_box_that_is_not_predicted_is_refused(detector, image):
    from medmamba.detection import Box

    pixels, _ = image
    with pytest.raises(ValueError, match="predicts no dark at"):
        box_score(detector, pixels, Box("dark", 0.9, (0.0, 0.0, 0.5, 63.0)))
    with pytest.raises(ValueError, match="no box 900"):
        box_score(detector, pixels, 900)


def test_the_reach_of_the_scan_inside_and_outside_of_a_lesion(segmenter, image):
    pixels, mask = image
    found = mask_reach(segmenter, pixels, mask, stage=1)
    assert mask[found.inside.image_pixel] and not mask[found.outside.image_pixel]
    assert found.area == pytest.approx(mask.mean())
    assert 0 <= found.from_inside[1] < found.from_inside[0] <= 1  # influence is strongest nearby
    whole = mask_reach(segmenter, pixels, np.ones_like(mask))
    assert whole.outside is None and whole.from_inside == (1.0, None)
    with pytest.raises(ValueError, match="no pixel"):
        mask_reach(segmenter, pixels, mask & False)


def test_the_scan_of_an_encoder_is_that_of_its_classifier(segmenter, image):
    """The same weights in a MedMamba give the same field."""
    import medmamba

    model = medmamba.MedMamba(segmenter.config.encoder.replace(num_classes=2)).eval()
    model.load_state_dict(segmenter.encoder.state_dict(), strict=False)
    pixels, _ = image
    a, b = scan_field(segmenter, pixels, (20, 30), 2), scan_field(model, pixels, (20, 30), 2)
    np.testing.assert_allclose(a.merged, b.merged, rtol=1e-5)
    assert a.reach == b.reach
