"""The subcommand `medmamba segment`, from a folder of images and masks to masks of new images."""

import importlib.util
import json

import pytest
from PIL import Image

from medmamba.cli.main import main

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)


@pytest.fixture(scope="module")
def trained(discs, tmp_path_factory):
    """A model trained for one epoch from the command line."""
    out = tmp_path_factory.mktemp("run")
    command = ["segment", "train", "--data", str(discs), "--out", str(out), "--classes", "disc", "--variant", "test"]
    assert main([*command, "--size", "32", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--quiet"]) == 0
    return out


def test_masks_and_overlays_are_written_and_areas_printed(trained, discs, tmp_path, capsys):
    images = discs / "test" / "images"
    assert main(["segment", "predict", str(images), "--model", str(trained), "--out", str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6 and lines[0]["classes"][0]["label"] == "disc"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 12 and names[0] == "p200_a.png" and names[1] == "p200_a_overlay.png"
    assert Image.open(tmp_path / names[0]).size == (40, 48)


def test_a_file_that_cannot_be_read_is_reported_and_the_rest_answered(trained, discs, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    good = next((discs / "test" / "images").iterdir())
    code = main(["segment", "predict", str(tmp_path / "bad.png"), str(good), "--model", str(trained)])
    printed = capsys.readouterr()
    assert code == 1 and "bad.png" in printed.err and "disc" in printed.out


def test_evaluation_repeats_the_results_of_training(trained, discs, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["segment", "evaluate", "--model", str(trained), "--data", str(discs), "--out", str(out)]) == 0
    written = json.loads((trained / "results.json").read_text())["splits"]["test"]
    found = json.loads(out.read_text())
    assert found["n"] == 6
    for metric in ("dice", "iou"):
        values = [part["metrics"]["disc"][metric]["value"] for part in (found, written)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_wrong_usage_is_one_line(trained, discs, capsys):
    assert main(["segment", "evaluate", "--model", str(trained), "--data", str(discs), "--split", "holdout"]) == 2
    assert "no images in split 'holdout'" in capsys.readouterr().err
    assert main(["segment", "predict", str(discs), "--model", str(trained), "--threshold", "7"]) == 2
