"""The corruptions of MedMNIST-C and the errors of a model on them."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba.data import open_dataset
from medmamba.evaluation.corruptions import (
    CORRUPTIONS_NAME,
    KINDS,
    PUBLISHED,
    Corruptions,
    corrupt,
    evaluate_corruptions,
    load_corruptions,
    published_for,
)
from medmamba.evaluation.corruptions.run import corrupted, proportional
from medmamba.utils.devices import make_accelerator

SPREAD = {"stain_deposit", "bubble", "characters"}  # kinds whose places are random


def picture(seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
    return np.array(small.resize((224, 224), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "test" / name / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_images_as_its_severity_says(kind):
    published = next(kinds for kinds in PUBLISHED.values() if kind in kinds)
    image = picture()
    first, last = (corrupt(kind, image, published[kind][i], np.random.default_rng(0)) for i in (0, 4))
    assert first.shape == image.shape and first.dtype == np.uint8
    change = [np.abs(found.astype(int) - image).mean() for found in (first, last)]
    assert 0 < change[0] < change[1]
    again = corrupt(kind, image, published[kind][4], np.random.default_rng(0))
    assert (again == last).all()


def test_every_dataset_has_five_severities_of_known_kinds():
    for kinds in PUBLISHED.values():
        assert set(kinds) <= set(KINDS) and all(len(levels) == 5 for levels in kinds.values())


def test_images_of_another_form_are_refused():
    with pytest.raises(ValueError, match="unknown corruption 'rain'"):
        corrupt("rain", picture(), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"need uint8 images \(H, W, 3\)"):
        corrupt("contrast_up", picture()[..., 0], 1, np.random.default_rng(0))


def test_a_dataset_without_published_corruptions_is_named():
    assert published_for("pad-ufes-20") == "dermamnist"
    with pytest.raises(ValueError, match=r"no corruptions for 'otoscopy2024'.*breastmnist"):
        published_for("otoscopy2024")


def test_errors_are_those_of_the_corrupted_images(tiny_model, folder, tmp_path):
    from medmamba.data import CachedDataset
    from medmamba.evaluation import predict_logits
    from medmamba.evaluation.corruptions.run import _to_input
    from medmamba.evaluation.logits import decode
    from medmamba.metrics import evaluate
    from medmamba.metrics.calibration import to_probabilities

    index = open_dataset(folder).split("test")
    accelerator = make_accelerator("cpu", "fp32")
    options = dict(resamples=20, keep=tmp_path / "kept", weights="w")
    found = evaluate_corruptions(tiny_model, index, accelerator, "octmnist", **options)
    assert list(found.errors) == list(PUBLISHED["octmnist"]) and found.n_images == 6
    assert found.mean.value == pytest.approx(np.mean(list(found.errors.values())))
    assert found.excess.value == pytest.approx(found.mean.value - found.clean.value)
    assert found.mean.low <= found.mean.value <= found.mean.high

    config = tiny_model.config
    size = dataclasses.replace(config.preprocess, input_size=(224, 224))
    pictures = decode(index, config.replace(preprocess=size)).images
    worse = corrupted(pictures, index, "octmnist", "speckle_noise", 4, seed=0)
    data = CachedDataset(_to_input(worse, True, config), index)
    p = to_probabilities(predict_logits(tiny_model, data, 4, accelerator, full_precision=True).numpy())
    expected = evaluate(index.labels, p, index.classes, resamples=0)
    assert found.errors["speckle_noise"][4] == pytest.approx(1 - expected["balanced_accuracy"])

    for file in (tmp_path / "kept").rglob("speckle_noise-4.npy"):  # a later run takes what is there
        np.save(file, np.full((6, 3), [9.0, 0, 0], np.float32))
    again = evaluate_corruptions(tiny_model, index, accelerator, "octmnist", **options)
    assert again.errors["speckle_noise"][4] == pytest.approx(2 / 3)


def test_a_part_of_the_images_is_corrupted_as_in_the_whole(folder):
    index = open_dataset(folder).split("test")
    pictures = torch.from_numpy(np.stack([picture(i) for i in range(6)]))
    whole = corrupted(pictures, index, "dermamnist", "gaussian_noise", 0, seed=1)
    rows = proportional(index, 3, seed=1)
    assert np.bincount(index.labels[rows]).tolist() == [1, 1, 1]
    part = corrupted(pictures[rows], index.subset(rows), "dermamnist", "gaussian_noise", 0, seed=1)
    assert (part == whole[rows]).all()
    assert not (corrupted(pictures, index, "dermamnist", "gaussian_noise", 0, seed=2) == whole).all()


def test_the_result_is_stored_and_read(tiny_model, folder, tmp_path):
    index = open_dataset(folder).split("test")
    found = evaluate_corruptions(tiny_model, index, make_accelerator("cpu", "fp32"), "octmnist", images=3, resamples=0)
    found.save(tmp_path / CORRUPTIONS_NAME)
    assert load_corruptions(tmp_path).to_dict() == found.to_dict()
    assert "on 3 images of 6, drawn with seed 0" in found.to_markdown()
    assert load_corruptions(tmp_path / "data") is None
    text = (tmp_path / CORRUPTIONS_NAME).read_text()
    (tmp_path / CORRUPTIONS_NAME).write_text(text.replace("errors", "mistakes"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_corruptions(tmp_path)
    assert isinstance(Corruptions.from_dict(json.loads(text)), Corruptions)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["dermamnist", "bloodmnist", "pneumoniamnist", "octmnist"])
def test_the_kinds_agree_with_the_published_package(dataset, monkeypatch):
    registry = pytest.importorskip(
        "medmnistc.corruptions.registry", reason="needs medmnistc and ImageMagick", exc_type=ImportError
    )
    monkeypatch.setattr(np, "fromstring", np.frombuffer)  # of which NumPy 2 has removed the binary mode
    published = registry.CORRUPTIONS_DS[dataset]
    assert list(published) == list(PUBLISHED[dataset])
    image = picture(3)
    for kind, theirs in published.items():
        for level in (0, 4):
            np.random.seed(0)  # noqa: NPY002 the package draws from these two
            random.seed(0)
            theirs.rng = np.random.default_rng(0)
            # The angle of a smear is its only random number.
            rng = np.random.RandomState(0) if kind == "motion_blur" else np.random.default_rng(0)
            parameter = PUBLISHED[dataset][kind][level]
            if kind not in ("stain_deposit", "zoom_blur"):  # stored in another form
                assert tuple(np.atleast_1d(parameter)) == tuple(np.atleast_1d(theirs.severity_params[level]))
            expected = np.array(theirs.apply(Image.fromarray(image), level)).astype(int)
            found = corrupt(kind, image, parameter, rng).astype(int)
            strength = np.abs(expected - image).mean()
            if kind in SPREAD or kind.endswith("_noise"):  # other random numbers, of the same strength
                low, high = (0.3, 3) if kind in SPREAD else (0.97, 1.03)
                assert low < np.abs(found - image).mean() / strength < high, (kind, level)
            else:
                assert np.abs(found - expected).mean() < 0.02 * strength + 0.02, (kind, level)
                assert np.abs(found - expected).max() <= 2, (kind, level)
