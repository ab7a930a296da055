"""The command line, run as a user runs it."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medmamba
from medmamba.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_dir(tiny_model, tmp_path):
    tiny_model.config.id2label = {0: "benign", 1: "malignant", 2: "normal"}
    return str(tiny_model.save_pretrained(tmp_path / "model"))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "deep/c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_predict_a_folder(model_dir, images, capsys):
    assert main(["predict", str(images), "--model", model_dir, "--device", "cpu", "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0].split("/")[-1] for line in lines] == ["a.png", "b.jpg", "c.png"]
    assert all(len(re.findall(r"\d+\.\d%", line)) == 2 for line in lines)


def test_predict_json(model_dir, images, capsys):
    assert main(["predict", str(images / "*.png"), "--model", model_dir, "--json", "--device", "cpu"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["source"].endswith("a.png") and row["label"] in ("benign", "malignant", "normal")
    assert sum(p for _, p in row["top"]) == pytest.approx(1, abs=1e-5)


def test_predict_csv_goes_past_bad_files(model_dir, images, capsys):
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert main(["predict", str(images), "--model", model_dir, "--csv", "--batch-size", "2", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert [r["source"].split("/")[-1] for r in rows] == ["a.png", "b.jpg", "broken.png", "c.png"]
    assert [bool(r["error"]) for r in rows] == [False, False, True, False]
    for row in rows:
        if not row["error"]:
            scores = {c: float(row[c]) for c in ("benign", "malignant", "normal")}
            assert row["label"] == max(scores, key=scores.get)
    assert "1 of 4 images could not be read" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.png"], "absent.png"),
        (["predict", "{image}", "--model", "medmamba/no-such-model-anywhere"], "create_model|Models that come with"),
        (["predict", "{image}", "--device", "cuda:99"], "cannot use device 'cuda:99'"),
        (["predict", "{image}", "--model", "{model}", "--top-k", "0"], "top_k must be at least 1"),
    ],
)
def test_errors_are_one_line_with_a_way_out(arguments, message, model_dir, images, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [a.format(image=images / "a.png", model=model_dir) for a in arguments]
    if "--model" not in arguments:
        arguments += ["--model", model_dir]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_doctor_names_backends_and_what_is_used(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for backend in medmamba.available_backends():
        assert f"scan backend {backend}" in out
    assert re.search(r"scan on cpu +(native|torch)", out)


def test_installed_command():
    result = subprocess.run([sys.executable, "-m", "medmamba", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"medmamba {medmamba.__version__}"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"]])
def test_version_and_help_import_no_torch(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['medmamba', *{arguments!r}]\n"
        "try: runpy.run_module('medmamba', run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-4:] == ["exit", "0", "False", "False"]


def test_waiting_threads_sleep():
    """Which they must be told before PyTorch is loaded."""
    command = "import medmamba.__main__ as m\ntry: m.main(['--version'])\nexcept SystemExit: pass"
    for lines in (command, "import hub"):
        code = f"{lines}\nimport os, sys; print('\\n', os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
        clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
        assert found.stdout.split()[-2:] == ["passive", "False"], found.stderr


def test_the_command_that_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["medmamba", "--version"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith("medmamba ")
