"""Two models on the same images."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.data import DatasetError, open_dataset
from medmamba.evaluation import compare_models
from medmamba.inference.predict import predict


def network(seed: int, names: tuple[str, ...]):
    torch.manual_seed(seed)
    return medmamba.create_model("test", len(names), id2label=dict(enumerate(names)))


@pytest.fixture(scope="module")
def models():
    return network(0, ("no", "yes")), network(1, ("Yes", "No"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("no", "yes"):
        (root / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_labelled_images(models, folder):
    told = []
    found = compare_models(*models, open_dataset(folder), names=("a", "b"), resamples=50, progress=told.append)
    paths = [folder / str(record.source) for record in found.index.records]
    for model, shares in zip(models, found.probabilities, strict=True):
        expected = [dict(result.top) for result in predict(model, paths)]
        for row, chances in zip(shares, expected, strict=True):
            by_name = {name.lower(): value for name, value in chances.items()}
            assert row == pytest.approx([by_name["no"], by_name["yes"]], abs=1e-5), "in the order of the first model"
    outcome = found.outcome
    assert outcome.n == 12 and outcome.both + outcome.first_only + outcome.second_only + outcome.neither == 12
    assert told[-1] == 24 and found.agreement == pytest.approx((found.said[0] == found.said[1]).mean())
    order = found.most_different()
    assert sorted(order) == list(range(12)) and found.same[order].tolist() == sorted(found.same.tolist())
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == 12 and {row["true"] for row in rows} == {"no", "yes"} and "b: p(yes)" in rows[0]
    assert "The same answer to" in found.text() and "McNemar" in found.text()


def test_files_without_labels(models, folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    found = compare_models(*models, [folder / "no" / "0.png", tmp_path / "bad.png", folder / "yes" / "1.png"])
    assert len(found) == 2 and found.outcome is None and len(found.failures) == 1
    assert str(folder) not in found.to_csv() and "bad.png" in found.to_csv()
    assert "McNemar" not in found.text()


def test_models_of_other_classes(models, folder):
    with pytest.raises(DatasetError, match="only models with the same classes"):
        compare_models(models[0], network(2, ("no", "yes", "perhaps")), open_dataset(folder))
    with pytest.raises(DatasetError, match="only models with the same classes"):
        compare_models(models[0], network(2, ("no", "perhaps")), [folder / "no" / "0.png"])
