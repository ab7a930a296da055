"""The commands that train the models of hub/models, on small images made here."""

import json

import numpy as np
import pytest
from PIL import Image

from hub import zoo
from medmamba import registry
from medmamba.data import DatasetError, LeakageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All four datasets with their classes: three images each in train, one in val and in test."""
    folder = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    for name in zoo.DATASETS:
        for title in registry.get(name).id2label.values():
            for split, count in (("train", 3), ("val", 1), ("test", 1)):
                place = folder / name / split / title
                place.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
                    Image.fromarray(pixels).save(place / f"{split}{i}_{title.replace(' ', '')}.png")
    return folder


def run(*words):
    return zoo.main([str(word) for word in words])


def small(root, out):
    settings = ("epochs=1", "final_epochs=0", "size=32", "batch_size=4", "eval_size=32")
    return "--data", root, "--out", out, "--variant", "test", "--device", "cpu", "--quiet", "--set", *settings


def test_the_joint_model_sees_no_test_images_and_nothing_non_commercial(root):
    joint = zoo.open_joint(root)
    assert {record.split for record in joint.records} == {"train", "val"}
    commercial = {name for name in zoo.DATASETS if not registry.get(name).licence.non_commercial}
    assert {record.source.split("/")[0] for record in joint.records} == set(zoo.JOINT) == commercial
    known = [(name, title) for name in zoo.JOINT for title in registry.get(name).id2label.values()]
    assert len(joint.classes) == len(known)
    for record in joint.records:  # labels still say what the folder says
        dataset, _, title, _ = record.source.split("/")
        assert known[record.label] == (dataset, title)


def test_from_the_joint_model_to_one_dataset(root, tmp_path):
    joint, out = tmp_path / "joint", tmp_path / "derma"
    assert run("pretrain", *small(root, joint)) == 0
    assert run("train", "dermamnist", "--init", joint, "--no-duplicate-check", *small(root, out)) == 0
    record = json.loads((out / "results.json").read_text())["training"]
    assert record["pretraining"] == list(zoo.JOINT) and record["init"] == "zoo-joint, seed 0"
    assert record["duplicates_checked"] is False and "allowed_leakage" not in record


def test_duplicates_are_looked_for_unless_told_otherwise(root, tmp_path):
    copy = next((root / "dermamnist" / "train").rglob("*.png"))
    double = root / "dermamnist" / "test" / copy.parent.name / "double_x.png"
    double.write_bytes(copy.read_bytes())
    try:
        with pytest.raises(LeakageError):
            run("train", "dermamnist", *small(root, tmp_path / "checked"))
        assert run("train", "dermamnist", "--no-duplicate-check", *small(root, tmp_path / "unchecked")) == 0
    finally:
        double.unlink()


def test_decoded_images_are_found_by_the_others(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert run("decode", "dermamnist", "--size", 32, "--data", root, "--cache", cache, "--processes", 2) == 0

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("medmamba.data.cache._decoded", refuse)
    out = tmp_path / "run"
    assert run("train", "dermamnist", "--cache", cache, "--no-duplicate-check", *small(root, out)) == 0


def test_missing_data_is_said(tmp_path):
    with pytest.raises(DatasetError):
        run("train", "breastmnist", *small(tmp_path, tmp_path / "out"))
