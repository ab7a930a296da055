"""The commands that train the models of hub/models, on small images made here."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hub import job_queue, teacher, zoo, zoo_data
from hub.job_queue import Job, Queue
from medmamba import MedMamba
from medmamba.config import variant_config
from medmamba.data import DatasetError, LeakageError, registry
from medmamba.imaging.preprocess import normalise
from medmamba.pretrained import bundled_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All datasets with their classes: three images each in train, one in val and in test."""
    folder = tmp_path_factory.mktemp("zoo")
    rng = np.random.default_rng(0)
    for name in zoo_data.DATASETS:
        for title in registry.get(name).id2label.values():
            for split, count in (("train", 3), ("val", 1), ("test", 1)):
                place = folder / name / split / title
                place.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
                    Image.fromarray(pixels).save(place / f"{split}{i}_{title.replace(' ', '')}.png")
    return folder


def run(*words):
    return zoo.main([str(word) for word in words])


def small(root, out):
    settings = ("epochs=1", "final_epochs=0", "size=32", "batch_size=4", "eval_size=32")
    return "--data", root, "--out", out, "--variant", "test", "--device", "cpu", "--quiet", "--set", *settings


def test_the_joint_model_sees_no_test_images_and_nothing_non_commercial(root):
    joint = zoo_data.open_joint(root)
    assert {record.split for record in joint.records} == {"train", "val"}
    commercial = {name for name in zoo_data.DATASETS if not registry.get(name).licence.non_commercial}
    assert {record.source.split("/")[0] for record in joint.records} == set(zoo_data.JOINT) <= commercial
    known = [(name, title) for name in zoo_data.JOINT for title in registry.get(name).id2label.values()]
    assert len(joint.classes) == len(known)
    for record in joint.records:  # labels still say what the folder says
        dataset, _, title, _ = record.source.split("/")
        assert known[record.label] == (dataset, title)


@pytest.mark.slow
def test_from_the_joint_model_to_one_dataset(root, tmp_path):
    joint, out = tmp_path / "joint", tmp_path / "derma"
    assert run("pretrain", *small(root, joint)) == 0
    assert run("train", "dermamnist", "--init", joint, *small(root, out)) == 0
    record = json.loads((out / "results.json").read_text())["training"]
    assert record["pretraining"] == list(zoo_data.JOINT) and record["init"] == "zoo-joint, seed 0"
    assert "duplicates_checked" not in record and "allowed_leakage" not in record


def test_duplicates_across_splits_are_refused(root, tmp_path):
    copy = next((root / "dermamnist" / "train").rglob("*.png"))
    duplicate = root / "dermamnist" / "test" / copy.parent.name / "duplicate_x.png"
    duplicate.write_bytes(copy.read_bytes())
    try:
        with pytest.raises(LeakageError):
            run("train", "dermamnist", *small(root, tmp_path / "run"))
        with pytest.raises(LeakageError):
            run("decode", "dermamnist", "--size", 32, "--data", root, "--cache", tmp_path)
    finally:
        duplicate.unlink()


@pytest.mark.slow
def test_decoded_images_are_found_by_the_others(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert run("decode", "dermamnist", "--size", 32, "--data", root, "--cache", cache, "--processes", 2) == 0

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("medmamba.data.cache.fill", refuse)
    out = tmp_path / "run"
    assert run("train", "dermamnist", "--cache", cache, *small(root, out)) == 0
    assert json.loads((out / "results.json").read_text())["training"]["duplicates_checked"] == "by hub.zoo decode"


@pytest.mark.slow
def test_medmamba_is_a_baseline_too(root, tmp_path):
    assert run("baseline", "dermamnist", *small(root, tmp_path)) == 0
    record = json.loads((tmp_path / "results.json").read_text())["training"]
    assert (record["recipe"], record["identity"]["model"]) == ("paper-medmnist", "test") and not record.get("init")


def test_a_baseline_is_trained_once_and_refuses_other_settings(root, tmp_path, timm):
    out = tmp_path / "run"
    words = [word for word in small(root, out) if word not in ("--variant", "test")]
    assert run("baseline", "dermamnist", "--model", "test_resnet", *words) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["splits"]) == {"val", "test"} and results["calibration"]
    assert results["training"]["identity"]["model"] == "timm test_resnet"
    assert not list(out.rglob("*.safetensors")) and run("baseline", "dermamnist", "--model", "test_resnet", *words) == 0
    with pytest.raises(FileExistsError, match=r"seed \(was 0, now 1\)"):
        run("baseline", "dermamnist", "--model", "test_resnet", "--seed", 1, *words)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(DatasetError):
        run("train", "breastmnist", *small(tmp_path, tmp_path / "out"))


def everything(root, out, *words):
    tiny = ("--variant", "test", "--small", "test", "--device", "cpu", "--size", 32, 32, "--processes", 2, "--seeds", 1)
    settings = ("epochs=1", "final_epochs=0", "size=32", "batch_size=4", "eval_size=32")
    return run("all", "--data", root, "--out", out, *tiny, *words, "--set", *settings)


@pytest.mark.slow
def test_all_trains_what_is_asked_for_and_what_that_needs(root, tmp_path, capfd):
    only = ("--only", "dermamnist-0", "nano-bloodmnist-0")
    assert everything(root, tmp_path, *only) == 0
    lines = [line.split("] ")[1].split(":")[0] for line in capfd.readouterr().out.splitlines() if "finished" in line]
    assert sorted(lines) == sorted(
        ["decode-joint", "decode-dermamnist", "decode-bloodmnist"] + ["joint", "dermamnist-0", "nano-bloodmnist-0"]
    )
    assert lines.index("joint") < lines.index("dermamnist-0")
    inits = {"dermamnist-0": "zoo-joint, seed 0", "nano-bloodmnist-0": ""}
    for name, init in inits.items():
        assert (json.loads((tmp_path / name / "results.json").read_text())["training"].get("init") or "") == init
    assert everything(root, tmp_path, *only) == 0
    assert capfd.readouterr().out == "", "it ran something again"
    with pytest.raises(SystemExit, match="no run dermamnist-7"):
        everything(root, tmp_path, "--only", "dermamnist-7")


def test_all_names_every_dataset_seed_and_baseline(root, tmp_path):
    args = zoo._parser().parse_args(["all", "--data", str(root), "--out", str(tmp_path), "--seeds", "2"])
    jobs = {job.name: job for job in zoo.all_jobs(args)}
    for name in zoo_data.DATASETS:
        assert {f"{name}-0", f"{name}-1", f"{name}-paper-0", f"{name}-resnet50-0", f"decode-{name}"} <= set(jobs)
        start = () if name in zoo.FROM_BACKBONE else ("joint",)
        assert jobs[f"{name}-1"].after == (*start, f"decode-{name}")
    assert zoo.SMALL_RECIPE in jobs["nano-bloodmnist-1"].words and "--init" not in jobs["nano-bloodmnist-1"].words
    assert "breastmnist-paper-1" in jobs and "bloodmnist-paper-1" not in jobs
    names = list(jobs)
    assert all(names.index(need) < names.index(job.name) for job in jobs.values() for need in job.after)
    for job in jobs.values():  # each is a command that parses
        assert job.words[:2] == ("-m", "hub.zoo") and zoo._parser().parse_args(job.words[2:])


def script(path, code, **options):
    """A job that writes its result last."""
    words = ("-c", f"import os, pathlib, time, signal, sys\n{code}\npathlib.Path({str(path)!r}).touch()")
    return Job(path.name, words, path, **options)


def test_a_queue_keeps_order_places_and_devices(tmp_path):

    def note(i: int) -> str:
        """Code that notes its device and waits for its neighbour, so that two run at a time on any machine."""
        start, neighbour = (str(tmp_path / f"started{n}") for n in (i, i ^ 1))
        return (
            f"open({str(tmp_path / 'devices')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
            f"pathlib.Path({start!r}).touch()\nwhile not os.path.exists({neighbour!r}): time.sleep(0.01)"
        )

    jobs = [script(tmp_path / f"job{i}", note(i)) for i in range(4)]
    last = script(
        tmp_path / "last",
        f"assert all(os.path.exists({str(tmp_path / 'job')!r} + str(i)) for i in range(4))",
        after=tuple(job.name for job in jobs),
        gpu=False,
    )
    queue = Queue([last, *jobs], ["0", "1"], 1, tmp_path / "logs")
    started, most = [], 0
    say = queue._say

    def watch(text):
        nonlocal most
        started.append(text) if "started" in text else None
        most = max(most, len(queue.running))
        say(text)

    queue._say = watch
    assert queue.run() == 0
    assert sorted((tmp_path / "devices").read_text()) == ["0", "0", "1", "1"] and most == 2
    assert started[0].startswith("job0") and started[-1].startswith("last")


def test_a_queue_goes_on_without_what_failed(tmp_path, capfd):
    bad = script(tmp_path / "bad", "raise SystemExit('no such folder')")
    jobs = [bad, script(tmp_path / "needs", "", after=("bad",)), script(tmp_path / "free", "")]
    assert Queue(jobs, [""], 1, tmp_path / "logs").run() == 1
    printed = capfd.readouterr().out
    assert "bad: failed with exit code 1" in printed and "no such folder" in printed
    assert "needs: not run" in printed and (tmp_path / "free").exists() and not (tmp_path / "needs").exists()


def test_a_queue_that_is_stopped_goes_on(tmp_path, monkeypatch):
    """The job counts its starts; told to stop the first time, it ends with the code of a run to be continued."""
    count = tmp_path / "count"
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
first = not os.path.exists({str(count)!r})
open({str(count)!r}, 'a').write('x')
time.sleep(600 if first else 0)"""
    jobs = [script(tmp_path / "long", code), script(tmp_path / "next", "", after=("long",))]
    # The clock of the queue passes its limit once the job has started, however long that takes.
    clock = SimpleNamespace(
        monotonic=lambda: 100.0 if count.exists() and count.read_text() else 0.0, sleep=job_queue.time.sleep
    )
    monkeypatch.setattr(job_queue, "time", clock)
    assert Queue(jobs, [""], 1, tmp_path / "logs", seconds=50).run() == 3
    monkeypatch.undo()
    assert not (tmp_path / "long").exists()
    assert Queue(jobs, [""], 1, tmp_path / "logs").run() == 0
    assert count.read_text() == "xx" and (tmp_path / "next").exists()


def test_a_larger_medmamba_teaches_at_its_own_size_beside_others(tmp_path):
    labels = {0: "a", 1: "b"}
    preprocess = {"input_size": (64, 64), "mean": (0.2, 0.3, 0.4)}
    model = MedMamba(variant_config("test", num_classes=2, id2label=labels, preprocess=preprocess)).eval()
    model.save_pretrained(tmp_path / "large")
    taught = teacher.load_teachers([tmp_path / "large", tmp_path / "large"], ["a", "b"]).eval()
    images = torch.rand(2, 3, 32, 32)
    enlarged = F.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model(normalise(enlarged, model.config.preprocess)).softmax(-1)
        assert torch.allclose(taught(images), expected, atol=1e-6)
    assert teacher.described([tmp_path / "large"]) == "TEACHER/large"  # no such model on the Hub
    assert teacher.described([bundled_models()["medmamba/bloodmnist-nano"]]) == "medmamba/bloodmnist-nano"
    assert teacher.described(["somebody/cells.v2"]) == "somebody/cells.v2"
    with pytest.raises(ValueError, match="knows a, b, not b, a"):
        teacher.load_teachers([tmp_path / "large"], ["b", "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"hub\.zoo baseline"):
        teacher.load_teachers([tmp_path / "empty"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one teacher"):
        teacher.load_teachers([], ["a", "b"])
