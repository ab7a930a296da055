"""Wrong images, masks and boxes are named before anything is trained, and leave nothing behind."""

import importlib.util

import detection_data
import numpy as np
import pytest
from PIL import Image
from segmentation_data import write_pairs

from medmamba.cli.main import main

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)
pytest.importorskip("accelerate")

SHORT = ["--variant", "test", "--size", "32", "--epochs", "1", "--batch-size", "2", "--device", "cpu", "--quiet"]


@pytest.fixture
def pairs(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        write_pairs(tmp_path / "data" / split, 2, 10 * i)
    return tmp_path / "data"


@pytest.fixture
def voc(tmp_path):
    return detection_data.write_voc(tmp_path / "data", 2, 2, 2)


def refused(task, data, tmp_path, capsys, *more):
    """Returns what a training says that must fail, after checking that it wrote nothing."""
    assert main(["train", "--task", task, "--data", str(data), "--out", str(tmp_path / "run"), *SHORT, *more]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_mask_of_another_size(pairs, tmp_path, capsys, split):
    path = next((pairs / split / "masks").iterdir())
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(path)
    said = refused("segment", pairs, tmp_path, capsys, "--classes", "disc")
    assert path.name in said and "20x20" in said


def test_an_image_without_its_mask(pairs, tmp_path, capsys):
    path = next((pairs / "test" / "masks").iterdir())
    path.unlink()
    assert path.stem in refused("segment", pairs, tmp_path, capsys)


def test_a_value_that_names_no_class(pairs, tmp_path, capsys):
    path = next((pairs / "test" / "masks").iterdir())
    Image.fromarray(np.full((48, 40), 3, np.uint8)).save(path)
    said = refused("segment", pairs, tmp_path, capsys, "--classes", "disc", "rim")
    assert path.name in said and "3" in said


def test_a_damaged_image(pairs, tmp_path, capsys):
    path = next((pairs / "test" / "images").iterdir())
    path.write_bytes(b"nothing")
    assert path.name in refused("segment", pairs, tmp_path, capsys)


@pytest.mark.slow
def test_empty_masks_are_images_with_nothing_to_segment(pairs, tmp_path, capsys):
    for path in (pairs / "train" / "masks").iterdir():
        Image.fromarray(np.zeros((48, 40), np.uint8)).save(path)
    command = ["segment", "train", "--data", str(pairs), "--out", str(tmp_path / "run"), *SHORT]
    assert main(command) == 0 and (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["s000", "s004"])
def test_a_box_outside_of_its_image(voc, tmp_path, capsys, name):
    """In the training split, and in the test split, which is read last."""
    (voc / "Annotations" / f"{name}.xml").write_text(detection_data.annotation([("dark", (40, 40, 90, 60))]))
    said = refused("detect", voc, tmp_path, capsys, "--classes", "bright", "dark")
    assert f"{name}.xml" in said and "outside of" in said


def test_an_unknown_class_and_an_image_without_annotation(voc, tmp_path, capsys):
    assert "unknown class" in refused("detect", voc, tmp_path, capsys, "--classes", "bright", "other")
    (voc / "Annotations" / "s005.xml").unlink()
    assert "s005" in refused("detect", voc, tmp_path, capsys)


def test_an_earlier_model_in_the_folder_survives(pairs, tmp_path, capsys):
    """What another run left is not touched by a refusal."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    next((pairs / "test" / "masks").iterdir()).unlink()
    assert main(["segment", "train", "--data", str(pairs), "--out", str(tmp_path / "run"), *SHORT]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
