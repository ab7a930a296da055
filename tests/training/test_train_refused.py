"""Data, devices and settings that cannot be trained on, and the command `medmamba train`."""

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import COMMON, QUICK, make_folder

import medmamba
from medmamba import MedMamba
from medmamba.config import variant_config
from medmamba.data import DatasetError, LeakageError
from medmamba.training import (
    Recipe,
    train,
)
from medmamba.training.optim import build_optimizer
from medmamba.training.trainer import Trainer


def test_bad_data_is_refused_with_a_way_out(tmp_path):
    plain = tmp_path / "plain"
    for label in ("a", "b"):
        (plain / label).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng([ord(label), i]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(plain / label / f"{i}.png")
    with pytest.raises(DatasetError, match="no images in train and val"):
        train(plain, tmp_path / "x", "default", "test", **QUICK, **COMMON)
    with pytest.raises(DatasetError, match="dataset=NAME"):
        train(plain, tmp_path / "x", "default", "test", split="published", **QUICK, **COMMON)
    made = train(plain, tmp_path / "y", "default", "test", split=(0.6, 0.2, 0.2), **{**QUICK, "epochs": 1}, **COMMON)
    assert made.finished and "make_splits" in made.load().config.training["split"]
    one = make_folder(tmp_path / "one", counts=(4, 2, 2), classes=1)
    with pytest.raises(DatasetError, match="one class"):
        train(one, tmp_path / "x", "default", "test", **QUICK, **COMMON)
    empty = make_folder(tmp_path / "empty", counts=(4, 2, 2), classes=2)
    for file in (empty / "train" / "class_1").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match="no training images of class_1"):
        train(empty, tmp_path / "x", "default", "test", **QUICK, **COMMON)
    with pytest.raises(DatasetError):
        train(tmp_path / "nowhere", tmp_path / "x", "default", "test", **QUICK, **COMMON)


def test_leaking_splits_are_refused_unless_allowed(tmp_path):
    data = make_folder(tmp_path / "data", counts=(6, 3, 3), classes=2)
    twin = next((data / "train" / "class_0").iterdir())
    (data / "test" / "class_0" / "twin.png").write_bytes(twin.read_bytes())
    with pytest.raises(LeakageError, match=r"twin\.png"):
        train(data, tmp_path / "out", "default", "test", **QUICK, **COMMON)
    assert not (tmp_path / "out").exists()
    options = {**QUICK, "epochs": 1, "batch_size": 4}
    assert train(data, tmp_path / "out", "default", "test", allow_leakage=("duplicates",), **options, **COMMON).finished


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(folder, tmp_path, monkeypatch):
    def fails(self):
        raise MemoryError("no space for the first batch")

    monkeypatch.setattr(Trainer, "fit", fails)
    with pytest.raises(MemoryError):
        train(folder, tmp_path / "out", "default", "test", **QUICK, **COMMON)
    assert not (tmp_path / "out").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("of the user")
    with pytest.raises(MemoryError):
        train(folder, tmp_path / "own", "default", "test", **QUICK, **COMMON)
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["notes.txt"]


def test_wrong_devices_and_precisions_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        train(folder, tmp_path, "default", "test", **QUICK, **{**COMMON, "device": "cuda:1"})
    with pytest.raises(ValueError, match="precision must be"):
        train(folder, tmp_path, "default", "test", precision="int8", **QUICK, **COMMON)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="doctor"):
            train(folder, tmp_path, "default", "test", **QUICK, **{**COMMON, "device": "cuda"})


def test_command_line(folder, tmp_path, capsys):
    import argparse

    from medmamba.cli import train as cli_train

    parser = argparse.ArgumentParser()
    cli_train.add_parser(parser.add_subparsers(required=True))
    command = f"train --data {folder} --out {tmp_path} --variant test --size 32 --epochs 1 --batch-size 8 --quiet "
    command += "--device cpu --set warmup_epochs=0 augment.hflip=0"
    args = parser.parse_args([*command.split(), "--max-seconds", "0"])
    assert args.run(args) == cli_train.STOPPED
    args = parser.parse_args(command.split())
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "rerun the same command" in out and "test: accuracy" in out
    assert MedMamba.from_pretrained(tmp_path).config.training["settings"]["augment"]["hflip"] == 0


def test_the_optimiser_is_the_one_asked_for(tiny_model):
    for name, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        assert type(build_optimizer(tiny_model, Recipe(optimizer=name))) is kind


def test_train_is_at_hand():
    assert medmamba.train is train
    assert variant_config("test").preprocess.input_size == (32, 32)
