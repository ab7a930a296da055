"""`evaluate` withholds answers and answers per patient as `decide` and `predict_groups` do."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from medmamba import MedMamba, create_model
from medmamba.cli.main import main
from medmamba.data import DatasetError, open_dataset
from medmamba.decision import DecisionError, Rule, choose_threshold, errors_of, risk_coverage
from medmamba.decision.checking import evaluate_patients
from medmamba.decision.patients import mostly
from medmamba.decision.tables import risk_table
from medmamba.evaluation import evaluate_model
from medmamba.evaluation.by_patient import with_patients
from medmamba.evaluation.decide import check_decisions, decide_model, write_decisions
from medmamba.evaluation.observed import Observed, observe
from medmamba.inference import learn_unusual
from medmamba.inference.patients import predict_groups
from medmamba.metrics.calibration import to_probabilities
from medmamba.metrics.thresholds import best_f1_thresholds

PATTERN = "([a-z]+[0-9]+)_"
LABELS = ["benign", "malignant"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright and dark images of two classes, two of each patient; every third test image is a chequerboard."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 24), ("test", 12)):
        for k, label in enumerate(LABELS):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                grey = rng.normal(90 + 70 * k, 30, (32, 32, 3)).clip(0, 255)
                if split == "test" and i % 3 == 0:
                    checks = np.indices((32, 32)).sum(0) // (1 + i % 2) % 2
                    grey = np.where(checks[..., None], [0, 0, 255], [255, 255, 0])
                Image.fromarray(grey.astype(np.uint8)).save(folder / f"{split}{label[0]}{i // 2}_{i % 2}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """A model with a detector, an operating point and an abstention."""
    torch.manual_seed(0)
    model = create_model("test", num_classes=2, id2label=dict(enumerate(LABELS))).eval()
    model.unusual = learn_unusual(model, open_dataset(data))
    path = model.save_pretrained(tmp_path_factory.mktemp("run") / "model")
    reading = {"patient_pattern": PATTERN}
    points = [(["malignant"], Rule("youden"))]
    found = decide_model(MedMamba.from_pretrained(path), data, points, answer_share=0.8, reading=reading)
    return write_decisions(path, found)


def test_evaluate_withholds_answers_as_decide_does(folder, data):
    scored = evaluate_model(folder, data, device="cpu", resamples=20, patient_pattern=PATTERN)
    seen = observe(folder, data, "test", patient_pattern=PATTERN)
    assert seen.unusual is not None and 0 < seen.unusual.sum() < len(seen)
    assert np.abs(scored.logits - seen.logits).max() < 1e-4
    known = check_decisions(scored.decisions, dataclasses.replace(seen, logits=scored.logits), resamples=20)
    assert scored.decided["selective"] == known["selective"]
    assert scored.decided["abstentions"]["answers-0.8"] == known["abstentions"]["answers-0.8"]
    p = to_probabilities(scored.logits, "multiclass")
    plain = risk_coverage(errors_of(p, seen.labels), p.max(1)).aurc
    assert scored.decided["selective"]["plain_confidence"] == pytest.approx(plain)
    text = scored.to_markdown()
    assert "## Abstaining" in text and "answered, the most certain first | 100% |" in text
    json.dumps(scored.decided, allow_nan=False)


def test_answers_per_patient_are_those_of_predict(folder, data, capsys, tmp_path):
    options = ["--patient-pattern", PATTERN, "--device", "cpu", "--resamples", "20", "--quiet", "--out", str(tmp_path)]
    assert main(["evaluate", "--model", str(folder), "--data", str(data), "--per", "patient", *options]) == 0
    said = capsys.readouterr().out
    assert "## One answer per patient" in said and "12 patients, 2 classes" in said
    found = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]["by_patient"]
    assert found["chosen"] and found["n_images"] == 12 and found["resampled_by"] == "image"
    index = open_dataset(data, "test", patient_pattern=PATTERN)
    files = [data / record.source for record in index.records]
    model = MedMamba.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        answers = predict_groups(model, files, index.patients, decide="all")
    truth = {patient: index.classes[label] for patient, label in zip(index.patients, index.labels, strict=True)}
    right = [answer.label == truth[answer.group] for answer in answers]
    assert found["overall"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    row = found["decided"]["operating_points"]["malignant-youden"]
    called = [a.decisions[0].positive for a in answers if truth[a.group] == "malignant"]
    assert (row["tp"], row["tp"] + row["fn"]) == (sum(called), len(called))
    kept = found["decided"]["abstentions"]["answers-0.8"]["coverage"]["value"]
    assert kept == pytest.approx(np.mean([not a.decisions[1].withheld for a in answers]))


def test_what_cannot_be_answered_per_patient_is_refused(folder, data, capsys):
    words = ["evaluate", "--model", str(folder), "--data", str(data), "--device", "cpu", "--quiet"]
    assert main([*words, "--per", "patient"]) == 2
    assert "no patient is known" in capsys.readouterr().err
    assert main([*words, "--combine", "max"]) == 2
    assert "per must be 'patient'" in capsys.readouterr().err
    with pytest.raises(DecisionError, match="no patient is known"):
        evaluate_patients([[0.2, 0.8]], [1], LABELS, [None])


def test_patients_of_dicom_files_are_numbers(tmp_path, monkeypatch):
    pytest.importorskip("pydicom")
    for i, label in enumerate(("benign", "benign", "malignant", "malignant")):
        (tmp_path / "test" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / label / f"{i}.dcm").write_bytes(b"\0" * 128 + b"DICM")
    index = open_dataset(tmp_path, "test")
    with pytest.raises(DatasetError, match="no patient is known"):
        with_patients(index)
    monkeypatch.setattr("medmamba.imaging.dicom.studies.group_files", lambda files, level: [0, 0, None, 1])
    assert with_patients(index).patients == ["patient 1", "patient 1", None, "patient 2"]
    assert not any(index.patients)


def test_most_images_of_a_patient_decide_whether_it_is_unusual():
    groups = ["a", "b", "a", None, "b", "a"]
    assert mostly([True, True, False, True, False, True], groups).tolist() == [True, False, True]
    assert mostly(None, groups) is None


def test_the_table_of_the_curve_shows_errors_of_the_surest():
    curve = risk_coverage([0, 0, 0, 1, 0, 0, 1, 0, 1, 1], np.arange(10, 0, -1)).to_dict()
    head, _, row = risk_table(curve)
    assert head.endswith("| 100% | 100% | 90% | 80% | 70% | 50% |")
    assert row.endswith("| 0.400 | 0.400 | 0.333 | 0.250 | 0.286 | 0.200 |")


def test_thresholds_of_labels_are_those_that_the_rule_f1_chooses(tmp_path):
    rng = np.random.default_rng(1)
    p = rng.random((60, 3)).round(2)
    labels = (rng.random((60, 3)) < p).astype(int)
    labels[:, 2] = 0
    limits = best_f1_thresholds(labels, p)
    assert limits[:2].tolist() == [choose_threshold(p[:, i], labels[:, i], Rule("f1")) for i in range(2)]
    assert limits[2] == 0.5
    errors = errors_of(p, labels, "multilabel", limits)
    assert errors == pytest.approx(((p > limits) != labels).mean(1)) and not np.allclose(
        errors, errors_of(p, labels, "multilabel")
    )
    seen = Observed(p, labels, (None,) * 60, None, ("a", "b", "c"), "multilabel", 1.0, threshold=tuple(limits))
    assert Observed.load(seen.save(tmp_path / "seen.npz")).threshold == tuple(limits)
