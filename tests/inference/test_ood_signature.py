"""Signatures, the detector that compares them, and what is done with an image that it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba.data import make_splits, open_dataset
from medmamba.imaging.load import MedicalImage, load_image
from medmamba.imaging.preprocess import preprocess
from medmamba.inference import (
    Refused,
    UnusualError,
    fit_signatures,
    fit_unusual,
    iter_predict,
    learn_unusual,
    load_unusual,
    signatures,
    suggest_model,
)
from medmamba.inference.altered import ALTERATIONS, altered
from medmamba.inference.engine import Engine
from medmamba.inference.ood import tolerant
from medmamba.inference.ood_file import packed, unpacked
from medmamba.inference.ood_parts import tail
from medmamba.inference.predict import needs_signatures, unusual_flags
from medmamba.inference.signature import PIXELS, groups, pixel_statistics, width


def scenes(kind, n=40, seed=0):
    """Pictures of one kind: (64, 64, 3), uint8."""
    rng = np.random.default_rng([seed, len(kind)])
    y, x = np.mgrid[:64, :64]
    found = []
    for _ in range(n):
        if kind == "discs":  # bright and purple on light
            inside = (x - rng.uniform(24, 40)) ** 2 + (y - rng.uniform(24, 40)) ** 2 < rng.uniform(100, 200)
            image = np.where(inside[..., None], [130, 80, 160], [220, 200, 210]) + rng.normal(0, 8, (64, 64, 3))
        elif kind == "stripes":  # grey
            image = (110 + 60 * np.sin(x / rng.uniform(1, 3) + rng.uniform(0, 6)))[..., None] + np.zeros(3)
        else:  # grey clouds
            small = rng.normal(120, 50, (8, 8))
            image = np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))[..., None]
            image = image + np.zeros(3)
        found.append(np.clip(image, 0, 255).astype(np.uint8))
    return found


@pytest.fixture
def of_discs(tiny_model, tmp_path):
    """A model with a detector of pictures of discs."""
    for label in ("a", "b"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i, image in enumerate(scenes("discs", 60, ord(label))):
            Image.fromarray(image).save(tmp_path / "set" / label / f"{i}.png")
    tiny_model.unusual = learn_unusual(tiny_model, make_splits(open_dataset(tmp_path / "set"), (0.6, 0.3, 0.1)))
    return tiny_model


def test_a_signature_does_not_depend_on_how_it_is_computed(tiny_model):
    batch = torch.from_numpy(np.random.default_rng(0).random((3, 3, 64, 64), dtype=np.float32)) * 2 - 1
    engine = Engine(tiny_model, torch.device("cpu"), signature=True)
    plain, fused = engine.compute(batch, many=False).answer(), engine.compute(batch, many=True).answer()
    assert plain.signature.shape == (3, width(tiny_model.config))
    torch.testing.assert_close(plain.signature[:, -tiny_model.config.dims[-1] :], plain.features)
    torch.testing.assert_close(plain.signature, fused.signature, atol=1e-4, rtol=1e-4)
    one = engine.compute(batch[1:2], many=False).answer()
    torch.testing.assert_close(one.signature, plain.signature[1:2], atol=1e-4, rtol=1e-4)
    turned = Engine(tiny_model, torch.device("cpu"), tta="hflip", signature=True).compute(batch, many=False).answer()
    torch.testing.assert_close(turned.signature, plain.signature, atol=1e-4, rtol=1e-4)
    maps = tiny_model.forward_pyramid(batch)
    stage = plain.signature[:, groups(tiny_model.config)["stage 2"]]
    torch.testing.assert_close(stage, torch.cat([maps[1].mean((2, 3)), maps[1].std((2, 3), correction=0)], 1))
    assert Engine(tiny_model, torch.device("cpu")).compute(batch).answer().signature is None, "only where asked for"


def test_pixel_statistics_say_colour_texture_and_size(tiny_model):
    config = tiny_model.config
    grey = torch.full((1, 3, 64, 64), 0.2)
    red = grey.clone()
    red[:, 0] += 0.4
    found = {name: pixel_statistics(image, config)[0] for name, image in (("grey", grey), ("red", red))}
    columns = groups(config)
    assert found["grey"].shape == (PIXELS,)
    mean = found["grey"][columns["colour"]][:3]
    torch.testing.assert_close(mean, torch.tensor([0.6, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert found["red"][columns["colour"]][2] > 0.1
    noise = grey + 0.3 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    assert pixel_statistics(noise, config)[0, columns["texture"]][0] > found["grey"][columns["texture"]][0] + 3
    for side in (32, 33, 224):
        assert pixel_statistics(torch.zeros(2, 3, side, side), config).isfinite().all()


def test_signatures_are_collected_of_so_many_images(tiny_model):
    images = scenes("discs", 5)
    with signatures() as all_of_them, signatures(3) as first:
        tiny_model.predict(images, batch_size=2)
    assert len(all_of_them.array()) == 0, "the innermost collects"
    assert first.array().shape == (3, width(tiny_model.config))
    with signatures() as seen:
        tiny_model.predict(images, batch_size=4)
    assert len(seen.array()) == 5
    np.testing.assert_allclose(seen.array()[:3], first.array(), atol=1e-4, rtol=1e-4)


def test_other_kinds_are_far_and_more_of_the_same_are_not(of_discs):
    own = of_discs.predict(scenes("discs", 40, 7))
    assert np.mean([p.unusual for p in own]) <= 0.25 and np.mean([p.unusual_level == "far" for p in own]) <= 0.1
    for kind in ("stripes", "clouds"):
        other = of_discs.predict(scenes(kind, 10))
        assert all(p.unusual_level == "far" for p in other)
        assert all(any("unlike all images" in note for note in p.image_notes) for p in other)
    assert other[0].to_dict()["unusual_level"] == "far"
    ordinary = next(p for p in own if not p.unusual)
    assert ordinary.unusual is False and "unusual_level" not in ordinary.to_dict()


def test_flags_of_an_evaluation_are_those_of_predict(of_discs):
    images = [*scenes("discs", 3, 7), *scenes("stripes", 3)]
    batch = torch.cat(
        [preprocess(load_image(Image.fromarray(image)), of_discs.config.preprocess)[None] for image in images]
    )
    assert needs_signatures(of_discs)
    answer = Engine(of_discs, torch.device("cpu"), signature=True).compute(batch).answer()
    assert unusual_flags(of_discs, answer) == [p.unusual for p in of_discs.predict(images)]
    undefined = answer._replace(logits=answer.logits.clone().index_fill(0, torch.tensor([0]), torch.nan))
    assert unusual_flags(of_discs, undefined)[0] is False


def test_a_grey_image_that_was_saved_in_colour_is_no_other_kind(tiny_model):
    images = [np.repeat(image[..., :1], 3, 2) for image in scenes("discs", 90)]
    with signatures() as seen:
        tiny_model.predict(images)
    x = seen.array()
    found = fit_signatures(x[:60], np.zeros(60), x[60:], tiny_model.config)
    noise = np.random.default_rng(0).integers(-1, 2, (30, 64, 64, 3))
    compressed = np.clip(np.stack(images[60:]).astype(int) + noise, 0, 255).astype(np.uint8)
    with signatures() as off:
        tiny_model.predict(list(compressed))
    assert np.mean([level == "far" for level in found.levels(off.array())]) < 0.2


def test_far_images_are_refused_where_that_is_asked_for(of_discs):
    images = [*scenes("stripes", 2), *scenes("discs", 4, 7)]
    answered = list(iter_predict(of_discs, images))
    found = list(iter_predict(of_discs, images, refuse_unusual="far"))
    for one, two in zip(answered, found, strict=True):
        assert isinstance(two, Refused) == (one.unusual_level == "far")
    assert isinstance(found[0], Refused) and "unlike all images" in found[0].error
    with pytest.raises(ValueError, match="refuse_unusual must be"):
        list(iter_predict(of_discs, images, refuse_unusual="everything"))


def test_the_file_gives_the_same_scores(of_discs, tmp_path):
    folder = of_discs.save_pretrained(tmp_path / "model")
    again = load_unusual(folder)
    with signatures() as seen:
        of_discs.predict(scenes("discs", 8, 3))
    np.testing.assert_allclose(again.score(seen.array()), of_discs.unusual.score(seen.array()), rtol=1e-3)
    assert again.threshold == of_discs.unusual.threshold and again.far == of_discs.unusual.far
    assert again.reference.n == of_discs.unusual.reference.n
    assert (folder / "unusual.json").stat().st_size < 2**20


def test_a_file_that_does_not_fit_is_refused(of_discs, tmp_path):
    path = of_discs.save_pretrained(tmp_path / "model") / "unusual.json"
    good = json.loads(path.read_text())

    def changed(**parts):
        record = json.loads(json.dumps(good))
        record["combined"] |= parts
        return record

    part = good["combined"]["parts"][0]
    nan = packed(np.full(len(unpacked(part["mean"], "", (None,))), np.nan))
    bad = [
        {**good, "version": 3},
        {**good, "combined": None},
        changed(parts=[]),
        changed(parts=[{**part, "mean": nan}]),
        changed(parts=[{**part, "first": 5}]),
        changed(parts=[{**part, "axes": {**part["axes"], "data": "not base64!"}}]),
        changed(parts=[{**part, "axes": {**part["axes"], "shape": [1, 2]}}]),
        changed(parts=[{**part, "std": packed(np.zeros(18))}]),
        changed(parts=[part]),
        changed(far=float("1e40")),
        changed(centre=[0.0]),
    ]
    for record in bad:
        path.write_text(json.dumps(record))
        with pytest.raises(UnusualError, match="measure again"):
            load_unusual(path.parent)


def test_a_record_of_version_1_works_as_before(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    c = tiny_model.config.dims[-1]
    folder = tiny_model.save_pretrained(tmp_path / "model")
    fit_unusual(rng.normal(100, 1, (50, c)), rng.integers(0, 2, 50), rng.normal(100, 1, (50, c))).save(folder)
    record = json.loads((folder / "unusual.json").read_text())
    assert "version" not in record and isinstance(record["means"][0], list)
    model = type(tiny_model).from_pretrained(folder)
    assert model.unusual.combined is None
    found = model.predict(scenes("discs", 1)[0])
    assert found.unusual and found.unusual_level == "near", "it knows no far"
    with pytest.raises(UnusualError, match="version 1"):
        model.unusual.pixel_score(np.zeros((1, PIXELS)))


def test_of_few_images_the_tail_is_not_the_largest():
    rng = np.random.default_rng(0)
    found = [tail(rng.exponential(size=100), 0.01) for _ in range(400)]
    assert np.mean(found) == pytest.approx(np.log(100), abs=0.3)
    assert tail([1.0, 1.0, 1.0], 0.01) == 1.0


def test_a_refused_image_is_sent_to_the_model_of_its_kind(of_discs, tmp_path):
    with signatures() as seen:
        of_discs.predict(scenes("stripes", 90))
    x = seen.array()
    of_stripes = fit_signatures(x[:60], np.zeros(60), x[60:], of_discs.config)
    known = {"discs": (of_discs.config, of_discs.unusual), "stripes": (of_discs.config, of_stripes)}
    known["old"] = (of_discs.config, dataclasses.replace(of_stripes, combined=None))

    def opened(kind):
        Image.fromarray(scenes(kind, 1, 5)[0]).save(tmp_path / "image.png")
        return load_image(tmp_path / "image.png")

    assert suggest_model(opened("stripes"), known).name == "stripes"
    assert suggest_model(opened("clouds"), known) is None
    asked = []

    def load(name):
        asked.append(name)
        of_discs.unusual = known[name][1]
        return of_discs

    found = suggest_model(opened("stripes"), known, load)
    assert found.name == "stripes" and found.asked and asked == ["stripes"]


def test_no_more_than_one_slightly_altered_image_in_a_hundred_is_far(tiny_model):
    rng = np.random.default_rng(0)
    images = [
        MedicalImage(rng.uniform(0.45, 0.55, (32, 32, 3)).astype(np.float32), f"{i}", "PNG", "RGB", 8)
        for i in range(90)
    ]
    with signatures() as seen:
        tiny_model.predict(images)
    slightly = [altered(image, i) for i, image in enumerate(images)]
    with signatures() as other:
        tiny_model.predict(slightly)
    x, y = seen.array(), other.array()
    before = fit_signatures(x[:60], np.zeros(60), x[60:], tiny_model.config)
    after = fit_signatures(x[:60], np.zeros(60), x[60:], tiny_model.config, altered=y)
    assert np.mean(before.score(y) > before.far) > 0.2, "a stronger lamp made them another kind of image"
    assert np.mean(after.score(y) > after.far) <= 0.02 and after.threshold == before.threshold
    assert after.combined.pixel_limit > before.combined.pixel_limit
    with pytest.raises(UnusualError, match="version 2"):
        tolerant(dataclasses.replace(before, combined=None), x[:, -before.means.shape[1] :])


@pytest.mark.parametrize("channels", [1, 3])
def test_alterations_are_small_and_stay_in_range(channels):
    pixels = np.random.default_rng(1).uniform(0, 1, (24, 18, channels)).astype(np.float32)
    image = MedicalImage(pixels.copy(), "a", "PNG", "RGB", 8)
    found = [altered(image, i) for i in range(len(ALTERATIONS))]
    assert np.array_equal(image.pixels, pixels) and len({one.pixels.tobytes() for one in found}) == len(ALTERATIONS)
    for one in found:
        assert one.pixels.shape == pixels.shape and one.pixels.dtype == np.float32
        assert one.pixels.min() >= 0 and one.pixels.max() <= 1 and one.source == "a"
