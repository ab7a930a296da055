"""The segmentation model: building, weights, files."""

import json

import numpy as np
import pytest
import torch

import medmamba
from medmamba.config import ConfigError
from medmamba.pretrained import PretrainedError
from medmamba.segmentation import MedMambaSegmenter, SegmenterConfig, create_segmenter, register
from medmamba.segmentation.config import DECODERS


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_a_map_per_class_at_the_size_of_the_input(decoder):
    model = create_segmenter("test", ("a", "b"), decoder=decoder, exclusive=True, size=64).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 64, 96)).shape == (2, 3, 64, 96)  # the background and two classes


@pytest.mark.parametrize("decoder", ["linknet", "unetplusplus", "manet"])
def test_fusing_folds_every_batch_norm_of_a_decoder(decoder):
    torch.manual_seed(0)
    model = create_segmenter("test", ("a",), decoder=decoder, size=64).eval()
    norms = [part for part in model.net.decoder.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 1.5), norm.weight.data.uniform_(0.5, 1.5)
    fused, x = model.fuse(), torch.randn(1, 3, 64, 64)
    assert norms and not any(isinstance(part, torch.nn.BatchNorm2d) for part in fused.modules())
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def test_the_encoder_has_the_features_of_the_classifier_it_starts_from(tiny_model):
    model = create_segmenter(start=tiny_model, classes=1, size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = model.net.encoder(x)
        expected = tiny_model.forward_pyramid(x)
    assert [tuple(m.shape[1:2]) for m in maps] == [(3,), (0,), (8,), (16,), (32,), (64,)]
    for found, wanted in zip(maps[2:], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_start_in_colour_gives_the_same_maps_for_grey_images(tiny_model):
    grey = create_segmenter(start=tiny_model, classes=1, in_chans=1, size=64).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            grey.encoder.forward_features(x), tiny_model.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )


def test_a_saved_model_is_the_same_and_a_fused_copy_agrees(segmenter, tmp_path):
    folder = segmenter.save_pretrained(tmp_path / "model")
    loaded = MedMambaSegmenter.from_pretrained(folder)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), segmenter(x))
        fused = segmenter.fuse()
        torch.testing.assert_close(fused(x), segmenter(x), rtol=1e-4, atol=1e-5)
        assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in fused.modules())
        half = segmenter.fuse(torch.bfloat16)(x)
        assert half.dtype == torch.bfloat16 and (half - segmenter(x)).abs().max() < 0.1 * segmenter(x).abs().max()
    assert loaded.config == segmenter.config.replace(medmamba_version=medmamba.__version__)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_halves_the_file(segmenter, tmp_path):
    full = segmenter.save_pretrained(tmp_path / "full") / "model.safetensors"
    half = segmenter.save_pretrained(tmp_path / "half", dtype=torch.float16) / "model.safetensors"
    assert half.stat().st_size < 0.65 * full.stat().st_size


def test_a_damaged_file_is_refused_and_named(segmenter, tmp_path):
    folder = segmenter.save_pretrained(tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(PretrainedError, match=r"model\.safetensors"):
        MedMambaSegmenter.from_pretrained(folder)


def test_not_finite_weights_are_not_saved_and_leave_what_was_there(segmenter, tmp_path):
    folder = segmenter.save_pretrained(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        segmenter.net.segmentation_head[0].bias.fill_(float("nan"))
    with pytest.raises(PretrainedError, match="NaN"):
        segmenter.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_each_kind_of_model_names_the_class_that_loads_the_other(segmenter, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"MedMambaSegmenter.*the command medmamba segment"):
        medmamba.MedMamba.from_pretrained(segmenter.save_pretrained(tmp_path / "s"))
    with pytest.raises(ConfigError, match=r"MedMamba\.from_pretrained.*the command medmamba predict"):
        MedMambaSegmenter.from_pretrained(tiny_model.save_pretrained(tmp_path / "c"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decoder", "resunet", "decoder must be one of"),
        ("decoder_options", {"classes": 3}, "classes"),
        ("decoder_options", {"decoder_channels": [10**9] * 5}, "out of range"),
        ("classes", [], "names nothing"),
        ("classes", ["a", "A\n"], "line break"),
        ("thresholds", [0.5, 0.5], "one value per class"),
        ("thresholds", [1.5], "thresholds"),
        ("exclusive", 1, "true or false"),
        ("surprise", 1, "unknown fields"),
    ],
)
def test_a_wrong_configuration_is_refused(segmenter, tmp_path, field, value, message):
    folder = segmenter.save_pretrained(tmp_path)
    data = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        MedMambaSegmenter.from_pretrained(folder)


def test_a_center_crop_is_refused_because_margins_would_be_unknown(segmenter):
    encoder = segmenter.config.encoder
    preprocess = {"input_size": (64, 64), "crop_mode": "center"}
    with pytest.raises(ConfigError, match="margins"):
        SegmenterConfig(encoder.replace(preprocess=preprocess))


def test_options_that_the_decoder_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="decoder_options"):
        create_segmenter("test", 1, decoder_options={"depthh": 3})


def test_the_encoder_is_known_to_segmentation_models_pytorch(tiny_model):
    import segmentation_models_pytorch as smp

    register()
    net = smp.FPN("medmamba_nano", encoder_weights=None, in_channels=1, classes=2).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 1, 64, 64)).shape == (1, 2, 64, 64)
    with pytest.raises(ValueError, match="another variant"):
        net.encoder.load_pretrained(tiny_model)


def test_a_size_that_the_decoder_cannot_halve_is_refused():
    with pytest.raises(ConfigError, match="multiple of 32"):
        create_segmenter("test", 1, size=100)


def test_two_threads_build_models_at_once():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: create_segmenter("test", 1, size=64).eval(), range(8)))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        assert len({float(model(x).sum()) for model in models}) == 8  # none shares the encoder of another
