"""The stored answers of models, which the tutorials analyse: made as they say, and those that the cards report."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medmamba
from hub import outputs
from medmamba.metrics import evaluate, to_probabilities

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "hub" / "results" / "outputs").glob("*.csv"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_holds_every_image_with_its_groups(tmp_path):
    rng = np.random.default_rng(0)
    names = {"val": ["p1_a.png"], "test": ["p2_a.png", "p2_b.png"], "elsewhere": ["c.png"]}
    for split, files in names.items():
        for label in ("x", "y"):
            folder = tmp_path / (f"data/{split}" if split != "elsewhere" else split) / label
            folder.mkdir(parents=True)
            for name in files:
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{label}_{name}")
    (tmp_path / "data" / "metadata.csv").write_text(
        "file,age\nx_p1_a.png,60\nx_p2_a.png,40\ny_p2_a.png,71\n", encoding="utf-8"
    )
    model = medmamba.create_model("test", num_classes=2)
    model.config.id2label.update({0: "x", 1: "y"})
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--splits", "val,test", "--device", "cpu"]
    arguments += ["--external", str(tmp_path / "elsewhere"), "--patient-pattern", r"_(p\d)_", "--by", "age"]
    assert outputs.main([*arguments, "--cuts", "age=60", "--out", str(tmp_path / "new" / "out.csv")]) == 0
    rows = read(tmp_path / "new" / "out.csv")
    assert [row["split"] for row in rows] == ["val"] * 2 + ["test"] * 4 + ["external"] * 2
    by_name = {(row["split"], row["image"]): row for row in rows}
    first = by_name["test", "x_p2_a.png"]
    assert (first["label"], first["patient"], first["age"]) == ("x", "p2", "below 60")
    assert by_name["test", "x_p2_b.png"]["age"] == "" and by_name["external", "y_c.png"]["patient"] == ""
    answer = model.predict(tmp_path / "data" / "test" / "x" / "x_p2_a.png")
    assert [float(first[outputs.LOGIT + name]) for name in "xy"] == pytest.approx(answer.logits, abs=2e-3)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_answers_are_those_of_the_card(path):
    folder = ROOT / "hub" / "models" / path.stem
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = list(config["id2label"].values())
    reported = json.loads((folder / "results.json").read_text(encoding="utf-8"))["splits"]["test"]
    rows = [row for row in read(path) if row["split"] == "test"]
    logits = np.array([[float(row[outputs.LOGIT + name]) for name in classes] for row in rows])
    labels = [classes.index(row["label"]) for row in rows]
    shares = to_probabilities(logits, config["task"], config["calibration"]["temperature"])
    found = evaluate(labels, shares, classes, resamples=0)
    assert len(rows) == reported["n_images"]
    # The reported answers were computed on a GPU, so that an image at the edge may fall on the other side.
    assert np.abs(np.array(found.confusion) - reported["confusion"]).sum() <= 4
    for name in ("accuracy", "auroc", "ece"):
        assert found[name] == pytest.approx(reported["overall"][name]["value"], abs=4e-3), name


def test_the_tutorials_have_their_tables():
    assert {"bloodmnist-nano", "pad-ufes-20"} <= {path.stem for path in STORED}
