"""The subcommand `medmamba segment`, from a folder of images and masks to masks of new images."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from medmamba.cli.dense import names_in
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


def test_images_of_the_same_name_do_not_overwrite_each_other(trained, discs, tmp_path):
    first, second = sorted((discs / "test" / "images").iterdir())[:2]
    for place, source in (("a/1.png", first), ("b/1.png", second), ("b/2.png", first)):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "in" / place)
    out = tmp_path / "out"
    assert main(["segment", "predict", str(tmp_path / "in"), "--model", str(trained), "--out", str(out)]) == 0
    masks = sorted(str(path.relative_to(out)) for path in out.rglob("*.png") if "overlay" not in path.name)
    assert masks == [os.path.join(*place) for place in (("a", "1.png"), ("b", "1.png"), ("b", "2.png"))]
    assert (out / "a" / "1_overlay.png").read_bytes() == (out / "b" / "2_overlay.png").read_bytes()
    assert (out / "a" / "1_overlay.png").read_bytes() != (out / "b" / "1_overlay.png").read_bytes()


def test_names_of_files_are_those_of_the_images():
    def names(*paths):
        return [path.as_posix() for path in names_in("out", [Path(path) for path in paths])]

    assert names("x/a/1.png", "x/b/2.png") == ["out/1", "out/2"]
    assert names("x/a/1.png", "x/a/1.jpg", "x/b/1.png") == ["out/a/1.png", "out/a/1.jpg", "out/b/1"]
    assert names("1.png", "a/1.png") == ["out/1", "out/a/1"]
    assert names("x.1.png", "x.2.png") == ["out/x.1", "out/x.2"]
    assert names() == []

    def beside_overlays(*paths):
        return [path.as_posix() for path in names_in("out", [Path(path) for path in paths], "_overlay")]

    assert beside_overlays("x.png", "x_overlay.png", "y.png") == ["out/x", "out/x_overlay.png", "out/y"]
    assert beside_overlays("a/x.png", "b/x_overlay.png") == ["out/x", "out/x_overlay.png"]
    assert beside_overlays("x_overlay.png", "y.png") == ["out/x_overlay", "out/y"]


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
