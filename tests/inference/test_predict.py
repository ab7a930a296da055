"""Predictions: values, order, warnings, failures in the middle of a batch."""

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba import MedMamba
from medmamba.imaging.load import ImageError, load_image
from medmamba.imaging.preprocess import adapt_channels, denormalise, normalise, preprocess, resize, to_display
from medmamba.inference.ood import fit_unusual
from medmamba.inference.ood_fit import pooled_features
from medmamba.inference.predict import Failure, iter_predict, predict, predict_logits, probabilities


def picture(seed=0, size=(40, 52, 3)):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_prediction_is_the_softmax_of_the_model(tiny_model):
    pixels = picture()
    prediction = tiny_model.predict(pixels)
    tensor = preprocess(load_image(pixels), tiny_model.config.preprocess)
    with torch.no_grad():
        expected = tiny_model(tensor[None]).softmax(-1)[0]
    assert prediction.top == sorted(prediction.top, key=lambda t: -t[1]) and len(prediction.top) == 3
    assert dict(prediction.top) == {
        label: pytest.approx(p, abs=1e-6) for label, p in zip(tiny_model.config.labels, expected.tolist(), strict=True)
    }
    assert (prediction.label, prediction.probability) == prediction.top[0]


def test_calibration_is_applied(tiny_model):
    sure = tiny_model.predict(picture())
    tiny_model.config.calibration = {"method": "temperature", "temperature": 4.0}
    unsure = tiny_model.predict(picture())
    assert sure.logits == unsure.logits
    expected = (torch.tensor(sure.logits) / 4).softmax(-1).max().item()
    assert unsure.probability == pytest.approx(expected, abs=1e-6)


def test_multilabel_uses_sigmoids():
    config = medmamba.config.variant_config("test", num_classes=3, task="multilabel")
    logits = torch.tensor([[0.0, 2.0, -2.0]])
    torch.testing.assert_close(probabilities(logits, config), logits.sigmoid())


def test_lists_keep_their_order_in_any_batch_size(tiny_model):
    images = [picture(seed) for seed in range(5)]
    singles = [tiny_model.predict(image) for image in images]
    for batch_size in (1, 2, 5, 16):
        many = tiny_model.predict(images, batch_size=batch_size)
        for one, other in zip(singles, many, strict=True):
            assert one.logits == pytest.approx(other.logits, abs=1e-5)
    assert tiny_model.predict([]) == []
    assert [len(p.top) for p in predict(tiny_model, images[:1], top_k=2)] == [2]


def test_bad_files_do_not_stop_the_rest(tiny_model, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    paths = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "absent.png", tmp_path / "good.png"]
    results = list(iter_predict(tiny_model, paths, batch_size=2))
    assert [isinstance(r, Failure) for r in results] == [False, True, True, False]
    assert results[0].logits == pytest.approx(results[3].logits, abs=1e-5)
    with pytest.raises(ImageError, match=r"bad\.png"):
        tiny_model.predict(paths)
    assert all(isinstance(r, Failure) for r in iter_predict(tiny_model, paths[1:3]))


def test_warnings_name_what_is_suspicious(tiny_model):
    tiny_model.config = tiny_model.config.replace()
    notes = " ".join(tiny_model.predict(picture(size=(6, 60, 3))).image_notes)
    assert "aspect ratio" in notes and "much smaller" in notes
    assert "constant" in " ".join(tiny_model.predict(np.zeros((40, 40), np.uint8)).image_notes)
    assert "warning" not in " ".join(tiny_model.predict(picture(size=(40, 40, 3))).image_notes)


def test_training_mode_and_statistics_are_left_alone(tiny_model):
    tiny_model.train()
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    predict_logits(tiny_model, torch.randn(2, 3, 32, 32))
    assert tiny_model.training
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())


def test_wrong_arguments_are_explained(tiny_model):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        tiny_model.predict([picture()], batch_size=0)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        tiny_model.predict(picture(), top_k=0)
    tiny_model.reset_classifier(0)
    with pytest.raises(ValueError, match="no classifier"):
        tiny_model.predict(picture())


# --- preprocessing ---


def config(**options):
    return medmamba.PreprocessConfig(**{"input_size": (32, 48), **options})


def test_published_preprocessing_matches_pillow():
    """Resize((224, 224)) of an 8-bit image, then (x / 255 - 0.5) / 0.5; Pillow rounds to 8 bits, float does not."""
    pixels = picture(size=(300, 180, 3))
    tensor = preprocess(load_image(pixels), medmamba.PreprocessConfig())
    resized = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)
    expected = (torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert tensor.shape == (3, 224, 224) and tensor.dtype == torch.float32
    assert (tensor - expected).abs().max() <= 1.5 / 255 / 0.5


def test_crop_modes():
    image = torch.zeros(1, 1, 64, 64)
    image[..., 16:48, :] = 1  # a band, half of the height
    assert resize(image, config(crop_mode="squash")).mean().item() == pytest.approx(0.5, abs=0.02)
    # 64x64 to 48x48, and the middle 32 of 48 rows: 24 of 32 are band
    assert resize(image, config(crop_mode="center")).mean().item() == pytest.approx(0.75, abs=0.02)
    # 64x64 to 32x32, 8 black columns on each side: half of two thirds
    padded = resize(image, config(crop_mode="pad"))
    assert padded.mean().item() == pytest.approx(1 / 3, abs=0.02)
    assert padded[..., :8].max() == 0 and padded[..., 40:].max() == 0
    for mode in ("squash", "center", "pad"):
        for size in ((33, 500), (500, 33), (1, 1), (32, 48)):
            assert resize(torch.rand(1, 1, *size), config(crop_mode=mode)).shape == (1, 1, 32, 48)


def test_channels():
    grey, colour = torch.rand(1, 4, 4), torch.rand(3, 4, 4)
    assert torch.equal(adapt_channels(grey, 3), grey.expand(3, 4, 4))
    r, g, b = colour
    torch.testing.assert_close(adapt_channels(colour, 1)[0], 0.299 * r + 0.587 * g + 0.114 * b)
    with pytest.raises(ValueError, match="3 channels and the model takes 5"):
        adapt_channels(colour, 5)


def test_normalise_and_back():
    pixels = torch.rand(3, 8, 8)
    options = config(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.testing.assert_close(denormalise(normalise(pixels, options), options), pixels)
    shown = to_display(normalise(pixels, options), options)
    assert shown.shape == (8, 8, 3) and shown.dtype == np.uint8
    assert np.abs(shown / 255 - pixels.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_unusual_images_are_flagged_by_the_features_where_the_model_knows_its_own(tiny_model, tmp_path):
    rng = np.random.default_rng(0)
    own = [Image.fromarray(rng.normal(120, 20, (32, 32, 3)).clip(0, 255).astype("uint8")) for _ in range(8)]
    with pooled_features(tiny_model) as pooled:
        tiny_model.predict(own)
    warning = fit_unusual(pooled.array(), np.arange(8) % 2, pooled.array())
    folder = tiny_model.save_pretrained(tmp_path / "model")
    assert MedMamba.from_pretrained(folder).unusual is None
    warning.save(folder)
    model = MedMamba.from_pretrained(folder)
    # The threshold for the logits, which would call everything unusual, is not asked.
    record = {"method": "temperature", "temperature": 1.0, "n": 9, "ece_before": 0.1, "ece_after": 0.1}
    model.config.calibration = {**record, "ood": {"score": "energy", "threshold": -1e9, "coverage": 0.95}}
    for predicting in (model, model.fuse()):
        found = predicting.predict([own[0], Image.fromarray(np.zeros((32, 32, 3), np.uint8)), own[1]], batch_size=2)
        assert [p.unusual for p in found] == [False, True, False]
        assert [any("does not look like" in note for note in p.image_notes) for p in found] == [False, True, False]
    model.reset_classifier(5)
    assert model.unusual is None and model.predict(own[0]).unusual is None


def test_unusual_images_are_flagged_by_the_threshold_of_the_model(tiny_model):
    assert tiny_model.predict(picture()).unusual is None
    record = {"method": "temperature", "temperature": 1.0, "n": 9, "ece_before": 0.1, "ece_after": 0.1}
    for threshold, unusual in ((1e9, False), (-1e9, True)):
        ood = {"score": "energy", "threshold": threshold, "coverage": 0.95}
        tiny_model.config.calibration = {**record, "ood": ood}
        prediction = tiny_model.predict(picture())
        assert prediction.unusual is unusual
        assert any("does not look like" in note for note in prediction.image_notes) is unusual
