"""Test-time augmentation: the mean of the logits over views, the same in `predict` and in `evaluate_model`."""

import numpy as np
import pytest
import torch

import medmamba
from medmamba.evaluation import evaluate_model
from medmamba.inference.tta import VIEWS, mean_logits

MODEL = dict(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=3, preprocess={"input_size": (64, 64)})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return medmamba.MedMamba(medmamba.MedMambaConfig(**MODEL)).eval()


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8))


def test_views_are_distinct_and_begin_with_the_image():
    image = torch.arange(18.0).view(1, 2, 3, 3)
    for name, views in VIEWS.items():
        seen = []
        mean_logits(lambda x, seen=seen: seen.append(x.clone()) or torch.zeros(1, 2), image, name)
        assert len(seen) == len(views) == len({tuple(x.flatten().tolist()) for x in seen})
        assert torch.equal(seen[0], image)


def test_a_mirrored_image_gets_the_same_answer(model, images):
    for name, turned in (("hflip", np.fliplr), ("flips", np.flipud), ("dihedral", np.rot90)):
        one, other = (model.predict(x, tta=name).logits for x in (images[0], np.ascontiguousarray(turned(images[0]))))
        assert one == pytest.approx(other, abs=1e-4)
        plain = model.predict(np.ascontiguousarray(turned(images[0]))).logits
        assert one != pytest.approx(plain, abs=1e-4)


def test_it_is_the_mean_of_the_logits_of_the_views(model, images):
    views = [np.ascontiguousarray(np.rot90(images[1], k)) for k in range(4)]
    views += [np.ascontiguousarray(np.fliplr(view)) for view in views]
    expected = np.mean([model.predict(view).logits for view in views], axis=0)
    assert model.predict(images[1], tta="dihedral").logits == pytest.approx(expected, abs=1e-4)


def test_evaluation_uses_the_same_views(model, images, tmp_path):
    from PIL import Image

    for number, image in enumerate(images):
        folder = tmp_path / "test" / model.config.labels[number]
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    found = evaluate_model(model, tmp_path, tta="flips", resamples=0, device="cpu")
    expected = [prediction.logits for prediction in model.predict(images, tta="flips")]
    assert found.logits == pytest.approx(np.array(expected), abs=1e-4)


def test_what_cannot_be_done_is_refused(model, images):
    with pytest.raises(ValueError, match="tta must be one of none, hflip"):
        model.predict(images[0], tta="mirror")
    with pytest.raises(ValueError, match="90 degrees"):
        mean_logits(model, torch.zeros(1, 3, 64, 32), "dihedral")
