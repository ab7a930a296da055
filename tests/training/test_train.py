"""Training: recipes, order, augmentation, optimiser; runs stopped, killed, resumed and split over processes."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import medmamba
from medmamba import MedMamba
from medmamba.config import variant_config
from medmamba.data import DatasetError, LeakageError, open_dataset
from medmamba.inference.ood_fit import learn_unusual, pooled_features
from medmamba.training import (
    Augment,
    Recipe,
    RecipeError,
    ResumeError,
    TrainingError,
    graphed_step,
    load_recipe,
    recipe_names,
    sampling,
    train,
)
from medmamba.training import augment as A
from medmamba.training.checkpoint import CheckpointStore
from medmamba.training.data_parallel import GradientMean
from medmamba.training.loss import classification_loss, soft_targets
from medmamba.training.optim import WeightAverage, build_optimizer, freeze_stages, layer_of, lr_factor, parameter_groups
from medmamba.training.setup import adapt_input, build_model
from medmamba.training.trainer import Trainer
from medmamba.training.validation import selection_score

# Fast to train: no randomness in the network, no warm-up, a large step.
QUICK = dict(epochs=3, batch_size=8, size=32, lr=3e-3, warmup_epochs=0, ema=0.9)
COMMON = dict(device="cpu", progress=False, half=False)


def make_folder(root: Path, counts=(16, 6, 6), classes=3, poison: str | None = None) -> Path:
    """Makes noisy squares whose brightness is the class; `poison` is a split whose classes are rotated by one."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for label in range(classes):
            shown = (label + 1) % classes if split == poison else label
            folder = root / split / f"class_{shown}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.normal(60 + 70 * label, 30, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{label}_{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An uninterrupted run, and what it was called with."""
    out = tmp_path_factory.mktemp("finished")
    return train(folder, out, "default", "test", **QUICK, **COMMON)


def scores(history: list[dict]) -> list[dict]:
    """Returns a history without its timings."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- recipes ---


def test_every_recipe_that_ships_loads_and_survives_json():
    assert {"default", "finetune", "paper", "paper-code", "paper-medmnist"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description
        assert Recipe(**recipe.to_dict()).replace() == recipe


def test_published_recipes_are_the_published_ones():
    medmnist = load_recipe("paper-medmnist")
    assert (medmnist.optimizer, medmnist.lr, medmnist.batch_size, medmnist.epochs) == ("adamw", 1e-3, 128, 100)
    assert [medmnist.lr * lr_factor(e * 10, 10, medmnist) for e in (0, 49, 50, 75, 99)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-5, 1e-5]
    )
    paper = load_recipe("paper")
    assert (paper.optimizer, paper.lr, paper.betas, paper.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 1e-4)
    assert (paper.epochs, paper.batch_size, paper.augment) == (150, 64, Augment())
    code = load_recipe("paper-code")
    assert (code.optimizer, code.lr, code.batch_size, code.epochs) == ("adam", 1e-4, 32, 100)
    assert code.select == paper.select == medmnist.select == ("accuracy",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"augment.hflop": 1}, "did you mean 'hflip'"),
        ({"epochs": "many"}, "epochs must be int"),
        ({"epochs": True}, "epochs must be int"),
        ({"epochs": 0}, "at least 1"),
        ({"optimizer": "lion"}, "adamw, adam, sgd"),
        ({"lr": 0}, "lr must be positive"),
        ({"betas": [0.9]}, "needs 2 values"),
        ({"augment": 3}, "object of settings"),
        ({"augment.crop_area": [0.9, 0.5]}, "smallest <= largest"),
        ({"select": "kappa"}, "balanced_accuracy"),
        ({"size": 16}, "at least 32"),
        ({"milestones": [75, 50]}, "ascending"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("default", **settings)


def test_recipe_files(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"epochs": 7, "augment": {"hflip": 1}}')
    assert load_recipe(file) == Recipe(name="mine", epochs=7, augment=Augment(hflip=1.0))
    file.write_text('{"epochs": 7,}')
    with pytest.raises(RecipeError, match="not valid JSON"):
        load_recipe(file)
    file.write_text("[1]")
    with pytest.raises(RecipeError, match="expected an object"):
        load_recipe(file)
    with pytest.raises(RecipeError, match="available: default"):
        load_recipe("papper")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "other.json")


# --- learning rate, groups, averages ---


def test_cosine_with_warmup_is_the_closed_form():
    recipe = Recipe(epochs=10, warmup_epochs=2, schedule="cosine", min_lr=0.1)
    factors = [lr_factor(step, 5, recipe) for step in range(50)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 20 / 40)))
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[-1] < 0.11
    assert lr_factor(49, 5, recipe.replace(schedule="constant")) == 1.0
    phased = recipe.replace(final_epochs=2, final_lr=0.5)
    assert lr_factor(39, 5, phased) < 0.11 and lr_factor(40, 5, phased) == pytest.approx(0.5)
    assert lr_factor(45, 5, phased) == pytest.approx(0.1 + 0.4 * 0.5)


def test_groups_hold_every_parameter_once_and_spare_norms_and_the_scan(tiny_model):
    recipe = Recipe(weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(tiny_model, recipe)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in tiny_model.parameters())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    block = tiny_model.stages[0].blocks[0]
    assert decay[id(block.ssm.A_log)] == decay[id(block.ssm.D)] == decay[id(block.norm.weight)] == 0
    assert decay[id(block.ssm.in_proj.weight)] == 0.1
    # patch embedding 0, four blocks 1 to 4, classifier 5
    assert scale[id(tiny_model.head.weight)] == 1
    assert scale[id(tiny_model.downsamples[0].reduction.weight)] == scale[id(tiny_model.stages[1].blocks[0].norm.bias)]
    assert scale[id(tiny_model.patch_embed.proj.weight)] == 0.5**5
    everything = parameter_groups(tiny_model, recipe.replace(decay_all=True, layer_decay=1.0))
    assert len(everything) == 1 and everything[0]["weight_decay"] == 0.1


def test_layers_are_numbered_from_the_input():
    depths = (2, 2, 4, 2)
    names = ["patch_embed.norm.bias", "stages.0.blocks.1.norm.bias", "downsamples.0.norm.bias", "stages.1.blocks.0.x."]
    assert [layer_of(name, depths) for name in names] == [0, 2, 3, 3]
    assert layer_of("stages.3.blocks.1.ssm.D", depths) == 10 and layer_of("head.weight", depths) == 11


@pytest.mark.parametrize("count", [1, 2, 4])
def test_freezing_leaves_the_rest_trainable(tiny_model, count):
    freeze_stages(tiny_model, count)
    trainable = {"".join(name.split(".")[:2]) for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert not {f"stages{i}" for i in range(count)} & trainable
    assert {f"stages{i}" for i in range(count, 4)} <= trainable and "headweight" in trainable
    assert len(parameter_groups(tiny_model, Recipe())) > 0


def test_average_is_the_recursion_it_claims(tiny_model):
    average = WeightAverage(tiny_model, 0.5)
    expected = tiny_model.head.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            tiny_model.head.weight.add_(torch.randn_like(expected))
            tiny_model.stages[0].blocks[0].conv[0].running_mean.add_(1.0)
            tiny_model.stages[0].blocks[0].conv[0].num_batches_tracked.add_(1)
        average.update(tiny_model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * tiny_model.head.weight
    assert torch.allclose(average.model.head.weight, expected, atol=1e-6)
    norm = average.model.stages[0].blocks[0].conv[0]
    assert norm.num_batches_tracked == 12 and 10 < norm.running_mean[0] < 12
    assert average.model.head.weight.data_ptr() != tiny_model.head.weight.data_ptr()


# --- order and weights ---


def test_every_image_once_per_epoch_in_an_order_of_its_own():
    labels = np.repeat([0, 1], [20, 4])
    first, second = (sampling.epoch_order(labels, "none", 0, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(24)) and list(first) != list(second)
    assert list(first) == list(sampling.epoch_order(labels, "none", 0, 0))
    assert list(first) != list(sampling.epoch_order(labels, "none", 1, 0))


def test_balanced_sampling_draws_classes_equally():
    labels = np.repeat([0, 1], [1800, 200])
    order = sampling.epoch_order(labels, "sampling", 0, 0)
    assert len(order) == 2000 and 0.46 < labels[order].mean() < 0.54


def test_class_weights_average_to_one_over_the_images():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    weights = sampling.class_weights(labels, 3)
    assert weights[labels].mean() == pytest.approx(1.0) and weights[2] == pytest.approx(6 * weights[0])
    several = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    assert sampling.class_weights(several, 2).tolist() == pytest.approx([1 / 3, 3.0])


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_parts_cover_each_step_once(processes, accumulate):
    plan = sampling.Batches.plan(50, 12, processes, accumulate)
    assert (plan.steps, plan.size) == (4, 12)
    for step in range(plan.steps):
        rows = [
            list(range(100))[plan.rows(step, process, turn)[0]]
            for process in range(processes)
            for turn in range(accumulate)
        ]
        assert [row for part in rows for row in part] == list(range(step * 12, step * 12 + 12))


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(RecipeError, match="cannot be divided"):
        sampling.Batches.plan(100, 10, 3, 1)
    with pytest.raises(RecipeError, match="too few for batch norm"):
        sampling.Batches.plan(3, 64, 2, 1)
    assert sampling.Batches.plan(5, 64, 1, 1).size == 5  # fewer images than a batch: all of them


# --- augmentation ---


def drawn(count: int = 6, seed: int = 0, mixup: float = 0.0, cutmix: float = 0.0, **settings) -> tuple[A.Draw, Augment]:
    recipe = Recipe(mixup=mixup, cutmix=cutmix, augment=Augment(**settings))
    return A.draw(recipe, count, np.random.default_rng(seed)), recipe.augment


EVERYTHING = dict(
    hflip=0.5, vflip=0.5, rot90=0.5, rotate=20, shear=5, translate=0.1, crop_area=(0.5, 1), crop_ratio=(0.8, 1.25),
    brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, gamma=0.3, blur=0.5, noise=0.1, erase=0.5,
)  # fmt: skip


@pytest.mark.parametrize("pick", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_changed_differently_but_the_same_for_a_seed(channels, pick):
    images = torch.rand(1, channels, 40, 32).expand(6, -1, -1, -1)
    d, a = drawn(**EVERYTHING, pick=pick)
    out = A.augment(images, d, a, (40, 32))
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= 1
    for i in range(6):
        for j in range(i):
            assert (out[i] - out[j]).abs().max() > 0.02
    assert torch.equal(out, A.augment(images, drawn(**EVERYTHING, pick=pick)[0], a, (40, 32)))
    assert not torch.equal(out, A.augment(images, drawn(seed=1, **EVERYTHING, pick=pick)[0], a, (40, 32)))


def test_a_divided_batch_is_augmented_as_the_whole():
    images, targets = torch.rand(8, 3, 32, 32), torch.eye(8)
    d, a = drawn(8, mixup=0.4, cutmix=1.0, **EVERYTHING)
    whole = A.mix(A.augment(images, d, a, (32, 32)), targets, d)
    parts = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = d.rows(rows.start, rows.stop)
        parts.append(A.mix(A.augment(images[rows], part, a, (32, 32)), targets[rows], part))
    assert torch.allclose(whole[0], torch.cat([p[0] for p in parts]), atol=1e-6)
    assert torch.allclose(whole[1], torch.cat([p[1] for p in parts]), atol=1e-6)


def test_flips_and_quarter_turns_are_exact():
    images = torch.rand(6, 3, 32, 32)
    d, a = drawn(hflip=1.0)
    assert torch.allclose(A.augment(images, d, a, (32, 32)), images.flip(3), atol=1e-5)
    d, a = drawn(vflip=1.0)
    assert torch.allclose(A.augment(images, d, a, (32, 32)), images.flip(2), atol=1e-5)
    d, a = drawn(rot90=1.0)
    for image, turned in zip(images, A.augment(images, d, a, (32, 32)), strict=True):
        assert any(torch.allclose(turned, image.rot90(k, (1, 2)), atol=1e-4) for k in (1, 2, 3))


def test_rotation_keeps_angles_of_images_that_are_not_square():
    """A disc stays round, although the normalised coordinates stretch one axis more than the other."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    disc = (((y - 31.5) ** 2 + (x - 63.5) ** 2) < 20**2).float()
    d, a = drawn(1, rotate=45)
    d.values["rotate"][:] = math.radians(20)
    out = A.augment(disc.expand(1, 1, 64, 128), d, a, (64, 128))[0, 0]
    assert (out - disc).abs().mean() < 0.008


def test_colour_changes_what_their_names_say():
    images = torch.rand(6, 3, 32, 32) * 0.4 + 0.3
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    d, a = drawn(brightness=0.2)
    factor = d.tensor("brightness", images.device).view(-1, 1, 1, 1)
    assert torch.allclose(A.augment(images, d, a, (32, 32)), images * factor, atol=1e-5)
    d, a = drawn(contrast=0.2)
    out = A.augment(images, d, a, (32, 32))
    assert torch.allclose((out * luma).sum(1).mean((1, 2)), (images * luma).sum(1).mean((1, 2)), atol=1e-4)
    assert torch.allclose(out.std((1, 2, 3)) / images.std((1, 2, 3)), d.tensor("contrast", out.device), atol=2e-2)
    d, a = drawn(saturation=0.5)
    out = A.augment(images, d, a, (32, 32))
    assert torch.allclose((out * luma).sum(1), (images * luma).sum(1), atol=1e-4)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    d, a = drawn(hue=0.5, saturation=0.5)
    assert torch.allclose(A.augment(grey, d, a, (32, 32)), grey, atol=1e-5)


def test_pick_uses_so_many_changes_per_image():
    d, _ = drawn(50, **{**EVERYTHING, "blur": 1.0, "erase": 1.0}, pick=2)
    neutral = dict(brightness=1, contrast=1, saturation=1, gamma=1)
    names = ["rotate", "shear", "translate", *neutral, "hue", "blur", "noise", "erase"]
    used = sum((d.values[name].reshape(50, -1)[:, 0] != neutral.get(name, 0)).astype(int) for name in names)
    assert (used == 2).all()


def test_erasing_fills_a_rectangle_of_the_stated_size():
    images = torch.rand(20, 1, 64, 64)
    d, a = drawn(20, erase=1.0)
    share = (A.augment(images, d, a, (64, 64)) != images).float().mean((1, 2, 3))
    assert ((share > 0.01) & (share < 0.23)).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_say_what_is_in_the_image(kind):
    n = 8
    images = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 32, 32)
    d, _ = drawn(n, **{kind: 1.0})
    mixed, targets = A.mix(images, torch.eye(n), d)
    assert torch.allclose(targets.sum(1), torch.ones(n))
    assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(n).float(), atol=1e-4)
    assert ((targets > 0).sum(1) <= 2).all() and (targets.max(1).values < 1).any()
    if kind == "cutmix":
        assert set(mixed.unique().tolist()) <= set(range(n))


def test_mixing_an_odd_batch_leaves_the_last_alone():
    images, targets = torch.rand(5, 1, 32, 32), torch.eye(5)
    d, _ = drawn(5, mixup=1.0)
    mixed, soft = A.mix(images, targets, d)
    assert torch.allclose(mixed[4], images[4]) and torch.equal(soft[4], targets[4])


# --- loss ---


def test_loss_is_the_one_of_pytorch():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    found = classification_loss(logits, soft_targets(labels, 3, 0.1), "multiclass")
    assert found == pytest.approx(expected.item())
    several = (torch.rand(6, 3) > 0.5).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, several)
    found = classification_loss(logits, soft_targets(several, 3, 0.0), "multilabel")
    assert found == pytest.approx(expected.item())


def test_undefined_scores_are_never_chosen():
    assert selection_score({"auroc": math.nan}, "auroc") < selection_score({"auroc": 0.0}, "auroc")
    assert selection_score({"loss": 1.0}, "loss") > selection_score({"loss": 2.0}, "loss")


# --- models to start from ---


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


# --- whole runs ---


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


def test_stopped_at_every_step_and_resumed_gives_the_same_weights(folder, finished, tmp_path):
    """18 steps; each call gets a deadline that is past, so it does one step, saves and stops."""
    calls, result = 0, None
    while result is None or not result.finished:
        result = train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
        calls += 1
    assert calls >= 18
    assert scores(result.history) == scores(finished.history) and same_weights(result.out, finished.out)


SCRIPT = """
import sys
from medmamba.training import train
data, out, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
train(data, out, "default", "test", **options)
"""


def start(folder: Path, out: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out), repr({**COMMON, **options})]
    return subprocess.Popen(command, env=environment, cwd=Path(medmamba.__file__).parents[1])


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was to be interrupted"
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(folder, tmp_path):
    """SIGKILL, which nobody can catch, in the middle of an epoch, after different numbers of checkpoints."""
    options = {**QUICK, "epochs": 8}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed: sums in another order differ in the last bit
    try:
        whole = train(folder, tmp_path / "whole", "default", "test", **options, **COMMON)
        out = tmp_path / "killed"
        for epoch in (1, 4):
            process = start(folder, out, **options)
            wait_for(lambda: _lines(out / "history.csv") > epoch, process)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (out / "model.safetensors").exists()
        result = train(folder, out, "default", "test", **options, **COMMON)
    finally:
        torch.set_num_threads(threads)
    assert scores(result.history) == scores(whole.history) and same_weights(result.out, whole.out)
    assert result.test == dataclasses.replace(whole.test, context=result.test.context)


def test_sigterm_stops_in_good_order(folder, tmp_path):
    process = start(folder, tmp_path, **{**QUICK, "epochs": 200})
    wait_for(lambda: _lines(tmp_path / "history.csv") > 1, process)
    process.terminate()
    assert process.wait(timeout=60) == 0
    state = CheckpointStore(tmp_path / "checkpoint").load()
    assert state is not None and 1 <= state["epoch"] < 200


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_finished_run_is_not_repeated_nor_overwritten(folder, finished, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    again = train(folder, finished.out, "default", "test", **QUICK, **COMMON)
    assert again.finished and again.best_epoch == finished.best_epoch and again.test == finished.test
    with pytest.raises(FileExistsError, match="--restart"):
        train(folder, finished.out, "default", "test", seed=5, **QUICK, **COMMON)


def test_another_run_in_the_folder_is_refused_unless_restarted(folder, tmp_path):
    train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
    changed = {**QUICK, "lr": 1e-3, "max_seconds": 0.0}
    with pytest.raises(ResumeError, match="another recipe"):
        train(folder, tmp_path, "default", "test", **changed, **COMMON)
    assert not train(folder, tmp_path, "default", "test", restart=True, **changed, **COMMON).finished


def test_a_damaged_checkpoint_is_said_to_be_one(folder, tmp_path):
    train(folder, tmp_path, "default", "test", max_seconds=0.0, **QUICK, **COMMON)
    last = tmp_path / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ResumeError, match="damaged"):
        train(folder, tmp_path, "default", "test", **QUICK, **COMMON)


def test_checkpoints_run_no_code(tmp_path):
    """A pickle that calls a function is rejected, not executed."""
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / "checkpoint").mkdir()
    torch.save({"format": 1, "x": Malicious()}, tmp_path / "checkpoint" / "last.pt")
    with pytest.raises(ResumeError):
        CheckpointStore(tmp_path / "checkpoint").load()
    assert not marker.exists()


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


def features_of(model: MedMamba, image: Path) -> np.ndarray:
    with pooled_features(model) as pooled:
        model.predict(image)
    return pooled.array()


def test_a_run_learns_which_images_are_unusual(folder, finished, tmp_path):
    """From the features of its own weights, as `learn_unusual` finds them in the files; also at another size."""
    model = finished.load()
    assert model.unusual.means.shape == (3, model.config.dims[-1]) and model.unusual.coverage == 0.95
    expected = learn_unusual(model, open_dataset(folder))
    np.testing.assert_allclose(model.unusual.means, expected.means, rtol=2e-2, atol=2e-2)
    assert model.unusual.threshold == pytest.approx(expected.threshold, rel=0.05)
    image = next((folder / "val").rglob("*.png"))
    assert model.predict(image).unusual is bool(model.unusual.is_unusual(features_of(model, image))[0])
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


# --- data that cannot be trained on ---


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
    options = {**QUICK, "epochs": 1, "batch_size": 4}
    assert train(data, tmp_path / "out", "default", "test", allow_leakage=("duplicates",), **options, **COMMON).finished


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
