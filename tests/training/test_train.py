"""Training: recipes, order, augmentation, optimiser; runs stopped, killed, resumed and split over processes."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_cases import COMMON, QUICK, SCRIPT, make_folder, same_weights, scores

import medmamba
from medmamba import MedMamba
from medmamba.data import open_dataset
from medmamba.inference.ood_fit import learn_unusual
from medmamba.inference.signature import signatures
from medmamba.training import (
    Recipe,
    RecipeError,
    TrainingError,
    graphed_step,
    load_recipe,
    train,
)
from medmamba.training.data_parallel import GradientMean
from medmamba.training.setup import adapt_input, build_model
from medmamba.training.trainer import Trainer

# --- models to start from -------------------------------------------------------------------------------------------


def test_grey_images_look_the_same_to_an_adapted_input():
    weight, grey = torch.randn(8, 3, 4, 4), torch.rand(2, 1, 32, 32)
    expected = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight, stride=4)
    assert torch.allclose(torch.nn.functional.conv2d(grey, adapt_input(weight, 1), stride=4), expected, atol=1e-5)
    back = adapt_input(adapt_input(weight, 1), 3)
    assert torch.allclose(torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), back, stride=4), expected, atol=1e-5)


def test_head_is_kept_for_the_same_classes_and_new_for_others(folder, tiny_model):
    index = open_dataset(folder)
    recipe = load_recipe("finetune", size=64, drop_path=0.3)
    same = build_model(recipe, index, "tiny", tiny_model, None, tiny_model.config.id2label)
    assert torch.equal(same.head.weight, tiny_model.head.weight)
    other = build_model(recipe, index, "tiny", tiny_model, 1, {0: "a", 1: "b"})
    assert other.head.weight.shape == (2, 64) and other.config.labels == ["a", "b"]
    assert torch.equal(other.stages[2].blocks[0].ssm.A_log, tiny_model.stages[2].blocks[0].ssm.A_log)
    assert other.stages[3].blocks[0].drop_path.rate == pytest.approx(0.3)
    assert other.config.preprocess.input_size == (64, 64) and tiny_model.config.preprocess.input_size == (32, 32)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_complete_folder(finished):
    assert finished.finished and finished.epoch == 3 and len(finished.history) == 3
    names = {file.name for file in finished.out.iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "history.csv", "history.jsonl", "roc.png"} <= names
    assert not any(name.endswith(".part") or name == "checkpoint" for name in names)
    results = json.loads((finished.out / "results.json").read_text())
    assert results["splits"]["test"]["overall"]["accuracy"]["value"] == finished.test["accuracy"]
    model = finished.load()
    assert model.config.training["seed"] == 0 and model.config.training["settings"]["epochs"] == 3
    assert model.config.calibration["n"] == 18 and model.config.labels == ["class_0", "class_1", "class_2"]
    assert len((finished.out / "history.csv").read_text().splitlines()) == 4


def test_the_kept_epoch_is_the_best_on_validation(finished):
    values = [(row["val_accuracy"], -row["val_loss"]) for row in finished.history]
    assert finished.best_epoch == 1 + values.index(max(values))
    assert finished.val["accuracy"] == pytest.approx(values[finished.best_epoch - 1][0])


@pytest.mark.slow
def test_it_learns(folder, tmp_path):
    result = train(folder, tmp_path, "default", "test", **{**QUICK, "epochs": 12, "augment.brightness": 0}, **COMMON)
    assert result.test["accuracy"] > 0.8 and result.history[-1]["loss"] < result.history[0]["loss"]


def test_one_batch_is_learnt_by_heart(folder, tmp_path):
    recipe = Recipe(epochs=40, batch_size=12, size=32, lr=5e-3, schedule="constant", weight_decay=0.0)
    index = open_dataset(folder)
    rows = [i for i, record in enumerate(index.records) if record.split == "train"][::4]
    val = [i for i, record in enumerate(index.records) if record.split == "val"]
    result = train(index.subset(rows + val), tmp_path, recipe, "test", **COMMON)
    assert result.history[-1]["loss"] < 0.05 and result.test is None


def test_the_same_seed_gives_the_same_weights(folder, finished, tmp_path):
    again = train(folder, tmp_path / "a", "default", "test", **QUICK, **COMMON)
    assert scores(again.history) == scores(finished.history) and same_weights(again.out, finished.out)
    other = train(folder, tmp_path / "b", "default", "test", seed=1, **QUICK, **COMMON)
    assert not same_weights(other.out, finished.out)


def test_early_stopping_and_what_is_kept(folder, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.6, 0.5, 0.6, 0.1, 0.9])
    monkeypatch.setattr(
        "medmamba.training.trainer.validate",
        lambda *a: {"loss": 1.0, "accuracy": next(accuracies), "balanced_accuracy": 0.5, "auroc": math.nan, "f1": 0.5},
    )
    result = train(folder, tmp_path, "default", "test", **{**QUICK, "epochs": 6, "patience": 3}, **COMMON)
    assert (result.finished, result.epoch, result.best_epoch) == (True, 5, 2)  # an equal score is no improvement
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["val_auroc"] is None


def test_test_labels_decide_nothing(finished, tmp_path):
    """Changing the classes of all test images changes neither epoch, weights nor calibration."""
    poisoned = make_folder(tmp_path / "data", poison="test")
    result = train(poisoned, tmp_path / "out", "default", "test", **QUICK, **COMMON)
    assert result.best_epoch == finished.best_epoch and same_weights(result.out, finished.out)
    assert result.load().config.calibration == finished.load().config.calibration
    assert result.test["accuracy"] != finished.test["accuracy"]


def test_accumulated_parts_give_the_same_first_loss(folder, tmp_path):
    """Batch norm sees the parts separately, so losses are only close; the sum over parts must be right."""
    options = {**QUICK, "epochs": 1, "drop_path": 0.0}
    one = train(folder, tmp_path / "one", "default", "test", **options, **COMMON)
    two = train(folder, tmp_path / "two", "default", "test", accumulate=2, **options, **COMMON)
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=0.15)


class _ReplayedByHand(graphed_step.GraphedStep):
    """A graphed step without a GPU, which reproduces the effect of a replay on buffers and gradients."""

    captured = 0

    def __init__(self, model, loss, images, targets, parts=1):
        self._images, self._targets, self._function = images.clone(), targets.clone(), loss
        self._parameters, self._adds = [p for p in model.parameters() if p.requires_grad], parts > 1
        self._fixed = [torch.zeros_like(p) for p in self._parameters]
        for parameter, gradient in zip(self._parameters, self._fixed, strict=True):
            parameter.grad = gradient
        type(self).captured += 1

    def __call__(self, images, targets):
        assert images.shape == self._images.shape
        loss = self._function(images, targets)
        for gradient, new in zip(self._fixed, torch.autograd.grad(loss, self._parameters), strict=True):
            gradient.add_(new) if self._adds else gradient.copy_(new)
        return loss.detach()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graphed_step_trains_as_an_eager_one(folder, tmp_path, monkeypatch, accumulate):
    """Gradients at fixed addresses, overwritten or accumulated, recaptured when the image size changes."""
    settings = {**QUICK, "epochs": 2, "final_epochs": 1, "final_size": 48, "drop_path": 0.3, "clip_grad": 0.5}
    options = {**COMMON, "accumulate": accumulate, "allow_leakage": ()}
    train(folder, tmp_path / "eager", "default", "test", **settings, **options)
    monkeypatch.setattr(graphed_step, "GraphedStep", _ReplayedByHand)
    monkeypatch.setattr(_ReplayedByHand, "captured", 0)
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (setattr(self, "_use_graphs", True), fit(self))[1])
    train(folder, tmp_path / "graph", "default", "test", **settings, **options)
    assert _ReplayedByHand.captured == 2
    assert same_weights(tmp_path / "eager", tmp_path / "graph")


# What a graph does, without one: `broken` is the process where none can be captured.
WITH_GRAPHS = """
from medmamba.training import graphed_step
class Step:
    def __init__(self, loss, model): self.loss, self.model = loss, model
    def begin(self): self.model.zero_grad(set_to_none=True)
    def __call__(self, images, targets):
        loss = self.loss(images, targets)
        loss.backward()
        return loss.detach()
def capture(model, loss, images, targets, parts):
    return Step(loss, model) if int(os.environ["RANK"]) != BROKEN else None
graphed_step.graphs_possible, graphed_step.capture = lambda accelerator: True, capture
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, -1, 1], ids=["ddp", "graphs", "graph of one process fails"])
def test_two_processes_train_as_one_with_two_parts(broken, folder, tmp_path, one_with_two_parts):
    """Same global batch and images in each part, so same gradients, losses, statistics and scores."""
    options, one = one_with_two_parts
    script = tmp_path / "script.py"
    script.write_text("" if broken is None else f"import os\nBROKEN = {broken}" + WITH_GRAPHS)
    with script.open("a") as file:
        file.write(SCRIPT)
    arguments = [str(script), str(folder), str(tmp_path / "two"), repr({**COMMON, **options})]
    root = Path(medmamba.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    subprocess.run(command, env=environment, check=True, timeout=240)
    lines = (tmp_path / "two" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    for name in ("loss", "val_loss"):
        assert [row[name] for row in history] == pytest.approx([row[name] for row in one.history], rel=1e-4), name
    weights, expected = (load_file(out / "model.safetensors") for out in (tmp_path / "two", one.out))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    record = json.loads((tmp_path / "two" / "config.json").read_text())["training"]
    assert record["processes"] == 2


def test_the_mean_of_gradients_keeps_their_places_and_formats(monkeypatch):
    """Two processes, of which the other has twice our gradients."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [(4, 3, 3, 3), (5,), (2, 3), ()]]
    parameters += [torch.nn.Parameter(torch.randn(3, dtype=torch.float64)), torch.nn.Parameter(torch.ones(2))]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    parameters[0].grad = parameters[0].grad.contiguous(memory_format=torch.channels_last)
    before = [(p.grad, p.grad.clone(), p.grad.stride()) for p in parameters[:-1]]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.add_(2 * flat))
    mean = GradientMean(SimpleNamespace(num_processes=2), parameters)
    for turn in (1, 2):
        mean.average()
        for parameter, (gradient, value, stride) in zip(parameters, before, strict=False):
            assert parameter.grad is gradient and gradient.stride() == stride
            torch.testing.assert_close(gradient, value * 1.5**turn)
    assert parameters[-1].grad is None


@pytest.fixture(scope="module")
def one_with_two_parts(folder, tmp_path_factory):
    """Settings, and a run of one process with them."""
    options = {**QUICK, "drop_path": 0.0, "mixup": 0.4, "cutmix": 1.0, "mix_prob": 1.0, "ema": 0.5}
    # Rounding depends on the number of threads, and AdamW's first steps blow it up; the two processes have one each.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return options, train(
            folder, tmp_path_factory.mktemp("one"), "default", "test", accumulate=2, **options, **COMMON
        )
    finally:
        torch.set_num_threads(threads)


def signature_of(model: MedMamba, image: Path) -> np.ndarray:
    with signatures() as seen:
        model.predict(image)
    return seen.array()


def test_a_run_learns_which_images_are_unusual(folder, finished, tmp_path):
    """From the features of its own weights, as `learn_unusual` finds them in the files; also at another size."""
    model = finished.load()
    assert model.unusual.means.shape == (3, model.config.dims[-1]) and model.unusual.coverage == 0.95
    expected = learn_unusual(model, open_dataset(folder))
    np.testing.assert_allclose(model.unusual.means, expected.means, rtol=2e-2, atol=2e-2)
    assert model.unusual.threshold == pytest.approx(expected.threshold, rel=0.05)
    image = next((folder / "val").rglob("*.png"))
    assert model.predict(image).unusual is bool(model.unusual.is_unusual(signature_of(model, image))[0])
    larger = train(folder, tmp_path, "default", "test", **{**QUICK, "epochs": 1}, eval_size=48, **COMMON).load()
    assert larger.unusual.means.shape == model.unusual.means.shape


def test_fine_tuning_trains_what_is_not_frozen(folder, finished, tmp_path):
    start_from = finished.load()
    options = dict(epochs=2, batch_size=8, freeze=2, size=32)
    result = train(folder, tmp_path, "finetune", init=finished.out, **options, **COMMON)
    model = result.load()
    assert torch.equal(model.stages[1].blocks[0].ssm.D, start_from.stages[1].blocks[0].ssm.D)
    frozen_norm, norm = (model.stages[i].blocks[0].conv[0].running_mean for i in (1, 2))
    assert torch.equal(frozen_norm, start_from.stages[1].blocks[0].conv[0].running_mean)
    assert not torch.equal(norm, start_from.stages[2].blocks[0].conv[0].running_mean)
    assert not torch.equal(model.head.weight, start_from.head.weight)
    assert model.config.architecture == "test" and model.config.training["init"] == str(finished.out)


def test_fine_tuning_with_other_classes_channels_and_size(finished, tmp_path):
    data = make_folder(tmp_path / "data", counts=(8, 4, 4), classes=2)
    options = dict(epochs=1, batch_size=8, size=40, balance="sampling", in_chans=1)
    result = train(data, tmp_path / "out", "finetune", init=finished.out, **options, **COMMON)
    config = result.load().config
    assert (config.num_classes, config.in_chans, config.preprocess.input_size) == (2, 1, (40, 40))
    result.load().predict(str(next((data / "test").rglob("*.png"))))


def test_progressive_size_is_evaluated_at_the_last(folder, tmp_path):
    result = train(folder, tmp_path, "default", "test", **QUICK, final_epochs=1, final_size=48, **COMMON)
    assert [row["size"] for row in result.history] == [32, 32, 48]
    assert result.best_epoch == 3  # the others were never seen at the size of use
    assert result.load().config.preprocess.input_size == (48, 48)


def test_several_labels_per_image(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["path,split,left,right"]
    for i in range(60):
        left, right = int(i % 2), int(i // 2 % 2)
        pixels = rng.normal(60, 10, (32, 32))
        pixels[:, :16] += 120 * left
        pixels[:, 16:] += 120 * right
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('train', 'train', 'val', 'test')[i // 4 % 4]},{left},{right}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = dict(epochs=8, batch_size=8, size=32, lr=5e-3, warmup_epochs=0, balance="loss", **{"augment.hflip": 0})
    result = train(tmp_path / "labels.csv", tmp_path / "out", "default", "test", **options, **COMMON)
    assert result.load().config.task == "multilabel" and result.test["auroc"] > 0.8
    options["balance"] = "sampling"
    with pytest.raises(RecipeError, match="balance='loss'"):
        train(tmp_path / "labels.csv", tmp_path / "b", "default", "test", **options, **COMMON)


@pytest.mark.slow
def test_averaged_weights_are_the_ones_kept(folder, tmp_path):
    """With a decay so high that the average hardly moves, the saved weights stay near the initial ones."""
    options = {**QUICK, "epochs": 1}
    slow = train(folder, tmp_path / "a", "default", "test", **{**options, "ema": 0.99}, **COMMON)
    none = train(folder, tmp_path / "b", "default", "test", **{**options, "ema": 0.0}, **COMMON)
    assert slow.history[0]["loss"] == none.history[0]["loss"]  # the average does not feed back
    assert not same_weights(slow.out, none.out)


def test_a_loss_that_is_no_number_stops_the_run(folder, tmp_path):
    with pytest.raises(TrainingError, match="smaller lr"):
        train(folder, tmp_path, "default", "test", **{**QUICK, "lr": 1e30, "clip_grad": 0.0}, **COMMON)
    assert not (tmp_path / "model.safetensors").exists()


def test_half_precision_files_score_what_they_say(folder, tmp_path):
    result = train(folder, tmp_path, "default", "test", **QUICK, **{**COMMON, "half": True})
    assert load_file(tmp_path / "model.safetensors")["head.weight"].dtype == torch.float16
    from medmamba.evaluation import evaluate_model

    again = evaluate_model(tmp_path, folder, "test", device="cpu", resamples=0)
    assert again.evaluation["nll"] == pytest.approx(result.test["nll"], abs=1e-6)


def test_bfloat16_trains(folder, tmp_path):
    result = train(folder, tmp_path, "default", "test", precision="bf16", **{**QUICK, "epochs": 1}, **COMMON)
    assert result.load().config.training["precision"] == "bf16"
    assert load_file(tmp_path / "model.safetensors")["head.weight"].dtype == torch.float32


def test_tensorboard_and_cache(folder, tmp_path):
    options = dict(tensorboard=True, cache=tmp_path / "cache", **{**QUICK, "epochs": 1}, **COMMON)
    train(folder, tmp_path / "a", "default", "test", **options)
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    assert {file.name for file in (tmp_path / "cache").glob("*.npy")} == {"train-32.npy", "val-32.npy", "test-32.npy"}


def test_training_from_another_thread_leaves_signals_alone(folder, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(train(folder, tmp_path, "default", "test", **{**QUICK, "epochs": 1}, **COMMON))
    )
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found and found[0].finished and signal.getsignal(signal.SIGTERM) is before
