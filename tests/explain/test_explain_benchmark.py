"""A small version of benchmarks/explain.py: it goes on where it stopped, ends in time, and tables what it measured."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import explain
    import explain_report

    monkeypatch.setattr(
        explain, "CHECKS", explain.CHECKS | {"perturbations": 4, "random_orders": 2, "steps": 4, "repeats": 1}
    )
    yield explain, explain_report
    for name in [n for n in sys.modules if n == "explain" or n.startswith("explain_")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images, and a model."""
    rng = np.random.default_rng(0)
    for label in ("blue", "red"):
        (tmp_path / "data/cells/test" / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/cells/test/{label}/{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = medmamba.create_model("test", num_classes=2, id2label={0: "blue", 1: "red"})
    model.save_pretrained(tmp_path / "models/cells")
    return tmp_path


def options(folder: Path, **changes) -> argparse.Namespace:
    settings = dict(
        models=folder / "models", data=folder / "data", out=folder / "out", datasets=None, images=2,
        randomisation_images=1, sensitivity_images=1, timed_images=1, workers=1, fuse=True, deadline=None, seed=0,
        device="cpu", batch_size=8, methods=["saliency", "gradcam:stage1", "edges (control)"],
    )  # fmt: skip
    return argparse.Namespace(**settings | changes)


def test_the_choice_of_images_is_even_and_a_smaller_one_is_its_beginning(bench, folder):
    explain, _ = bench
    test = folder / "data/cells/test"
    chosen = explain.sample(test, 4, seed=0)
    assert [p.parent.name for p in chosen] == ["blue", "red", "blue", "red"]
    assert explain.sample(test, 2, seed=0) == chosen[:2]
    for path in test.rglob("*.png"):
        if path not in chosen:
            path.unlink()
    assert explain.sample(test, 4, seed=0) == chosen
    assert {explain.sample(test, 1, seed=s)[0].name for s in range(8)} != {chosen[0].name}


@pytest.mark.parametrize(
    ("dataset", "folder", "label", "same"),
    [
        ("breastmnist", "normal_or_benign", "normal, benign", True),
        ("breastmnist", "malignant", "normal, benign", False),
        ("dermamnist", "actinic_keratoses", "actinic keratoses and intraepithelial carcinoma", True),
        ("bloodmnist", "immature_granulocyte", "immature granulocyte", True),
        ("cells", "blue_ones", "blue ones", True),
        ("cells", "blue", "red", False),
    ],
)
def test_folders_are_known_by_any_name_of_their_class(bench, dataset, folder, label, same):
    import explain_workers

    assert explain_workers.same_class(dataset, folder, label) == same


@pytest.mark.slow
def test_a_run_goes_on_and_writes_the_tables(bench, folder, monkeypatch, capsys):
    explain, report = bench
    explain.run(options(folder))
    first = json.loads((folder / "out/cells.json").read_text())
    assert [report.count(first, check) for check in report.SIGN] == [2, 1, 1]
    assert len(first["seconds"]) == 1
    explain.run(options(folder, images=3))
    result = json.loads((folder / "out/cells.json").read_text())
    assert [report.count(result, check) for check in report.SIGN] == [3, 1, 1]
    assert result["seconds"] == first["seconds"]
    assert all(result["images"][key] == record for key, record in first["images"].items())  # not measured again
    edges = [record["methods"]["edges (control)"] for record in result["images"].values()]
    assert [row["passed"] for row in edges if "passed" in row] == [False]

    page = folder / "explain.md"
    page.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    monkeypatch.setattr(report, "DOCS", page)
    monkeypatch.setattr(report, "MEASURED", folder / "measured.json")
    report.write([result])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    row = next(line for line in text.splitlines() if line.startswith("| saliency | ") and "(" in line)
    gains = sorted(record["methods"]["saliency"]["deletion_gain"] for record in result["images"].values())
    assert f"| {gains[1]:+.2f} (" in row
    assert "deletion, n = 3" in text and "random weights, n = 1" in text
    assert "| edges (control) | 1.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) |" in text
    with pytest.raises(SystemExit, match="other settings"):
        explain.run(options(folder, seed=1))


@pytest.mark.slow
def test_a_run_ends_at_its_deadline_with_what_it_has(bench, folder):
    explain, report = bench
    explain.run(options(folder, images=2, timed_images=0, deadline=1e-6))
    out = folder / "out/cells.json"
    assert not out.exists() or report.count(json.loads(out.read_text()), "faithfulness") == 0


@pytest.mark.slow
def test_a_broken_image_is_said_and_does_not_end_the_run(bench, folder, capfd):
    explain, report = bench
    explain.sample(folder / "data/cells/test", 1, 0)[0].write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(SystemExit, match="tasks failed"):
        explain.run(options(folder, timed_images=0, sensitivity_images=0, randomisation_images=0))
    assert "cells blue/" in capfd.readouterr().out
    assert report.count(json.loads((folder / "out/cells.json").read_text()), "faithfulness") == 1
