"""What was learnt with weights belongs to them: names, calibration and the warning for unusual images."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from hub_server import TOKEN, connect, serve
from torch import nn
from torch.nn.utils import parametrizations

from medmamba import MedMamba, PretrainedError, create_model
from medmamba.explain import explain
from medmamba.inference.fingerprint import changed_parts, fingerprint, stamp
from medmamba.inference.fitted import in_force
from medmamba.inference.ood import UnusualError, fit_unusual

CALIBRATION = {"method": "temperature", "temperature": 4.0, "n": 9, "ece_before": 0.2, "ece_after": 0.1}
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def detector(width=64, seed=0):
    features = np.random.default_rng(seed).normal(size=(40, width))
    return fit_unusual(features, np.arange(40) % 2, features)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A saved model with a calibration and a detector."""
    tiny_model.config = tiny_model.config.replace(calibration=CALIBRATION)
    tiny_model.unusual = detector()
    return tiny_model.save_pretrained(tmp_path / "saved")


@pytest.fixture
def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return MedMamba.from_pretrained(folder)


def step(model, lr=1e-3):
    """One step of a training loop of one's own; which gradients they are does not matter here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model


def by_hand(model):
    for parameter in model.parameters():
        parameter.data -= 1e-3 * torch.randn_like(parameter)
    return model


def other_weights(model):
    torch.manual_seed(5)
    model.load_state_dict(create_model("test", num_classes=3).state_dict())
    return model


def statistics(model):
    """Nothing but a forward pass in train mode, which moves the batch norms."""
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


def state(model):
    found = in_force(model)
    return bool(found.config.calibration), found.unusual is not None


def holds(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return state(model) == (True, True)


# --- the fingerprint ---


def test_rounding_to_16_bits_is_no_change_and_a_step_of_training_is():
    torch.manual_seed(0)
    for name in ("test", "nano"):
        model = create_model(name, num_classes=3).eval()
        recorded = fingerprint(model.state_dict())
        assert recorded.keys() == {"patch_embed", "head", *(f"stages.{i}" for i in range(4)), *(
            f"downsamples.{i}" for i in range(3))}  # fmt: skip
        for cast in ("half", "bfloat16", "double"):
            other = getattr(copy.deepcopy(model), cast)()
            assert changed_parts(other.state_dict(), recorded) == set(), (name, cast)
            assert changed_parts(other.float().state_dict(), recorded) == set(), (name, cast)
        for lr in (1e-3, 1e-5):
            changed = changed_parts(step(copy.deepcopy(model), lr).state_dict(), recorded)
            assert changed == set(recorded), (name, lr)
        assert changed_parts(step(copy.deepcopy(model)).bfloat16().state_dict(), recorded)


def test_one_number_of_one_tensor_is_enough(tiny_model):
    recorded = fingerprint(tiny_model.state_dict())
    with torch.no_grad():
        tiny_model.stages[1].blocks[0].ssm.in_proj.weight[3, 2] += 0.01
    assert changed_parts(tiny_model.state_dict(), recorded) == {"stages.1"}


def test_tensors_that_change_places_and_not_finite_ones_are_noticed(tiny_model):
    recorded = fingerprint(tiny_model.state_dict())
    norms = tiny_model.stages[0].blocks[0].conv
    norms[1], norms[4] = norms[4], norms[1]
    assert changed_parts(tiny_model.state_dict(), recorded) == {"stages.0"}
    tiny_model.head.bias.data[0] = float("nan")
    found = fingerprint({k: v for k, v in tiny_model.state_dict().items() if k.startswith("head")})
    assert changed_parts({}, recorded, found) >= {"head"}


def test_the_stamp_is_quick_and_sees_what_no_counter_counts(tiny_model):
    first = stamp(tiny_model)
    assert stamp(tiny_model) == first
    tiny_model.head.bias.data -= 1.0  # keeps address and version
    assert stamp(tiny_model) != first
    with torch.inference_mode():
        made = create_model("test", num_classes=3)
    assert stamp(made) == stamp(made)


# --- what changes the weights, and what does not ---


@pytest.mark.parametrize("change", [step, by_hand, other_weights, statistics])
def test_changed_weights_are_told_and_their_records_not_applied(loaded, change):
    before = loaded.predict(IMAGE)
    assert holds(loaded) and before.unusual is not None
    change(loaded)
    with pytest.warns(UserWarning, match="weights have changed since the model was calibrated"):
        after = loaded.predict(IMAGE)
    expected = torch.tensor(after.logits).softmax(0).max().item()
    assert after.probability == pytest.approx(expected, abs=1e-6), "the temperature of other weights is not applied"
    assert after.unusual is None
    assert sum("weights have changed" in note for note in after.image_notes) == 2
    assert loaded.config.calibration["temperature"] == 4, "prediction leaves the record alone"
    assert len([n for n in loaded.predict(IMAGE).image_notes if "weights have changed" in n]) == 2


def test_explanations_and_exports_leave_out_a_calibration_of_other_weights(loaded, tmp_path):
    pytest.importorskip("onnxscript")
    onnx, export = pytest.importorskip("onnx"), pytest.importorskip("medmamba.export")
    temperature = loaded.config.calibration["temperature"]
    assert explain(loaded, IMAGE, "input_x_gradient").probability == pytest.approx(loaded.predict(IMAGE).probability)
    step(loaded)
    with pytest.warns(UserWarning, match="weights have changed"):
        found = explain(loaded, IMAGE, "input_x_gradient")
    assert found.probability == pytest.approx(loaded.predict(IMAGE).probability, abs=1e-6)
    assert any("weights have changed" in note for note in found.notes)
    export.to_onnx(loaded, tmp_path / "m.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert metadata["calibration"] == "{}" and loaded.config.calibration["temperature"] == temperature


def test_a_step_and_its_undoing_is_no_change(loaded):
    kept = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    with pytest.warns(UserWarning, match="weights have changed"):
        assert state(step(loaded)) == (False, False)
    loaded.load_state_dict(kept)
    assert holds(loaded)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.bfloat16().float(),
        lambda m: [stage.half() for stage in m.stages] and m,
        lambda m: copy.deepcopy(m),
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
    ],
)
def test_casts_copies_and_modes_are_no_change(loaded, change):
    assert holds(change(loaded))


def test_a_model_made_of_the_configuration_and_the_weights_is_the_same_model(loaded):
    again = MedMamba(loaded.config)
    again.load_state_dict(loaded.state_dict())
    assert in_force(again).config.calibration
    stranger = MedMamba(loaded.config)
    with pytest.warns(UserWarning, match="since the model was calibrated"):
        assert not in_force(stranger).config.calibration


def test_a_new_calibration_is_of_the_weights_it_is_given_to(loaded):
    step(loaded)
    loaded.config = loaded.config.replace(calibration=CALIBRATION | {"temperature": 2.0})
    loaded.unusual = detector(seed=1)
    assert holds(loaded) and in_force(loaded).config.calibration["temperature"] == 2
    step(loaded)
    with pytest.warns(UserWarning, match="weights have changed"):
        assert state(loaded) == (False, False)
    loaded.config.calibration = CALIBRATION | {"temperature": 3.0}  # in place
    with pytest.warns(UserWarning, match="weights have changed"):
        assert state(loaded) == (True, False)


def test_the_features_may_stay_when_the_classifier_is_trained(loaded):
    loaded.requires_grad_(False)
    loaded.head.requires_grad_(True)
    optimizer = torch.optim.SGD(loaded.head.parameters(), lr=0.1)
    for parameter in loaded.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.warns(UserWarning, match="calibrated"):
        assert state(loaded) == (False, True)


# --- classifiers ---


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_classifier_put_in_by_hand_is_refused(loaded, tmp_path, classes):
    loaded.head = nn.Linear(64, classes)
    with pytest.raises(ValueError, match="reset_classifier"):
        loaded.predict(IMAGE)
    with pytest.raises((PretrainedError, ValueError), match="reset_classifier"):
        loaded.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_classifier_of_the_right_way_is_taken(loaded, tmp_path):
    loaded.reset_classifier(3, id2label={0: "a", 1: "b", 2: "c"})
    assert loaded.predict(IMAGE).label in "abc" and loaded.unusual is None
    assert not (loaded.save_pretrained(tmp_path) / "unusual.json").exists()


def test_names_given_to_a_new_classifier_are_believed(loaded):
    loaded.head = nn.Linear(64, 3)
    loaded.config = loaded.config.replace(id2label={0: "a", 1: "b", 2: "c"}, calibration={})
    found = loaded.predict(IMAGE)
    assert found.label in "abc" and found.unusual is not None, "the features behind it are those of before"


def test_a_wrapped_classifier_still_has_its_names(loaded, tmp_path):
    loaded.head = nn.Sequential(nn.Dropout(), loaded.head)
    with pytest.warns(UserWarning, match="weights have changed"):
        assert loaded.predict(IMAGE).label.startswith("class_")
    with pytest.raises(PretrainedError, match=r"could not be loaded again.*head\.1\.weight|reset_classifier"):
        loaded.save_pretrained(tmp_path / "x")


def test_a_subclass_keeps_a_classifier_of_its_own(tmp_path):
    class Wide(MedMamba):
        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, config.num_classes))

    model = Wide(create_model("test", num_classes=3).config).eval()
    model.config = model.config.replace(calibration=CALIBRATION)
    model.unusual = detector()
    again = Wide.from_pretrained(model.save_pretrained(tmp_path))
    assert isinstance(again, Wide) and holds(again)
    assert again.predict(IMAGE).logits == pytest.approx(model.predict(IMAGE).logits)


def test_a_subclass_with_another_constructor_is_saved_as_what_it_extends(tmp_path):
    class Odd(MedMamba):
        def __init__(self, config, extra):
            super().__init__(config)

    Odd(create_model("test", num_classes=3).config, 7).save_pretrained(tmp_path)
    assert MedMamba.from_pretrained(tmp_path).config.num_classes == 3


# --- adapters and parametrizations ---


class Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_is_noticed_and_never_written(loaded, tmp_path):
    ssm = loaded.stages[0].blocks[0].ssm
    ssm.in_proj = Adapter(ssm.in_proj)
    with pytest.warns(UserWarning, match="weights have changed"):
        assert loaded.predict(IMAGE).unusual is None
    with pytest.raises(PretrainedError, match="merge them first"):
        loaded.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_parametrizations_are_never_written(loaded, tmp_path):
    parametrizations.weight_norm(loaded.downsamples[0].reduction)
    with pytest.raises(PretrainedError, match="remove_parametrizations"):
        loaded.save_pretrained(tmp_path / "x")


# --- saving and loading ---


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_all_that_was_learnt_is_saved_and_found_again(loaded, tmp_path, dtype):
    folder = loaded.save_pretrained(tmp_path / "again", dtype)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "unusual.json"]
    again = MedMamba.from_pretrained(folder)
    assert holds(again) and again.unusual.threshold == pytest.approx(loaded.unusual.threshold)
    assert holds(MedMamba.from_pretrained(again.half().save_pretrained(tmp_path / "third")))


def test_what_no_longer_fits_is_not_saved_and_said(loaded, folder):
    step(loaded)
    with pytest.warns(UserWarning, match="weights have changed"):
        loaded.save_pretrained(folder)
    assert not (folder / "unusual.json").exists()
    again = MedMamba.from_pretrained(folder)
    assert again.config.calibration == {} and again.unusual is None


def test_records_beside_other_weights_are_not_used_and_said(folder, tiny_model):
    from safetensors.torch import save_file

    save_file(other_weights(tiny_model).state_dict(), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]  # as its error message says
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="with other weights|to other weights") as said:
        found = MedMamba.from_pretrained(folder)
    assert any("unusual.json was fitted with other weights" in str(w.message) for w in said)
    assert any("calibration in config.json was fitted with other weights" in str(w.message) for w in said)
    assert found.unusual is None and found.config.calibration == {}


def test_a_detector_is_not_saved_beside_weights_it_was_not_learnt_with(loaded, tmp_path):
    learnt = loaded.unusual
    assert learnt.weights
    other = create_model("test", num_classes=3).save_pretrained(tmp_path / "other")
    with pytest.raises(UnusualError, match="other weights"):
        learnt.save(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tiny_model, folder, value):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tiny_model.stages[2].blocks[0].norm.weight.data[1] = value
    with pytest.raises(PretrainedError, match=r"stages\.2\.blocks\.0\.norm\.weight.*diverged"):
        tiny_model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    from safetensors.torch import save_file

    save_file(tiny_model.state_dict(), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match="NaN or infinity"):
        MedMamba.from_pretrained(folder)


def test_weights_too_large_for_float16_are_not_saved_in_it(tiny_model, tmp_path):
    tiny_model.head.weight.data[0, 0] = 1e5
    with pytest.raises(PretrainedError, match=r"without dtype=torch\.float16"):
        tiny_model.save_pretrained(tmp_path / "x", torch.float16)
    assert MedMamba.from_pretrained(tiny_model.save_pretrained(tmp_path / "x")).head.weight[0, 0] == 1e5


def test_a_configuration_that_would_be_refused_is_not_saved(loaded, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded.config.calibration = {"temperature": -1.0}
    with pytest.raises(ValueError, match="temperature"):
        loaded.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_push_to_hub_takes_everything_along(loaded, monkeypatch, tmp_path):
    with serve() as hub:
        connect(hub, monkeypatch, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        loaded.push_to_hub("org/learnt")
        assert holds(MedMamba.from_pretrained("org/learnt"))
