"""A model on labelled images, image by image."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.data import DatasetError, open_dataset
from medmamba.data.metadata import Columns
from medmamba.evaluation import ReviewCancelled, evaluate_model, propose_classes, rename_classes, review


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return medmamba.create_model("test", 2, id2label={0: "no", 1: "yes"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("no", "yes"):
        (root / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{i}.png")
    return root


@pytest.fixture(scope="module")
def found(model, folder):
    return review(model, open_dataset(folder), resamples=20, name="mine")


def test_equals_evaluate_model(model, folder, found):
    pytest.importorskip("accelerate")
    scored = evaluate_model(model, folder, None, resamples=20)
    np.testing.assert_allclose(found.scored.logits, scored.logits, atol=1e-5)
    assert found.scored.evaluation.overall == scored.evaluation.overall
    assert found.signatures.shape[0] == 16 and np.isfinite(found.signatures).all()


def test_cells_and_errors_are_the_images_of_the_confusion_matrix(found):
    counts = [[len(found.cell(a, b)) for b in found.classes] for a in found.classes]
    assert counts == [list(row) for row in found.scored.evaluation.confusion]
    worst = found.worst()
    p = found.probabilities
    assert len(worst) == counts[0][1] + counts[1][0]
    assert (np.diff(p[worst].max(axis=1)) <= 0).all()
    assert (p[worst].argmax(axis=1) != found.scored.labels[worst]).all()


def test_a_threshold(found):
    p, yes = found.probabilities[:, 1], found.scored.labels == 1
    cut = float(np.median(p))
    at = found.at(["yes"], cut, 0.1)
    assert at.counts.tp == int(((p >= cut) & yes).sum()) and at.counts.fp == int(((p >= cut) & ~yes).sum())
    se, sp = at.sensitivity.value, at.specificity.value
    assert at.ppv.value == pytest.approx(se * 0.1 / (se * 0.1 + (1 - sp) * 0.9))
    curve = found.curve(["yes"])
    assert (curve.positives, curve.negatives) == (8, 8) and curve.tp[-1] == 8 and curve.fp[-1] == 8


def test_the_table(found):
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == 16 and {row["true"] for row in rows} == {"no", "yes"}
    for row in rows:
        assert float(row["p(no)"]) + float(row["p(yes)"]) == pytest.approx(1, abs=1e-5)
        assert (row["right"] == "True") == (row["true"] == row["predicted"]) and row["model"] == "mine"


def test_unreadable_images_are_left_out_and_listed(model, folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "yes" / "yes3.png").write_bytes(b"no image")
    said = []
    found = review(
        model,
        open_dataset(tmp_path / "set"),
        resamples=0,
        progress=lambda done: said.append(done),
        columns=lambda index: Columns({"half": tuple("ab"[i % 2] for i in range(len(index)))}, ()),
    )
    assert len(found) == 15 and [name for name, _ in found.failures] == ["yes/yes3.png"]
    assert said[-1] == 16
    assert [group.evaluation.n_images for group in found.scored.subgroups.of("half")] == [8, 7]
    assert found.to_csv().splitlines()[0].endswith("half,model,version,error")
    assert "yes/yes3.png" in found.to_csv().splitlines()[-1]


def test_it_can_be_cancelled(model, folder):
    with pytest.raises(ReviewCancelled):
        review(model, open_dataset(folder), resamples=0, progress=lambda done: False)


def test_other_class_names(model, folder, tmp_path):
    for old, new in (("no", "absent"), ("yes", "present")):
        (tmp_path / new).mkdir()
        for path in (folder / old).iterdir():
            (tmp_path / new / path.name).write_bytes(path.read_bytes())
    index = open_dataset(tmp_path)
    with pytest.raises(DatasetError, match="the model does not know absent, present"):
        review(model, index)
    names = propose_classes(index, model.config)
    assert names == {"absent": "no", "present": "yes"}
    found = review(model, rename_classes(index, names), resamples=0)
    assert "by the user's word: 'absent' as 'no', 'present' as 'yes'" in found.index.notes[-1]
    three = medmamba.create_model("test", 3)
    assert propose_classes(index, three.config) is None
    mixed = medmamba.create_model("test", 2, id2label={0: "present", 1: "healthy"})
    assert propose_classes(index, mixed.config) == {"absent": "healthy", "present": "present"}
