"""`medmamba train --task segment` and `detect`: the trainers of the commands `segment train` and `detect train`."""

import importlib.util
import json

import detection_data
import pytest
from segmentation_data import write_pairs

from medmamba.cli.main import main

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)

COMMON = ["--variant", "test", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--quiet"]


def results(folder):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found["splits"]["test"], found["training"]["settings"], found["training"]["recipe"]


@pytest.mark.slow
def test_task_segment_trains_what_segment_train_does(tmp_path, capsys):
    for i, split in enumerate(("train", "val", "test")):
        write_pairs(tmp_path / "data" / split, 4, 10 * i)
    data = ["--data", str(tmp_path / "data"), "--classes", "disc", "--size", "32"]
    assert main(["train", "--task", "segment", *data, "--out", str(tmp_path / "a"), *COMMON]) == 0
    assert "model in" in capsys.readouterr().out
    assert main(["segment", "train", *data, "--out", str(tmp_path / "b"), *COMMON]) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert results(tmp_path / "a")[2] == "segment"


@pytest.mark.slow
def test_task_detect_trains_what_detect_train_does(tmp_path):
    data = ["--data", str(detection_data.write_voc(tmp_path, 8, 4, 4)), "--size", "64"]
    assert main(["train", "--task", "detect", *data, "--out", str(tmp_path / "a"), *COMMON]) == 0
    assert main(["detect", "train", *data, "--out", str(tmp_path / "b"), *COMMON]) == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--task", "segment", "--cache", "x"], "--cache: only for classifiers"),
        (["--task", "detect", "--teacher", "x"], "--teacher: only for --task segment"),
        (["--task", "segment", "--small-objects"], "--small-objects: only for --task detect"),
        (["--task", "detect", "--decoder", "fpn"], "--decoder: only for --task segment"),
        (["--loss", "dice+ce"], "--loss: only for --task segment or detect"),
    ],
)
def test_options_of_another_task_are_refused_and_nothing_is_written(options, named, tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *options]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
