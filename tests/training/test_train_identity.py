"""Identity of runs by content, locking of the output folder, and state of the caller left unchanged."""

import dataclasses
import json
import math
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medmamba import MedMamba, create_model
from medmamba.config import variant_config
from medmamba.data import ImageDataset, Record, open_dataset
from medmamba.evaluation import predict_logits
from medmamba.imaging.load import load_image
from medmamba.imaging.preprocess import preprocess
from medmamba.training import ResumeError, TrainingError, load_recipe, sampling, train, trainer
from medmamba.training import augment as A
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.identity import data_table, fingerprint, model_fingerprint
from medmamba.training.run_log import RunLog
from medmamba.training.setup import ImageCache
from medmamba.training.trainer import Trainer
from medmamba.utils.devices import make_accelerator, owning
from medmamba.utils.files import LockedError, locked

QUICK = dict(epochs=1, batch_size=6, size=32, lr=3e-3, warmup_epochs=0)
COMMON = dict(device="cpu", progress=False, half=False, checkpoint_seconds=0.0, check_duplicates=False)


def make_folder(root: Path, seed: int = 0, largest: int = 255, count: int = 6) -> Path:
    rng = np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for label in range(2):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count if split == "train" else 3):
                pixels = rng.uniform(0.4 * label, 0.4 * label + 0.6, (32, 32)) * largest
                Image.fromarray(pixels.astype(np.uint8 if largest < 256 else np.uint16)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


def run(data, out, **options):
    return train(data, out, "default", "test", **{**QUICK, **COMMON, **options})


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- contents decide ---


@pytest.mark.slow
def test_a_cache_of_other_pictures_trains_nobody(folder, tmp_path):
    other = make_folder(tmp_path / "other", seed=1)
    run(folder, tmp_path / "1", cache=tmp_path / "cache")
    with pytest.warns(UserWarning, match="decoded again"):
        run(other, tmp_path / "2", cache=tmp_path / "cache")
    run(other, tmp_path / "3")
    assert same(weights(tmp_path / "2"), weights(tmp_path / "3"))
    assert not same(weights(tmp_path / "1"), weights(tmp_path / "2"))


def test_a_run_whose_images_changed_is_not_continued_and_says_which(tmp_path):
    data = make_folder(tmp_path / "data")
    out = tmp_path / "out"
    assert not run(data, out, max_seconds=0.0).finished
    file = data / "train" / "class_1" / "2.png"
    content = file.read_bytes()
    shutil.copyfile(data / "train" / "class_0" / "1.png", file)
    with pytest.raises(ResumeError, match=r"another data \(1 of 24 images with other content.*train/class_1/2\.png"):
        run(data, out, max_seconds=0.0)
    file.rename(data / "train" / "class_0" / "2b.png")
    with pytest.raises(
        ResumeError, match=r"1 of 24 images added, such as .*2b\.png, 1 of 24 images missing.* restore that"
    ):
        run(data, out, max_seconds=0.0)
    (data / "train" / "class_0" / "2b.png").unlink()
    file.write_bytes(content)
    assert run(data, out).finished  # put back as it was


def test_a_finished_run_is_known_by_its_images(tmp_path):
    data = make_folder(tmp_path / "data")
    out = tmp_path / "out"
    first = run(data, out)
    assert run(data, out).test == first.test
    shutil.copytree(data, tmp_path / "copy")
    assert run(tmp_path / "copy", out).test == first.test  # the same images elsewhere
    shutil.copyfile(data / "val" / "class_0" / "0.png", data / "val" / "class_0" / "1.png")
    with pytest.raises(FileExistsError, match=r"another data.*--restart"):
        run(data, out)
    for options, word in (({"half": True}, "stored weights"), ({"accumulate": 2}, "division of a batch")):
        with pytest.raises(FileExistsError, match=word):
            run(tmp_path / "copy", out, **options)
    (out / "results.json").write_text("{")
    with pytest.raises(FileExistsError, match=r"results\.json does not record"):
        run(tmp_path / "copy", out)


@pytest.mark.slow
def test_a_model_to_start_from_is_known_by_its_weights(folder, tmp_path):
    torch.manual_seed(0)
    one, two = (create_model("test", num_classes=3) for _ in range(2))
    out = tmp_path / "out"
    first = run(folder, out, init=one)
    assert run(folder, out, init=one).test == first.test
    assert run(folder, out, init=one.save_pretrained(tmp_path / "saved")).test == first.test  # the same, from a folder
    with pytest.raises(FileExistsError, match="another model to start from"):
        run(folder, out, init=two)
    two.save_pretrained(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="another model to start from"):
        run(folder, out, init=tmp_path / "saved")
    assert model_fingerprint(one) != model_fingerprint(two)
    state = model_fingerprint(two)
    with torch.no_grad():
        two.stages[0].blocks[0].conv[0].running_mean.add_(1e-3)
    assert model_fingerprint(two) != state


def test_labels_splits_patients_and_order_are_part_of_the_data(folder):
    index = open_dataset(folder)
    first = index.records[0]
    changed = {
        "label": dataclasses.replace(first, label=1 - first.label),
        "split": dataclasses.replace(first, split="val"),
        "patient": dataclasses.replace(first, patient="p1"),
    }
    variants = [index.with_records([record, *index.records[1:]]) for record in changed.values()]
    variants += [index.with_records(index.records[::-1]), index.subset(range(5))]
    variants += [ImageDataset(index.records, ["class_1", "class_0"], index.reader)]
    found = [fingerprint(variant) for variant in [index, *variants]]
    assert len(set(found)) == len(found)
    assert fingerprint(index, data_table(index)) == found[0]


# --- one run a folder ---


def test_two_runs_into_one_folder(folder, tmp_path):
    """The second is rejected while the first runs; a lock file left by a killed run does not block."""
    lock = tmp_path / "checkpoint" / "run.lock"
    with locked(lock, "x"), pytest.raises(LockedError, match=rf"is being trained by .*process {os.getpid()} .*--out"):
        run(folder, tmp_path)
    lock.write_text("12345 elsewhere")
    assert run(folder, tmp_path).finished and not lock.parent.exists()


def test_a_second_run_that_comes_while_one_goes_on(folder, tmp_path, monkeypatch):
    """In another thread, while the first is running."""
    errors, fit = [], Trainer.fit

    def fit_and_try(self):
        def second():
            try:
                run(folder, tmp_path)
            except BaseException as error:
                errors.append(error)

        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", fit_and_try)
    assert run(folder, tmp_path).finished
    assert [type(error) for error in errors] == [LockedError]


def test_the_weights_are_put_in_place_last(folder, tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (moved.append(Path(b)), replace(a, b)))
    run(folder, tmp_path)
    names = [path.name for path in moved if path.parent == tmp_path]
    assert names[-2:] == ["config.json", "model.safetensors"] and "unusual.json" in names[:-2]
    assert "results.json" in names[:-2]
    monkeypatch.undo()
    assert MedMamba.from_pretrained(tmp_path).unusual is not None


# --- what the caller has stays as it is ---


def test_the_accelerator_of_the_caller_keeps_its_state(folder, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kinds = (AcceleratorState, GradientState, PartialState)
    kept = [kind._shared_state for kind in kinds]
    try:
        for kind in kinds:
            kind._shared_state = {}
        run(folder, tmp_path / "before", precision="fp32")
        assert not any(kind._shared_state for kind in kinds)  # there is none, so none was made
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
        mine.gradient_state._set_sync_gradients(False)
        before = dict(AcceleratorState._shared_state)
        own = make_accelerator("cpu", "fp32")
        assert (own.mixed_precision, own.gradient_accumulation_steps) == ("no", 1)
        with owning(own):
            assert AcceleratorState().mixed_precision == "no" and GradientState().sync_gradients
        run(folder, tmp_path / "after", precision="fp32")
        assert mine.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert mine.gradient_accumulation_steps == 4 and not mine.sync_gradients
        assert AcceleratorState._shared_state == before
        with mine.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    finally:
        for kind, state in zip(kinds, kept, strict=True):
            kind._shared_state = state
    assert same(weights(tmp_path / "before"), weights(tmp_path / "after"))


def test_validation_changes_nothing_in_the_model(folder, tiny_model):
    accelerator = make_accelerator("cpu", "fp32")
    model = tiny_model.train()
    model.stages[0].eval()
    model.head.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    data = ImageCache(open_dataset(folder), model.config, accelerator)("val", 32)
    found = predict_logits(model, data, 4, accelerator)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not model.head.weight.requires_grad and model.head.bias.requires_grad
    assert torch.equal(found, predict_logits(model.eval(), data, 4, accelerator))


# --- what is no number ---


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_never_kept(folder, tmp_path, monkeypatch):
    """The loss reflects the weights before the step, so the step itself can break those about to be saved."""
    run(folder, tmp_path, max_seconds=0.0, epochs=3)
    good = (tmp_path / "checkpoint" / "last.pt").read_bytes()
    step = Trainer._step

    def spoil(self, *arguments):
        loss = step(self, *arguments)
        with torch.no_grad():
            self.model.head.bias[0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "_step", spoil)
    with pytest.raises(TrainingError, match=r"weights are NaN or infinite in epoch 1.*diverged.* good checkpoint"):
        run(folder, tmp_path, epochs=3)
    assert (tmp_path / "checkpoint" / "last.pt").read_bytes() == good
    monkeypatch.undo()
    assert run(folder, tmp_path, epochs=3).finished


def test_logits_that_are_no_numbers_end_a_run(folder, tmp_path, monkeypatch):
    from medmamba.training import validation

    monkeypatch.setattr(validation, "predict_logits", lambda *a, **k: torch.full((6, 2), math.inf))
    with pytest.raises(TrainingError, match="logits of 6 of 6 validation images"):
        run(folder, tmp_path)


def test_the_history_is_json_whatever_the_scores(folder, tmp_path, monkeypatch):
    scores = {"loss": math.inf, "accuracy": 0.5, "balanced_accuracy": 0.5, "auroc": math.nan, "f1": -math.inf}
    monkeypatch.setattr(trainer, "validate", lambda *a: scores)
    run(folder, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    row = json.loads((tmp_path / "history.jsonl").read_text(), parse_constant=refuse)
    assert row["val_loss"] is row["val_auroc"] is row["val_f1"] is None and row["val_accuracy"] == 0.5


# --- precision, and what readers say ---


@pytest.mark.parametrize("largest", [255, 4095, 65535])
def test_a_training_batch_is_what_predict_sees(tmp_path, largest):
    """Without augmentation, both give the same tensors to half a level of the files' bit depth."""
    index = open_dataset(make_folder(tmp_path / "data", largest=largest))
    accelerator = make_accelerator("cpu", "fp32")
    model = MedMamba(dataclasses.replace(variant_config("test"), num_classes=2, id2label={0: "a", 1: "b"}))
    recipe = load_recipe("paper", batch_size=12, size=32)
    images = ImageCache(index, model.config, accelerator)
    fitting = Trainer(
        model, recipe, images, accelerator, CheckpointStore(tmp_path / "c"), RunLog(tmp_path, progress=False)
    )
    drawn = A.draw(recipe, 12, sampling.augment_rng(0, 0, 0))
    data = images("train", 32)
    read = next(iter(data.batches([torch.arange(12)], accelerator.device)))
    batch, _ = fitting._batch(*read, drawn, data.size)
    part = index.split("train")
    expected = torch.stack([preprocess(part.image(i), model.config.preprocess) for i in range(12)])
    step = 1 / 65535 if largest > 255 else 1 / 255
    assert (batch - expected).abs().max() <= 0.5 * step / min(model.config.preprocess.std) + 1e-6
    if largest == 4095:  # many of the levels are there, of which 8 bits would keep 16
        assert len(batch.unique()) > 1000


@pytest.mark.slow
def test_warnings_of_the_readers_are_said_and_recorded(folder, tmp_path):
    class Warns:
        def read(self, record: Record):
            image = load_image(folder / str(record.source))
            dark = str(record.source).startswith(("train/class_0", "test"))
            return dataclasses.replace(image, notes=("warning: uses 12 of 16 bits",) if dark else ())

        def file_of(self, record: Record) -> Path:
            return folder / str(record.source)

    index = open_dataset(folder)
    index = ImageDataset(index.records, index.classes, Warns())
    expected = {
        "train": ["warning: 6 of 12 images: uses 12 of 16 bits (such as train/class_0/0.png)"],
        "test": ["warning: 6 of 6 images: uses 12 of 16 bits (such as test/class_0/0.png)"],
    }
    for out, again in (("1", False), ("2", True)):  # the second time from the cache
        with pytest.warns(UserWarning, match="train: 6 of 12 images: uses 12 of 16 bits") as said:
            run(index, tmp_path / out, cache=tmp_path / "cache")
        assert len([w for w in said if "12 of 16" in str(w.message)]) == 2, again
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert config["training"]["image_warnings"] == expected
        results = json.loads((tmp_path / out / "results.json").read_text())
        assert results["training"]["image_warnings"] == expected
