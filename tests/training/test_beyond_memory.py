"""Training from disk: the same numbers as from memory, whatever is interrupted, and memory that stays bounded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_files import write_hf, write_shards

import medmamba
from medmamba.config import PreprocessConfig
from medmamba.data import DatasetError, cache_images, open_dataset
from medmamba.data.prefetch import AHEAD
from medmamba.data.streaming import DecodedAnew, StoredImages, StreamedDataset
from medmamba.imaging.load import ImageError
from medmamba.training import train

RUN = dict(epochs=2, batch_size=8, size=32, lr=3e-3, warmup_epochs=0, ema=0.9)
COMMON = dict(device="cpu", progress=False, half=False, checkpoint_seconds=0.0)
ROOT = Path(medmamba.__file__).parents[1]
SCRIPT = """
import sys
from medmamba.training import train
train(sys.argv[1], sys.argv[2], "default", "test", **eval(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Noisy squares of 40 pixels in three splits, whose brightness is the class."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6), ("test", 6)):
        for label in range(3):
            place = root / split / f"class_{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(60 + 70 * label, 30, (40, 40, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(place / f"{label}_{i}.png")
    return root


@pytest.fixture(scope="module")
def in_memory(folder, tmp_path_factory):
    return train(folder, tmp_path_factory.mktemp("memory"), "default", "test", keep="memory", **RUN, **COMMON)


def curve(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


def assert_same(one, other) -> None:
    assert curve(one.history) == curve(other.history)
    weights, expected = load_file(one.out / "model.safetensors"), load_file(other.out / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)
    assert one.test.overall == other.test.overall


@pytest.mark.slow
def test_images_on_disk_train_the_very_same_weights(folder, in_memory, tmp_path):
    options = dict(keep="disk", cache=tmp_path / "cache", **RUN, **COMMON)
    assert_same(train(folder, tmp_path / "out", "default", "test", **options), in_memory)


@pytest.mark.slow
def test_shards_train_the_very_same_weights(folder, in_memory, tmp_path):
    shards = write_shards(open_dataset(folder), tmp_path / "shards")
    options = dict(keep="nowhere", workers=2, **RUN, **COMMON)
    assert_same(train(shards, tmp_path / "out", "default", "test", **options), in_memory)


@pytest.mark.slow
def test_hugging_face_datasets_train_the_very_same_weights(folder, in_memory, tmp_path):
    pytest.importorskip("datasets")
    saved = write_hf(open_dataset(folder), tmp_path / "saved")
    assert_same(train(saved, tmp_path / "out", "default", "test", keep="nowhere", **RUN, **COMMON), in_memory)


@pytest.mark.slow
def test_stopped_at_every_step_and_resumed_gives_the_same_weights(folder, in_memory, tmp_path):
    calls, found = 0, None
    options = dict(cache=tmp_path / "cache", keep="disk", **RUN, **COMMON)
    while found is None or not found.finished:
        found = train(folder, tmp_path / "out", "default", "test", max_seconds=0.0, **options)
        calls += 1
    assert calls >= 12
    assert_same(found, in_memory)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(folder, tmp_path):
    """SIGKILL in the middle of an epoch, while worker processes decode."""
    shards = write_shards(open_dataset(folder), tmp_path / "shards")
    settings = {**COMMON, **RUN, "epochs": 5}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(data: Path, out: Path, **more) -> list[str]:
        return [sys.executable, "-c", SCRIPT, str(data), str(out), repr({**settings, **more})]

    subprocess.run(command(folder, tmp_path / "whole"), env=environment, check=True, timeout=200)
    killed = command(shards, tmp_path / "killed", keep="nowhere", workers=2)
    history = tmp_path / "killed" / "history.csv"
    process = subprocess.Popen(killed, env=environment)
    limit = time.monotonic() + 120
    while not (history.is_file() and len(history.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(killed, env=environment, check=True, timeout=200)
    lines = [(tmp_path / run / "history.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    one, two = ([json.loads(line) for line in part] for part in lines)
    assert curve(one) == curve(two)
    weights, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_from_disk_train_as_two_from_memory(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    histories = []
    for place in ("memory", "disk"):
        options = {**COMMON, **RUN, "keep": place, "cache": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(script), str(folder), str(tmp_path / place), repr(options)]
        subprocess.run(command, env=environment, check=True, timeout=200)
        lines = (tmp_path / place / "history.jsonl").read_text().splitlines()
        histories.append(curve([json.loads(line) for line in lines]))
    assert histories[0] == histories[1]
    weights, expected = (load_file(tmp_path / place / "model.safetensors") for place in ("disk", "memory"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_auto_takes_the_first_place_that_has_the_space(folder, tmp_path, monkeypatch, capsys):
    from medmamba.training import setup

    monkeypatch.setattr(setup, "free_memory", lambda: 100_000)  # of which 48 images of 32 pixels take more than half
    stop = dict(max_seconds=0.0, **RUN, **COMMON)
    train(folder, tmp_path / "a", "default", "test", cache=tmp_path / "cache", **stop)
    assert "train: 48 images of 32 pixels (0.0 GB decoded) are read from disk" in capsys.readouterr().err
    train(folder, tmp_path / "b", "default", "test", workers=0, **stop)
    assert "decoded anew in every epoch" in capsys.readouterr().err
    monkeypatch.setattr(setup, "free_disk", lambda folder: 1000)
    train(folder, tmp_path / "c", "default", "test", cache=tmp_path / "none", workers=0, **stop)
    assert "decoded anew in every epoch" in capsys.readouterr().err and not list((tmp_path / "none").glob("*.npy"))
    with pytest.raises(DatasetError, match="--cache"):
        train(folder, tmp_path / "d", "default", "test", keep="disk", **stop)


def test_leakage_is_searched_for_once_per_set(folder, tmp_path, monkeypatch):
    stop = dict(cache=tmp_path / "cache", max_seconds=0.0, **RUN, **COMMON)
    train(folder, tmp_path / "a", "default", "test", **stop)

    def search(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("medmamba.training.run.check_leakage", search)
    train(folder, tmp_path / "b", "default", "test", **stop)
    with pytest.raises(AssertionError, match="searched again"):  # another split is another question
        train(open_dataset(folder).with_splits(["train", "val"] * 42), tmp_path / "c", "default", "test", **stop)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_of_memory(bits, workers, tmp_path):
    rng = np.random.default_rng(1)
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            if bits == 8:
                picture = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
            else:
                picture = Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
            picture.save(tmp_path / "data" / label / f"{i}.png")
    dataset, config = open_dataset(tmp_path / "data"), PreprocessConfig(input_size=(32, 32))
    file = tmp_path / "images.npy"
    cached = cache_images(dataset, config, file=file)
    order = torch.from_numpy(rng.permutation(16))
    sources = [StoredImages(file), DecodedAnew(dataset, config, 3, workers)]
    for source in sources:
        streamed = StreamedDataset(source, dataset, config.mean, config.std)
        assert streamed.size == (32, 32) and len(streamed) == 16
        for part, (images, labels) in zip(order.split(3), streamed.batches(order.split(3)), strict=True):
            expected = cached.batch(part)
            assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
        assert torch.equal(streamed.batch([5, 2])[0], cached.batch([5, 2])[0])


def test_no_more_is_read_than_a_few_batches_ahead(tmp_path):
    pixels = np.zeros((400, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    asked = []

    def parts():
        for row in range(400):
            asked.append(row)
            yield [row]

    feed = StoredImages(tmp_path / "images.npy").batches(parts(), False)
    for count in range(1, 6):
        next(feed)
        assert len(asked) <= count + AHEAD
    feed.close()


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path):
    dataset = open_dataset(folder)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    records = list(dataset.records[:4])
    records[2] = type(records[2])(str(bad), 0, "train")
    source = DecodedAnew(dataset.with_records(records), PreprocessConfig(input_size=(32, 32)), 3, workers=2)
    with pytest.raises(ImageError, match=r"bad\.png"):
        list(source.batches([[0, 1], [2, 3]], False))
