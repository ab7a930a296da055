"""Decisions of a model: fitted on a validation split, stored, refused where they do not hold, applied by predict."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba import MedMamba, create_model
from medmamba.cli.main import main
from medmamba.decision import DecisionError, Decisions, Rule, choose_point
from medmamba.evaluation.decide import check_decisions, decide_model, fit_decisions, write_decisions
from medmamba.evaluation.observed import Observed, observe

LABELS = ["benign", "malignant"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright and dark images of two classes, 24 of each in val and 12 in test, two images per patient."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 24), ("test", 12)):
        for k, label in enumerate(LABELS):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                grey = rng.normal(90 + 70 * k, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(grey).save(folder / f"{split}{label[0]}{i // 2}_{i % 2}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = create_model("test", num_classes=2, id2label=dict(enumerate(LABELS))).eval()
    model.config = model.config.replace(
        calibration={"method": "temperature", "temperature": 0.7, "n": 9, "ece_before": 0.2, "ece_after": 0.1}
    )
    return model.save_pretrained(tmp_path / "model")


def decide(folder, data, *more):
    return main(["decide", str(folder), "--val", str(data), "--quiet", *more])


ALL = ("--classes", "malignant", "--sensitivity", "0.9", "--coverage", "0.9", "--answer-share", "0.8", "--write")


def test_the_command_writes_what_predict_applies(folder, data, capsys):
    before = (folder / "model.safetensors").read_bytes()
    assert decide(folder, data, *ALL, "--patient-pattern", "([a-z]+[0-9]+)_") == 0
    said = capsys.readouterr().out
    assert "malignant-sensitivity-0.9" in said and "24 images" in said
    assert (folder / "model.safetensors").read_bytes() == before
    checked = json.loads((folder / "decisions.json").read_text())
    row = checked["operating_points"]["malignant-sensitivity-0.9"]
    assert row["tp"] + row["fn"] == row["fp"] + row["tn"] == 12 and checked["data"]["split"] == "test"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = MedMamba.from_pretrained(folder)
        # On the validation images predict calls positive exactly those that were counted.
        files = sorted((data / "val").rglob("*.png"))
        found = model.predict(files, decide="all")
        fused = model.fuse().predict(files[:3], decide="all")
    stored = Decisions.from_config(model.config)
    point = stored.points[0]
    assert [d.name for d in found[0].decisions] == stored.names
    called = [p.decisions[0].positive for p in found]
    truth = [f.parent.name == "malignant" for f in files]
    assert sum(c and t for c, t in zip(called, truth, strict=True)) == point.counts.tp >= 0.9 * 24
    assert sum(c and not t for c, t in zip(called, truth, strict=True)) == point.counts.fp
    assert point.counts.positives <= 24 and stored.data["patients"] == 24
    assert [[d.answer for d in p.decisions] for p in fused] == [[d.answer for d in p.decisions] for p in found[:3]]
    held = [f.parent.name in p.decisions[1].labels for f, p in zip(files, found, strict=True)]
    assert np.mean(held) >= 0.9
    record = json.loads(json.dumps(found[0].to_dict(), allow_nan=False))
    assert record["decisions"][1]["kind"] == "set" and "decisions" not in model.predict(files[0]).to_dict()


def test_the_command_line_predicts_with_them(folder, data, capsys):
    decide(folder, data, *ALL)
    image = str(data / "test" / "benign" / "testb0_0.png")
    capsys.readouterr()
    assert main(["predict", image, "--model", str(folder), "--operating-point", "malignant-sensitivity-0.9"]) == 0
    assert "malignant-sensitivity-0.9: malignant: " in capsys.readouterr().out
    assert main(["predict", image, "--model", str(folder), "--decide", "all", "--csv"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.endswith("malignant-sensitivity-0.9,sets-0.9,answers-0.8,error") and row.count("at 90 %") == 1
    assert main(["predict", image, "--model", str(folder), "--decide", "sensitivity"]) == 2
    assert "there are: malignant-sensitivity-0.9" in capsys.readouterr().err


def test_decisions_add_up_or_are_replaced(folder, data):
    decide(folder, data, "--sensitivity", "0.9", "--classes", "malignant", "--write")
    decide(folder, data, "--youden", "--classes", "malignant", "--write")
    names = ["malignant-sensitivity-0.9", "malignant-youden"]
    assert Decisions.from_config(MedMamba.from_pretrained(folder).config).names == names
    decide(folder, data, "--coverage", "0.9", "--write", "--replace")
    assert Decisions.from_config(MedMamba.from_pretrained(folder).config).names == ["sets-0.9"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.load_state_dict(create_model("test", num_classes=2).state_dict()), "weights have changed"),
        (lambda m: setattr(m, "config", m.config.replace(calibration={})), "calibration or classes are not"),
        (lambda m: m.config.preprocess.__setattr__("crop_mode", "pad"), "preprocessing, calibration"),
    ],
)
def test_they_are_refused_where_they_do_not_hold(folder, data, change, reason):
    decide(folder, data, *ALL)
    model = MedMamba.from_pretrained(folder)
    change(model)
    image = data / "test" / "benign" / "testb0_0.png"
    with pytest.warns(UserWarning, match=reason), pytest.raises(DecisionError, match=reason):
        model.predict(image, decide="all")
    assert any(reason in note for note in model.predict(image).image_notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)  # leaves them out
    assert not MedMamba.from_pretrained(folder).config.decisions


@pytest.mark.filterwarnings("ignore:the weights have changed")
def test_weights_swapped_in_the_folder_are_noticed(folder, data, tmp_path):
    decide(folder, data, *ALL)
    other = create_model("test", num_classes=2).save_pretrained(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = json.loads((other / "config.json").read_text())["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="fitted with other weights"):
        model = MedMamba.from_pretrained(folder)
    with pytest.raises(DecisionError, match="weights have changed"):
        model.predict(data / "test" / "benign" / "testb0_0.png", decide="sets-0.9")


def test_in_python(folder, data, tmp_path):
    model = MedMamba.from_pretrained(folder)
    found = decide_model(model, data, [(["malignant"], Rule("youden"))], coverage=0.9)
    image = data / "test" / "benign" / "testb0_0.png"
    said = model.predict(image, decide=["malignant-youden"]).decisions
    assert len(said) == 1 and said[0].threshold == found.points[0].threshold
    seen = observe(model, data, "val")
    own = choose_point(seen.probabilities, seen.labels, LABELS, ["malignant"], Rule("f1"), name="mine")
    assert model.predict(image, decide=own).decisions[0].name == "mine"
    saved = MedMamba.from_pretrained(model.save_pretrained(tmp_path / "half", dtype=torch.float16))
    assert saved.predict(image, decide="all").decisions  # half precision is no change
    with pytest.raises(DecisionError, match="takes names or decisions"):
        model.predict(image, decide=3)
    loaded = Observed.load(seen.save(tmp_path / "seen.npz"))
    assert loaded.patients == seen.patients and (loaded.logits == seen.logits).all()
    with pytest.raises(DecisionError, match="another preprocessing"):
        write_decisions(folder, fit_decisions(seen, coverage=0.9))


def test_what_was_checked_has_patients_and_intervals(folder, data):
    pattern = {"patient_pattern": "([a-z]+[0-9]+)_"}
    model = MedMamba.from_pretrained(folder)
    made = decide_model(model, data, [(["malignant"], Rule("youden"))], risk=None, answer_share=0.9, reading=pattern)
    found = check_decisions(made, observe(model, data, "test", **pattern), prevalence=0.1, resamples=50)
    assert made.patients["groups"] == 24 and found["patients"]["groups"] == 12 == found["data"]["patients"]
    row = found["operating_points"]["malignant-youden"]
    assert row["prevalence"] == 0.1 and row["sensitivity"]["low"] <= row["sensitivity"]["value"]
    assert found["selective"]["low"] <= found["selective"]["aurc"] <= found["selective"]["high"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ((), "nothing to decide"),
        (("--classes", "malignant"), "need a rule"),
        (("--sensitivity", "0.999"), "too few"),
        (("--sensitivity", "1.5"), "between 0 and 1"),
        (("--classes", "cyst", "--youden"), "no class 'cyst'"),
        (("--risk", "0.001"), "cannot vouch"),
        (("--youden", "--split", "dev"), "no split"),
    ],
)
def test_the_command_refuses_and_writes_nothing(folder, data, capsys, options, what):
    before = (folder / "config.json").read_bytes()
    assert decide(folder, data, *options, "--write") == 2
    assert what in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before and not (folder / "decisions.json").exists()
