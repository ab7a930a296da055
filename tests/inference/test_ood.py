"""The warning for images unlike the training images."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from medmamba.data import make_splits, open_dataset
from medmamba.inference.ood import Unusual, UnusualError, fit_signatures, fit_unusual, load_unusual
from medmamba.inference.ood_fit import learn_unusual, look, pooled_features
from medmamba.inference.signature import signatures


def clouds(n=200, shift=0.0, seed=0):
    """Two classes around 0 and around 5 in eight dimensions, of unequal spread."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    scale = np.linspace(0.1, 3, 8)
    return rng.normal(0, 1, (n, 8)) * scale + 5 * labels[:, None] + shift * scale, labels


def test_the_threshold_lets_the_validation_images_pass():
    x, y = clouds()
    validation, _ = clouds(400, seed=1)
    found = fit_unusual(x, y, validation, coverage=0.9)
    assert found.is_unusual(validation).mean() == pytest.approx(0.1, abs=0.005)
    assert found.is_unusual(clouds(400, seed=2)[0]).mean() == pytest.approx(0.1, abs=0.05)


def test_distances_are_measured_in_the_spread_of_the_classes():
    x, y = clouds(2000)
    found = fit_unusual(x, y, x)
    np.testing.assert_allclose(found.means, [np.zeros(8), np.full(8, 5.0)], atol=0.3)
    np.testing.assert_allclose(found.spread, np.linspace(0.1, 3, 8), rtol=0.06)
    assert found.score(found.means) == pytest.approx([0, 0])
    assert found.score(found.means[:1] + 2 * found.spread) == pytest.approx([2.0], rel=0.1)
    between = np.full((1, 8), 2.5)
    assert found.is_unusual(between)[0], "between the classes, where no image lies"
    assert found.is_unusual(clouds(100, shift=4)[0]).mean() > 0.95


def test_several_labels_are_one_class():
    x, _ = clouds()
    labels = np.random.default_rng(0).integers(0, 2, (200, 3))
    assert fit_unusual(x, labels, x, task="multilabel").means.shape == (1, 8)


def test_what_never_moves_does_not_divide_by_zero():
    x, y = clouds()
    x[:, 0] = 7.0
    found = fit_unusual(x, y, x)
    assert np.isfinite(found.score(x)).all()


def test_shapes_that_do_not_fit_are_refused():
    x, y = clouds()
    for arguments in ((x, y[:-1], x), (x, y, x[:, :4]), (x[0], y, x), (x[:3], y[:3], x[:0]), (x, y, x, 1.0)):
        with pytest.raises(UnusualError):
            fit_unusual(*arguments)
    with pytest.raises(UnusualError, match="of this model"):
        fit_unusual(x, y, x).score(x[:, :5])


def test_the_file_is_bound_to_its_weights(tiny_model, tmp_path):
    folder = tiny_model.save_pretrained(tmp_path / "model")
    assert load_unusual(folder) is None
    x, y = clouds()
    found = fit_unusual(x, y, x)
    Unusual(found.means, found.spread, found.threshold, found.coverage, {"own": {"n": 3}}).save(folder)
    again = load_unusual(folder)
    np.testing.assert_allclose(again.score(x), found.score(x), rtol=1e-3)
    assert again.measured == {"own": {"n": 3}} and again.threshold == found.threshold
    tiny_model.head.weight.data += 1
    tiny_model.save_pretrained(folder)
    assert load_unusual(folder) is None, "other weights"
    again.save(folder)
    (folder / "config.json").unlink()
    assert load_unusual(folder) is not None, "the same hash, taken of the weights themselves"
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert load_unusual(folder) is None


def test_a_foreign_file_is_refused(tiny_model, tmp_path):
    folder = tiny_model.save_pretrained(tmp_path / "model")
    for text in ("nonsense", "{}", json.dumps({"means": [[1, 2]], "spread": [1], "threshold": 1, "coverage": 1,
                                               "measured": {}, "weights": ""})):  # fmt: skip
        (folder / "unusual.json").write_text(text)
        with pytest.raises(UnusualError, match="measure again"):
            load_unusual(folder)


def test_features_are_those_behind_the_classifier(tiny_model):
    images = [np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8) for i in range(5)]
    fused = tiny_model.fuse()
    with pooled_features(fused) as pooled:
        predictions = fused.predict(images, batch_size=2)
    features = pooled.array()
    head = tiny_model.head
    logits = features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    np.testing.assert_allclose(logits, [p.logits for p in predictions], atol=1e-4)
    fused.predict(images[:1])
    assert len(pooled.array()) == 5, "nothing is kept afterwards"


def test_other_threads_are_not_mixed_in(tiny_model):
    image = Image.new("RGB", (40, 40))
    with pooled_features(tiny_model) as pooled:
        thread = threading.Thread(target=tiny_model.predict, args=(image,))
        thread.start()
        thread.join()
        assert pooled.array().shape == (0, 0)
        tiny_model.predict(image)
    assert pooled.array().shape == (1, 64)


@pytest.fixture
def dark_and_light(tmp_path):
    """40 images of two classes, divided into train, val and test."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(level, 10, (32, 32)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return make_splits(open_dataset(tmp_path / "set"), (0.5, 0.3, 0.2))


def test_it_is_learnt_from_train_and_val_alone(tiny_model, dark_and_light):
    train, val = look(tiny_model, dark_and_light, "train"), look(tiny_model, dark_and_light, "val")
    assert train.features.shape == (20, 64) and len(val.logits) == len(val.labels) == 12
    expected = fit_signatures(train.signatures, train.labels, val.signatures, tiny_model.config)
    found = learn_unusual(tiny_model, dark_and_light)
    assert found.threshold == expected.threshold and np.array_equal(found.means, expected.means)
    assert np.array_equal(found.means, fit_unusual(train.features, train.labels, val.features).means)
    noise = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with signatures() as seen:
        tiny_model.predict(list(noise))
    assert found.is_unusual(seen.array()).all()


def test_a_part_of_a_set_is_the_same_part_each_time(tiny_model, dark_and_light):
    one, two = look(tiny_model, dark_and_light, None, 7), look(tiny_model, dark_and_light, None, 7)
    assert len(one.labels) == 7 and np.array_equal(one.features, two.features)
    with pytest.raises(UnusualError, match="no split 'elsewhere'"):
        look(tiny_model, dark_and_light, "elsewhere")
