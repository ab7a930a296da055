"""Metrics of segmentation against their definitions, and against MONAI."""

import math

import numpy as np
import pytest

from medmamba.metrics.segmentation import hausdorff95, match_lesions, score_mask, summarise

pytest.importorskip("scipy")


def box(size, rows, columns):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def test_dice_and_iou_of_two_boxes():
    found = score_mask(box((20, 20), (0, 10), (0, 10)), box((20, 20), (0, 10), (5, 15)))
    assert found.dice == 0.5 and found.iou == pytest.approx(1 / 3)
    assert (found.intersection, found.predicted, found.true) == (50, 100, 100)


@pytest.mark.parametrize(("a", "b", "dice"), [(0, 0, 1.0), (4, 0, 0.0), (0, 4, 0.0), (4, 4, 1.0)])
def test_empty_masks(a, b, dice):
    found = score_mask(box((9, 9), (0, a), (0, a)), box((9, 9), (0, b), (0, b)))
    assert found.dice == found.iou == dice
    assert math.isnan(found.hd95) == (a == 0 or b == 0)


def test_ignored_pixels_count_for_nothing():
    true, predicted = box((10, 10), (0, 5), (0, 10)), box((10, 10), (0, 10), (0, 10))
    assert score_mask(predicted, true).dice < 1
    assert score_mask(predicted, true, ignored=box((10, 10), (5, 10), (0, 10))).dice == 1


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        score_mask(np.zeros((3, 4), bool), np.zeros((4, 3), bool))


def test_hd95_of_a_shifted_box_is_the_shift_in_the_unit_of_the_spacing():
    a, b = box((60, 60), (10, 40), (10, 40)), box((60, 60), (10, 40), (16, 46))
    assert hausdorff95(a, b) == pytest.approx(6)
    assert hausdorff95(a, b, (1.0, 0.5)) == pytest.approx(3)


def test_lesions_are_matched_one_to_one():
    true = box((50, 50), (0, 10), (0, 10)) | box((50, 50), (20, 30), (20, 30)) | box((50, 50), (40, 50), (0, 10))
    predicted = box((50, 50), (0, 9), (0, 10)) | box((50, 50), (20, 30), (24, 40)) | box((50, 50), (40, 41), (30, 50))
    assert match_lesions(predicted, true) == (2, 1, 1)
    # One prediction over two lesions finds one of them.
    assert match_lesions(box((50, 50), (0, 50), (0, 10)), true & (np.arange(50) < 12), 0.1) == (1, 1, 0)


def test_the_interval_resamples_patients():
    rng = np.random.default_rng(0)
    scores, patients = [], []
    for patient in range(12):
        width = int(rng.integers(2, 18))
        for _ in range(6):  # images of a patient are alike
            scores.append([score_mask(box((20, 20), (0, 20), (0, width)), box((20, 20), (0, 20), (0, 10)))])
            patients.append(f"p{patient}")
    by_patient = summarise(["a"], scores, patients).metrics["a"]["dice"]
    by_image = summarise(["a"], scores).metrics["a"]["dice"]
    assert by_patient["value"] == by_image["value"] == pytest.approx(np.mean([s[0].dice for s in scores]))
    assert by_patient["high"] - by_patient["low"] > 1.8 * (by_image["high"] - by_image["low"])


def test_what_is_not_defined_is_none_and_counted():
    empty = [[score_mask(np.zeros((5, 5), bool), np.zeros((5, 5), bool))]] * 3
    found = summarise(["a"], empty, resamples=50)
    assert found.metrics["a"]["hd95"]["value"] is None and found.hd95_undefined == {"a": 3}
    assert found.metrics["a"]["lesion_sensitivity"]["value"] is None
    assert found.mean_dice == 1 and "–" in found.table()


@pytest.mark.slow
def test_agreement_with_monai():
    monai = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(12):
        rng = np.random.default_rng(seed)
        a, b = (ndimage.gaussian_filter(rng.normal(size=(64, 48)), 4) > 0.02 for _ in range(2))
        found = score_mask(a, b, spacing=(0.7, 1.3))
        x, y = (torch.from_numpy(m)[None, None].float() for m in (a, b))
        assert found.dice == pytest.approx(float(monai.compute_dice(x, y)), abs=1e-6)
        assert found.iou == pytest.approx(float(monai.compute_iou(x, y)), abs=1e-6)
        expected = monai.compute_hausdorff_distance(x, y, include_background=True, percentile=95, spacing=[0.7, 1.3])
        assert found.hd95 == pytest.approx(float(expected), rel=1e-4)
