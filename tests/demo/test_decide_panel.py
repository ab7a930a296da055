"""The decision panel: the slider and the numbers beside it are those of the stored curve."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medmamba import create_model
from medmamba.decision import Decisions, Rule, choose_abstention, choose_point, fit_sets, input_checksum, perform
from medmamba.inference.predict import predict

pytest.importorskip("gradio")
from demo.tabs import decide

LABELS = ["benign", "malignant"]


@pytest.fixture(scope="module")
def loaded():
    """A model with decisions from made-up validation answers."""
    torch.manual_seed(0)
    model = create_model("test", num_classes=2, id2label=dict(enumerate(LABELS))).eval()
    rng = np.random.default_rng(0)
    p = rng.random(80)
    p = np.stack([1 - p, p], axis=1)
    labels = (rng.random(80) < p[:, 1]).astype(int)
    entries = (
        choose_point(p, labels, LABELS, ["malignant"], Rule("sensitivity", 0.9)),
        fit_sets(p, labels, LABELS, coverage=0.9),
        choose_abstention(p.argmax(axis=1) != labels, p.max(axis=1), coverage=0.5),
    )
    data = {"name": "made up", "split": "val", "images": 80}
    record = Decisions(data=data, input=input_checksum(model.config)).with_entries(*entries).to_dict()
    model.config = model.config.replace(decisions=record)
    checked = {"data": {"images": 20}, "operating_points": {}}
    return SimpleNamespace(model=model, fused=model, config=model.config, facts=SimpleNamespace(decided=checked))


@pytest.fixture(scope="module")
def answer(loaded):
    return predict(loaded.model, np.zeros((32, 32, 3), np.uint8), decide="all")


def test_the_slider_starts_at_the_stored_threshold(loaded, answer):
    (point,) = decide.curves_of(loaded)
    sensitivity, prevalence = decide.start_of(point)
    assert point.curve.thresholds[decide.place(point, sensitivity)] == point.threshold
    html = decide.readout(loaded, answer, point, sensitivity, prevalence)
    assert ("Positive for malignant" in html) == answer.decisions[0].positive
    found = perform(point.counts, 0.3)
    for wanted in (decide.rate(found.sensitivity), f"finds {point.counts.tp} of {point.curve.positives}"):
        assert wanted in html
    assert decide.rate(found.ppv) in decide.readout(loaded, answer, point, sensitivity, 30)


def test_the_slider_moves_along_the_curve(loaded):
    (point,) = decide.curves_of(loaded)
    for wanted in range(0, 101, 5):
        at = point.curve.counts(decide.place(point, wanted))
        assert at.tp >= np.floor(wanted / 100 * point.curve.positives + 0.5) - 1e-9
    assert point.curve.counts(decide.place(point, 0)).fp == 0


def test_sets_and_abstentions_are_remarks(loaded, answer):
    html = decide.remarks(loaded, answer)
    assert "at 90 %" in html and "the set holds it" in html
    assert ("would rather not answer" in html) == answer.decisions[2].withheld
    bare = SimpleNamespace(model=create_model("test", num_classes=2), facts=loaded.facts)
    assert decide.curves_of(bare) == []
