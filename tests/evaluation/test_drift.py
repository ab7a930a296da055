"""Drift: new images against those that a model was validated on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from medmamba.data import open_dataset
from medmamba.evaluation.drift import DriftError, _feature_test, _prevalence_test, _unusual_tests, detect_drift
from medmamba.inference.ood import fit_unusual, load_unusual
from medmamba.inference.ood_fit import look

pytest.importorskip("scipy")


def detector(rng, n=300, width=20):
    labels = rng.integers(0, 2, n)
    return fit_unusual(rng.normal(size=(n, width)) + labels[:, None], labels, features(rng, n, width))


def features(rng, n=300, width=20):
    return rng.normal(size=(n, width)) + rng.integers(0, 2, n)[:, None]


@pytest.fixture
def images(tmp_path):
    """Bright noise to train, validate and test on, of three classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in "abc":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(100, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{i}.png")
    return tmp_path / "data"


def test_the_tests_hold_their_level_without_drift():
    """Of 200 pairs of samples of one kind, about 5 % differ in each test, and the features do after correction."""
    rng = np.random.default_rng(1)
    p = []
    for _ in range(200):
        found = detector(rng)
        new = features(rng, 120)
        tests = [*_unusual_tests(found, found.reference, new), _feature_test(found.reference, new)[0]]
        tests.append(
            _prevalence_test(rng.multinomial(300, [0.6, 0.3, 0.1]), rng.multinomial(120, [0.6, 0.3, 0.1]), "abc")[0]
        )
        p.append([test.p for test in tests])
    share = (np.array(p) <= 0.05).mean(axis=0)
    assert (share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)).all(), share


def test_other_images_are_found():
    rng = np.random.default_rng(2)
    found = detector(rng)
    new = features(rng, 120)
    new[:, 3] += 1
    test, shifted = _feature_test(found.reference, new)
    assert test.p < 1e-4 and shifted[0] == 1 and 0.5 < shifted[2] < 1.5
    far = _unusual_tests(found, found.reference, features(rng, 120) * 3)
    assert all(test.p < 1e-6 for test in far)
    other, shares = _prevalence_test(np.array([300, 10, 0]), np.array([100, 60, 0]), "abc")
    assert other.p < 1e-6 and shares["b"] == pytest.approx((10 / 310, 60 / 160)) and "a 62.5%" in other.found


def test_images_of_the_same_and_of_another_kind(tiny_model, images, tmp_path):
    index = open_dataset(images)
    train, val = (look(tiny_model, index, split) for split in ("train", "val"))
    tiny_model.unusual = fit_unusual(train.features, train.labels, val.features)
    counts = np.bincount(val.logits.argmax(1), minlength=3)
    same = detect_drift(tiny_model, images / "test", predicted=counts)
    assert same.n_images == 30 and len(same.tests) == 4 and not same.drifted
    assert "does not show that there is none" in same.summary()
    dark = tmp_path / "dark"
    dark.mkdir()
    for i in range(20):
        Image.fromarray(np.full((20, 20, 3), 3 * i, np.uint8)).save(dark / f"{i}.png")
    (dark / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    other = detect_drift(tiny_model, dark, predicted=counts)
    assert other.drifted and other.failures[0][0].endswith("broken.png")
    record = json.loads(other.save(tmp_path / "out").read_text())
    assert record["n_images"] == 20 and record["tests"][0]["corrected"] <= 0.05
    assert "| Compared |" in other.to_markdown()


def test_without_stored_statistics_other_images_can_be_given(tiny_model, images):
    bare = detect_drift(tiny_model, images / "test")
    assert all(np.isnan(test.p) for test in bare.tests) and "no statistics" in bare.summary()
    found = detect_drift(tiny_model, images / "test", reference=images / "val")
    made = {test.name for test in found.tests if not np.isnan(test.p)}
    assert {"means of the features", "predicted classes"} <= made or "a single class" in str(found.tests)


def test_labels_show_whether_the_probabilities_hold(tiny_model, images):
    tiny_model.config = tiny_model.config.replace(id2label={0: "a", 1: "b", 2: "c"})
    for row in tiny_model.head.modules():  # confident of nothing that is there
        if hasattr(row, "weight"):
            row.weight.data *= 60
    found = detect_drift(tiny_model, images / "test", labelled=True)
    assert found.evaluation.n_images == 30
    test = found.tests[-1]
    assert test.name == "calibration" and test.p < 0.05


def test_too_few_images_are_refused(tiny_model, images, tmp_path):
    (tmp_path / "few").mkdir()
    shutil.copy(images / "test" / "a" / "0.png", tmp_path / "few")
    with pytest.raises(DriftError, match="1 images can be read; at least 10"):
        detect_drift(tiny_model, tmp_path / "few")


def test_the_statistics_are_stored_with_the_detector(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    width = tiny_model.head.in_features if hasattr(tiny_model.head, "in_features") else 20
    tiny_model.save_pretrained(tmp_path)
    found = detector(rng, width=width)
    found.save(tmp_path)
    again = load_unusual(tmp_path)
    assert again.reference.n == 300
    np.testing.assert_allclose(again.reference.mean, found.reference.mean, rtol=1e-4)
    record = json.loads((tmp_path / "unusual.json").read_text())
    del record["reference"]  # a file of an earlier version
    (tmp_path / "unusual.json").write_text(json.dumps(record))
    assert load_unusual(tmp_path).reference is None
    assert dataclasses.asdict(found.reference)["n"] == 300
