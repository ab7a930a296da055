"""Runs of segmentation and detection, and what becomes of one in hub/models."""

import importlib.util
import json
import shutil

import detection_data
import pytest
from segmentation_data import write_pairs

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)

from hub import dense_models, dense_runs, detect, publish, segment
from hub.validate import validate

SETTINGS = dict(epochs=1, size=32, batch_size=4, device="cpu", half=False)


@pytest.fixture(scope="module")
def pad(tmp_path_factory):
    """Finished run of a table of runs, on discs that are laid out as PAD-UFES-20: images by class, masks apart."""
    root = tmp_path_factory.mktemp("pad")
    for i, split in enumerate(("train", "val", "test")):
        write_pairs(root / "made", 6, 10 * i)
        (root / "pad_ufes_20" / split / "NEV").mkdir(parents=True)
        (root / "pad_ufes_20_masks" / split).mkdir(parents=True)
        for image in sorted((root / "made" / "images").iterdir()):
            name = f"PAT_{image.stem[1:4]}_1.png"
            shutil.move(image, root / "pad_ufes_20" / split / "NEV" / name)
            shutil.move(root / "made" / "masks" / image.name, root / "pad_ufes_20_masks" / split / name)
    run = dense_runs.Run("pad_ufes_20", "test-scratch", 0)
    results = segment.train(run, root, root / "runs", root, **SETTINGS)
    assert results["splits"]["test"]["n"] == 6 and results["splits"]["test"]["units"] == "patients"
    return root / "runs" / run.name


@pytest.mark.slow
def test_a_run_becomes_a_model_that_may_be_published(pad, tmp_path, capsys):
    folder = dense_models.make(pad, tmp_path / "pad-lesions")
    report = validate(folder, "medmamba/pad-lesions")
    assert report.problems == [] and report.warnings == []
    assert set(report.files) == {"README.md", "config.json", "golden.json", "model.safetensors", "results.json"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "mixed-see-card" in card and "CC BY 4.0" in card and "18 test" not in card and "6 test images" in card
    assert "medmamba segment predict IMAGES --model medmamba/pad-lesions" in card and "/tmp" not in card
    assert publish.publish(folder, "medmamba/pad-lesions", dry_run=True) is None
    assert "would be published" in capsys.readouterr().out
    assert "dice" in publish._note(folder)


@pytest.mark.slow
def test_a_model_that_contradicts_itself_is_not_published(pad, tmp_path):
    folder = dense_models.make(pad, tmp_path / "pad-lesions")
    golden = json.loads((folder / "golden.json").read_text())
    golden["values"][0] += 0.1
    (folder / "golden.json").write_text(json.dumps(golden))
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("license: other", "license: mit"), encoding="utf-8")
    problems = "\n".join(validate(folder, "medmamba/pad-lesions").problems)
    assert "golden prediction is not reproduced" in problems and "license is mit" in problems
    with pytest.raises(publish.PublishError, match="golden"):
        publish.publish(folder, "medmamba/pad-lesions", dry_run=True)


@pytest.mark.slow
def test_boxes_are_trained_from_the_same_kind_of_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocotools")
    monkeypatch.setitem(detect.DATASETS, "bccd", ("bright", "dark"))
    detection_data.write_voc(tmp_path / "bccd", 8, 4, 4)
    run = dense_runs.Run("bccd", "test-scratch", 0)
    found = detect.train(run, tmp_path, tmp_path / "runs", tmp_path, **{**SETTINGS, "size": 64})
    assert found["splits"]["test"]["classes"] == ["bright", "dark"]
    shown = dense_runs.table(tmp_path / "runs", [run], detect.METRICS)
    value = found["splits"]["test"]["metrics"]["map50"]["value"]
    assert f"| bccd | test-scratch | 1 | {value:.3f} |" in shown


def test_the_tables_name_their_runs(capsys):
    segment.main(["list"])
    assert "kvasir_seg-nano-0" in capsys.readouterr().out.splitlines()
    detect.main(["list"])
    assert "bccd-nano-0" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        detect.main(["train", "--data", ".", "--out", ".", "--only", "bccd-nano-9"])


def test_bccd_is_opened_with_its_official_split(shared):
    data = detect.load(shared / "data", "bccd")
    assert data.split_sizes == {"train": 205, "val": 87, "test": 72}
    assert any("2 boxes smaller than a pixel" in note for note in data.notes)
