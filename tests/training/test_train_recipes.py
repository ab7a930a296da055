"""Recipes, learning rates, the order of images, augmentation and losses."""

import math

import numpy as np
import pytest
import torch

from medmamba.training import (
    Augment,
    Recipe,
    RecipeError,
    load_recipe,
    recipe_names,
    sampling,
)
from medmamba.training import augment as A
from medmamba.training.loss import classification_loss, soft_targets
from medmamba.training.optim import WeightAverage, freeze_stages, layer_of, lr_factor, parameter_groups
from medmamba.training.validation import selection_score

# --- recipes --------------------------------------------------------------------------------------------------------


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


# --- learning rate, groups, averages --------------------------------------------------------------------------------


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


# --- order and weights ----------------------------------------------------------------------------------------------


def test_every_image_once_per_epoch_in_an_order_of_its_own():
    labels = np.repeat([0, 1], [20, 4])
    first, second = (sampling.epoch_order(labels, "none", 0, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(24)) and list(first) != list(second)
    assert list(first) == list(sampling.epoch_order(labels, "none", 0, 0))
    assert list(first) != list(sampling.epoch_order(labels, "none", 1, 0))


def test_the_network_is_seeded_as_manual_seed_does_and_differently_in_every_part_of_every_step():
    cpu, seen = torch.device("cpu"), set()
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 8)]:
        sampling.seed_network(*place, cpu)
        seed, drawn = torch.initial_seed(), torch.rand(4)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(4), drawn)
        sampling.seed_network(*place, cpu)
        assert torch.equal(torch.rand(4), drawn)
        seen.add(seed)
    assert len(seen) == 5


def test_balanced_sampling_draws_classes_equally():
    labels = np.repeat([0, 1], [1800, 200])
    order = sampling.epoch_order(labels, "sampling", 0, 0)
    assert len(order) == 2000 and 0.46 < labels[order].mean() < 0.54


def test_class_weights_average_to_one_over_the_images():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    weights = sampling.class_weights(labels, 3)
    assert weights[labels].mean() == pytest.approx(1.0) and weights[2] == pytest.approx(6 * weights[0])
    softer = sampling.class_weights(labels, 3, 0.5)
    assert softer[labels].mean() == pytest.approx(1.0) and softer[2] == pytest.approx(6**0.5 * softer[0])
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


# --- augmentation ---------------------------------------------------------------------------------------------------


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


# --- loss -----------------------------------------------------------------------------------------------------------


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
