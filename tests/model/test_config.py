"""A configuration from a file that somebody else wrote: right, or one clear error before anything is allocated."""

import dataclasses
import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba import ConfigError, MedMamba, MedMambaConfig, PreprocessConfig, PretrainedError, create_model
from medmamba.config import VARIANTS, variant_config
from medmamba.pretrained import model_kind, read_config
from medmamba.utils.strict_json import StrictJsonError, parse_json, read_json

NAN, INF = float("nan"), float("inf")
CONFIGS = sorted((Path(__file__).parents[2] / "hub" / "models").glob("*/config.json"))
MODELS = [path for path in CONFIGS if model_kind(path.parent) == "medmamba"]


def base(**changes):
    return {**MedMambaConfig(num_classes=2, id2label={0: "no", 1: "yes"}).to_dict(), **changes}


WRONG = [
    ({"preprocess": {"mean": [NAN] * 3, "std": [1, 1, 1]}}, "mean must be finite"),
    ({"preprocess": {"mean": [0, 0, 0], "std": [INF, 1, 1]}}, "std.* must be finite"),
    ({"preprocess": {"mean": [0, 0, 0], "std": [1e-300, 1, 1]}}, "std"),
    ({"preprocess": {"mean": "000", "std": [1, 1, 1]}}, "mean must be a list"),
    ({"preprocess": {"mean": ["0.5"] * 3}}, "mean must be a number"),
    ({"preprocess": {"mean": [True] * 3}}, "mean must be a number"),
    ({"preprocess": {"mean": [], "std": []}}, "one value per channel"),
    ({"preprocess": None}, "preprocess must be an object"),
    ({"preprocess": [1]}, "preprocess must be an object"),
    ({"preprocess": {"input_size": [10**6, 10**6]}}, "at most 8,192"),
    ({"preprocess": {"input_size": [224]}}, "height, width"),
    ({"preprocess": {"input_size": [224.5, 224]}}, "must be an integer"),
    ({"preprocess": {"input_size": None}}, "must be a list"),
    ({"preprocess": {"interpolation": ["bilinear"]}}, "interpolation"),
    ({"calibration": None}, "calibration must be an object"),
    ({"calibration": []}, "calibration must be an object"),
    ({"calibration": {"temperature": 0}}, "temperature must be from"),
    ({"calibration": {"temperature": -1}}, "temperature must be from"),
    ({"calibration": {"temperature": NAN}}, "temperature must be finite"),
    ({"calibration": {"temperature": None}}, "temperature must be a number"),
    ({"calibration": {"temperature": "1"}}, "temperature must be a number"),
    ({"calibration": {"method": "isotonic", "temperature": 1}}, "method must be"),
    ({"calibration": {"ood": {"score": "energy"}}}, "ood must have"),
    ({"calibration": {"ood": [1]}}, "ood must have"),
    ({"calibration": {"ood": {"score": "x", "threshold": 1, "coverage": 0.9}}}, "ood.score"),
    ({"calibration": {"ood": {"score": "energy", "threshold": INF, "coverage": 0.9}}}, "must be finite"),
    ({"calibration": {"ood": {"score": "energy", "threshold": 1, "coverage": 9}}}, "coverage"),
    ({"training": None}, "training must be an object"),
    ({"training": {"dataset": ["x"]}}, "training.dataset must be text"),
    ({"training": {"dataset": "a\x1b[2Jb"}}, "control character"),
    ({"training": {"pretraining": "blood"}}, "pretraining must be a list"),
    ({"training": {"split_sizes": {"train": "many"}}}, "split_sizes"),
    ({"training": {"seconds": NAN}}, "must be finite"),
    ({"training": {"origin": "here"}}, "origin must be an object"),
    ({"training": {"origin": {"check": {"images": "all"}}}}, "origin.check.images"),
    ({"training": {"x": object()}}, "training.x must be text, a number"),
    ({"id2label": ["no", "yes"]}, "id2label must map"),
    ({"id2label": None}, "id2label must map"),
    ({"id2label": {"0": "no", "1": "no"}}, "have the same name"),
    ({"id2label": {"0": "caf\u00e9", "1": "cafe\u0301"}}, "have the same name"),  # é in one and in two code points
    ({"id2label": {"0": "no", "00": "yes"}}, "class number"),
    ({"id2label": {"0": "no", "\u0661": "yes"}}, "class number"),  # Arabic 1, which int() reads
    ({"id2label": {"0": "no", "1": None}}, "must be text"),
    ({"id2label": {"0": "no", "1": "  "}}, "is empty"),
    ({"id2label": {"0": "no", "1": "y\nes"}}, "line break"),
    ({"id2label": {"0": "no", "1": "\u202enegiam"}}, "reorders"),
    ({"id2label": {"0": "no", "1": "y" * 1000}}, "characters"),
    ({"id2label": {"0": "no", "1": "\ud800"}}, "control character"),
    ({"num_classes": 10**9, "id2label": {}}, "at most 100,000"),
    ({"num_classes": -1, "id2label": {}}, "at least 0"),
    ({"num_classes": "2"}, "must be an integer"),
    ({"num_classes": True, "id2label": {}}, "must be an integer"),
    ({"num_classes": None}, "must be an integer"),
    ({"depths": [20000, 2, 2, 2]}, "at most 512"),
    ({"depths": [500, 500, 2, 2]}, "blocks"),
    ({"depths": [2.7, 2, 4, 2]}, "must be an integer"),
    ({"depths": 4}, "depths must be a list"),
    ({"depths": [1] * 40, "dims": [2] * 40}, "more than 8"),
    ({"dims": [2**14, 2**15, 2**16, 2**17]}, "at most 65,536"),
    ({"dims": [2**13, 2**14, 2**15, 2**16]}, "billion parameters"),
    ({"d_state": 0}, "d_state must be at least 1"),
    ({"d_state": 10**12}, "d_state"),
    ({"patch_size": 0.5}, "patch_size"),
    ({"patch_size": 64}, "at least 512"),  # 64 * 2**3 pixels for one that is left
    ({"in_chans": 10**6}, "in_chans"),
    ({"drop_rate": 1.0}, "drop_rate"),
    ({"drop_path_rate": NAN}, "drop_path_rate must be finite"),
    ({"task": None}, "task must be"),
    ({"task": ["multiclass"]}, "task must be"),
    ({"architecture": 7}, "architecture must be text"),
    ({"medmamba_version": {}}, "medmamba_version must be text"),
    ({"surprise": 1, "2": 3}, "unknown fields"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_one_clear_error_for_each_wrong_value(change, message):
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message):
            MedMambaConfig.from_dict(base(**change))
        assert tracemalloc.get_traced_memory()[1] < 2**20, (
            "a huge number is refused before anything of its size is made"
        )
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [None, [], "x", {}, {"model_type": ["medmamba"]}])
def test_what_is_no_config_at_all_is_a_config_error(data):
    with pytest.raises(ConfigError):
        MedMambaConfig.from_dict(data)


def test_numpy_values_and_integral_floats_are_taken():
    config = MedMambaConfig(
        num_classes=np.int64(2),
        depths=np.array([1, 1]),
        dims=[8.0, 16.0],
        preprocess={"input_size": np.array([64, 32]), "mean": np.zeros(3), "std": np.ones(3, np.float32)},
        calibration={"temperature": np.float32(2)},
    )
    assert config.dims == (8, 16) and config.preprocess.input_size == (64, 32) and config.num_classes == 2
    assert json.loads(json.dumps(config.to_dict()))["calibration"] == {"temperature": 2.0}


def test_grades_may_be_numbers():
    assert MedMambaConfig.from_dict(base(id2label={"0": 0, "1": 1})).labels == ["0", "1"]


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "beyond the range"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "."),
        ('{"a": 1} x', "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_what_strict_json_does_not_have_is_refused(text, message):
    with pytest.raises(StrictJsonError, match=message):
        parse_json(text)


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(StrictJsonError, match="UTF-8"):
        read_json(tmp_path / "config.json")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(200 * 2**20)  # sparse
    with pytest.raises(ConfigError, match="larger than 8 MiB"):
        read_config(tmp_path)


def test_every_wrong_value_in_a_saved_model_is_a_config_error(tmp_path):
    folder = create_model("test", num_classes=2).save_pretrained(tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    for change, _ in WRONG:
        try:
            text = json.dumps(
                saved | {{"architecture": "variant"}.get(key, key): value for key, value in change.items()}
            )
        except TypeError:
            continue
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError):
            MedMamba.from_pretrained(folder)


# --- the network that a configuration makes ---


@pytest.mark.parametrize("name", VARIANTS)
def test_the_number_of_parameters_is_known_without_the_network(name):
    with torch.device("meta"):
        model = MedMamba(variant_config(name, num_classes=7, in_chans=2, d_state=5, ssm_expand=3))
    assert sum(p.numel() for p in model.parameters()) == model.config.parameters


def test_more_blocks_than_the_weights_have_are_noticed_before_they_are_made(tmp_path, monkeypatch):
    folder = create_model("test", num_classes=2).save_pretrained(tmp_path)
    data = json.loads((folder / "config.json").read_text()) | {"depths": [1, 1, 509, 1]}
    (folder / "config.json").write_text(json.dumps(data))
    monkeypatch.setattr(MedMamba, "__init__", lambda *_: pytest.fail("the network was built"))
    with pytest.raises(PretrainedError, match=r"512 blocks .* but only .* tensors"):
        MedMamba.from_pretrained(folder)


@pytest.mark.parametrize(("patch", "dims", "least"), [(4, (8, 16, 32, 64), 32), (2, (8, 16), 4), (8, (8, 16, 32), 32)])
def test_the_least_image_follows_from_patches_and_stages(patch, dims, least):
    sizes = dict(dims=dims, depths=(1,) * len(dims), patch_size=patch)
    model = create_model("test", num_classes=2, **sizes, preprocess={"input_size": (least, least)}).eval()
    with torch.inference_mode():
        assert torch.isfinite(model(torch.zeros(1, 3, least, least))).all()
        with pytest.raises(ValueError, match=f"at least {least}x{least}"):
            model(torch.zeros(1, 3, least - 1, least))
    with pytest.raises(ConfigError, match=f"at least {least}"):
        create_model("test", num_classes=2, **sizes, preprocess={"input_size": (least, least - 1)})


# --- channels ---


def test_a_part_of_the_preprocessing_leaves_the_rest_to_the_variant():
    config = create_model("test", in_chans=1, preprocess={"input_size": (96, 96)}).config
    assert config.preprocess == PreprocessConfig((96, 96), mean=(0.5,), std=(0.5,))
    assert create_model("test", preprocess={"crop_mode": "pad"}).config.preprocess.input_size == (32, 32)
    assert MedMambaConfig(in_chans=5).preprocess.mean == (0.5,)
    with pytest.raises(ConfigError, match="3 values for 2 channels"):
        create_model("test", in_chans=2, preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})


def test_other_channels_keep_mean_and_std_or_say_what_became_of_them():
    grey = MedMambaConfig(in_chans=1, preprocess={"mean": (0.4,), "std": (0.2,)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert grey.replace(in_chans=3).preprocess.mean == (0.4,)
        assert MedMambaConfig().replace(in_chans=1).preprocess.std == (0.5,)
    colour = MedMambaConfig(preprocess={"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2)})
    with pytest.warns(UserWarning, match="averages, 0.2 and 0.2"):
        found = colour.replace(in_chans=1).preprocess
    assert found.mean == pytest.approx((0.2,)) and found.std == pytest.approx((0.2,))


@pytest.mark.parametrize("path", MODELS, ids=[path.parent.name for path in MODELS])
def test_the_models_on_disk_are_read_unchanged(path):
    data, config = json.loads(path.read_text()), read_config(path.parent)
    written = json.loads(json.dumps(config.to_dict()))
    for field in dataclasses.fields(MedMambaConfig):
        if field.name != "architecture":
            older = {"decisions": {}}  # fields that files of earlier versions lack
            assert written[field.name] == {**older, **data}[field.name], field.name
    assert config.architecture == data["variant"]
