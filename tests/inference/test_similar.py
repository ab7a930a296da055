"""Similar training images: distances, galleries on disk, and maps of several images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.data import open_dataset
from medmamba.inference.similar import (
    NAME,
    Gallery,
    SimilarError,
    build_gallery,
    features_of,
    find_similar,
    load_gallery,
    project,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of two classes, and images of them."""
    root = tmp_path_factory.mktemp("similar")
    model = medmamba.create_model("test", 2, id2label={0: "dark", 1: "light"})
    model.save_pretrained(root / "model")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 1)):
        for name, level in (("dark", 40), ("light", 200)):
            for i in range(count):
                target = root / "data" / split / name / f"{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(level - 30, level + 30, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target)
    return root


@pytest.fixture(scope="module")
def gallery(folder):
    model = medmamba.MedMamba.from_pretrained(folder / "model")
    return build_gallery(model, open_dataset(folder / "data"), "CC-BY-4.0", "Somebody 2020", images=8, side=32)


def test_the_nearest_are_found_with_their_labels(folder, gallery):
    model = medmamba.MedMamba.from_pretrained(folder / "model")
    assert gallery.features.shape[0] == 8 and sorted(gallery.labels) == [0] * 4 + [1] * 4
    dark = find_similar(model, folder / "data" / "val" / "dark" / "0.png", gallery, k=4)
    assert [match.label for match in dark] == ["dark"] * 4
    assert [m.distance for m in dark] == sorted(m.distance for m in dark)
    own = gallery.nearest(gallery.features[3], 1)[0]
    assert own.index == 3 and own.distance == 0
    low, high = gallery.typical
    assert 0 < low <= high and gallery.picture(0).shape == (26, 32, 3)
    with pytest.raises(SimilarError, match="features per image"):
        gallery.nearest(np.zeros(5))


def test_a_gallery_survives_its_file_and_belongs_to_its_weights(folder, gallery, tmp_path):
    model = medmamba.MedMamba.from_pretrained(folder / "model")
    model.save_pretrained(tmp_path / "copy")
    assert load_gallery(tmp_path / "copy") is None
    gallery.save(tmp_path / "copy")
    again = load_gallery(tmp_path / "copy")
    assert again.thumbnails == gallery.thumbnails and again.classes == ("dark", "light")
    assert (again.labels == gallery.labels).all() and again.attribution == "Somebody 2020"
    assert again.features == pytest.approx(gallery.features, abs=2e-3, rel=1e-3)
    torch.manual_seed(7)
    medmamba.create_model("test", 2).save_pretrained(tmp_path / "other")
    gallery.save(tmp_path / "other")
    (tmp_path / "other" / NAME).write_bytes((tmp_path / "copy" / NAME).read_bytes())
    assert load_gallery(tmp_path / "other") is None, "of other weights"


def test_a_gallery_that_cannot_be_trusted_is_refused(folder, gallery, tmp_path):
    medmamba.MedMamba.from_pretrained(folder / "model").save_pretrained(tmp_path)
    for content in (b"", b"nothing", (b"\xff" * 8) + b"{}"):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(SimilarError, match="cannot be read"):
            load_gallery(tmp_path)
    wrong = Gallery(gallery.features, gallery.labels + 5, gallery.thumbnails, gallery.classes, "MIT", "x")
    wrong.save(tmp_path)
    with pytest.raises(SimilarError, match="not numbers of classes"):
        load_gallery(tmp_path)
    large = io.BytesIO()
    Image.new("RGB", (300, 300)).save(large, "webp")
    thumbnails = (large.getvalue(), b"no picture", *gallery.thumbnails[2:])
    Gallery(gallery.features, gallery.labels, thumbnails, gallery.classes, "MIT", "x").save(tmp_path)
    found = load_gallery(tmp_path)
    for index, said in ((0, "300 × 300"), (1, "damaged")):
        with pytest.raises(SimilarError, match=said):
            found.picture(index)


def test_images_that_may_not_be_shown_are_not(folder):
    model = medmamba.MedMamba.from_pretrained(folder / "model")
    with pytest.raises(SimilarError, match=r"CC-BY-NC-4\.0 are not shown"):
        build_gallery(model, open_dataset(folder / "data"), "CC-BY-NC-4.0", "Somebody")


def test_features_are_those_before_the_classifier(folder):
    model = medmamba.MedMamba.from_pretrained(folder / "model")
    path = folder / "data" / "val" / "light" / "0.png"
    found = features_of(model, [path, path])
    logits = np.asarray(model.head(torch.from_numpy(found)).detach())
    assert found.shape[0] == 2 and logits[0] == pytest.approx(model.predict(path).logits, abs=1e-4)
    with pytest.raises(SimilarError, match="no such"):
        features_of(model, [folder / "no such.png"])


def test_a_map_is_the_principal_plane():
    random = np.random.default_rng(0)
    line = random.normal(size=(30, 1)) * np.array([[1.0, 2.0, -1.0, 0.0]])
    found = project(line)
    assert found.points.shape == (30, 2) and found.background.shape == (0, 2)
    assert found.explained == pytest.approx((1.0, 0.0), abs=1e-6)
    order = np.corrcoef(found.points[:, 0], line[:, 0])[0, 1]
    assert abs(order) == pytest.approx(1)
    both = project(line[:5], line[5:])
    assert both.points.shape == (5, 2) and both.background.shape == (25, 2)
    assert np.concatenate([both.points, both.background]) == pytest.approx(found.points)
    sklearn = pytest.importorskip("sklearn.decomposition")
    x = random.normal(size=(20, 6))
    peer = sklearn.PCA(2).fit((x - x.mean(0)) / x.std(0))
    assert project(x).explained == pytest.approx(tuple(peer.explained_variance_ratio_))
    assert project(np.zeros((3, 4))).points == pytest.approx(np.zeros((3, 2)))
    with pytest.raises(SimilarError, match="at least two"):
        project(np.zeros((1, 4)))
