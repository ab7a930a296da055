"""Training of segmentation models: learning, resuming, thresholds, and what is refused."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

# Importing it takes seconds, which every process would spend while it collects.
if importlib.util.find_spec("segmentation_models_pytorch") is None:
    pytest.skip("needs the extra segment: make setup", allow_module_level=True)
pytest.importorskip("accelerate")
from segmentation_data import write_pairs

from medmamba.data import DatasetError
from medmamba.segmentation import MedMambaSegmenter
from medmamba.training import augment
from medmamba.training.recipe import Augment, RecipeError, load_recipe
from medmamba.training.segmentation import SegmentationLoss
from medmamba.training.segmentation_run import train_segmenter

SHORT = dict(variant="test", size=32, batch_size=8, progress=False, half=False, device="cpu")


def run(data, out, **options):
    return train_segmenter(data, out, ("disc",), **{**SHORT, **options})


def test_a_model_learns_discs_and_is_evaluated_once(discs, tmp_path):
    result = run(discs, tmp_path / "run", epochs=8)
    assert result.finished and result.test is not None
    assert result.test.metrics["disc"]["dice"]["value"] > 0.85
    model = result.load()
    assert model.config.thresholds != () and 0.1 <= model.config.thresholds[0] <= 0.9
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["splits"]["test"]["n"] == 6 and written["training"]["split_sizes"]["train"] == 24
    again = run(discs, tmp_path / "run", epochs=8)  # finished: nothing is trained again
    assert again.test.metrics == result.test.metrics and again.best_epoch == result.best_epoch
    with pytest.raises(FileExistsError, match="another"):
        run(discs, tmp_path / "run", epochs=9)


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_weights(discs, tmp_path):
    whole = run(discs, tmp_path / "whole", epochs=3)
    first = run(discs, tmp_path / "parts", epochs=3, max_seconds=0, checkpoint_seconds=0)
    assert not first.finished
    second = run(discs, tmp_path / "parts", epochs=3)
    assert second.finished
    a, b = (MedMambaSegmenter.from_pretrained(result.out).state_dict() for result in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_masks_move_with_their_images():
    recipe = load_recipe("segment")
    rng = np.random.default_rng(0)
    masks = torch.zeros(16, 1, 64, 64, dtype=torch.uint8)
    for row in masks:
        y, x = rng.integers(8, 40, 2)
        row[0, y : y + 16, x : x + 16] = 1
    only = Augment(
        **{name: getattr(recipe.augment, name) for name in ("hflip", "vflip", "rot90", "rotate", "crop_area")}
    )
    drawn = augment.draw(dataclasses.replace(recipe, augment=only), 16, rng)
    moved = augment.augment_masks(masks, drawn, only, (64, 64))
    images = augment.augment(masks.float().expand(-1, 3, -1, -1), drawn, only, (64, 64))
    assert set(moved.unique().tolist()) <= {0, 1}
    assert ((images[:, :1] > 0.5) == (moved == 1)).float().mean() > 0.995
    assert (moved != masks).any()


@pytest.mark.parametrize("kind", ["dice+ce", "dice+focal", "image-dice+ce"])
@pytest.mark.parametrize("exclusive", [True, False])
def test_the_loss_ignores_what_is_marked_and_falls_towards_the_truth(kind, exclusive):
    from medmamba.segmentation import create_segmenter

    config = create_segmenter("test", ("a", "b"), exclusive=exclusive, size=64).config
    criterion = SegmentationLoss(config, kind)
    masks = torch.zeros(2, 1 if exclusive else 2, 16, 16, dtype=torch.uint8)
    masks[:, 0, :8] = 1
    logits = torch.zeros(2, config.outputs, 16, 16)
    right = logits.clone()
    right[:] = -9
    if exclusive:
        right[:, 0, 8:], right[:, 1, :8] = 9, 9
    else:
        right[:, 0, :8] = 9
    assert criterion(right, masks) < 0.1 * criterion(logits, masks)
    masks[:, :, 4:12] = 255
    wrong = right.clone()
    wrong[:, :, 4:12] *= -1
    torch.testing.assert_close(criterion(wrong, masks), criterion(right, masks))


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_dice_of_images_is_the_mean_of_that_of_each(exclusive):
    from medmamba.segmentation import create_segmenter

    config = create_segmenter("test", ("a", "b"), exclusive=exclusive, size=64).config
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, config.outputs, 16, 16, generator=generator)
    masks = torch.randint(0, 3 if exclusive else 2, (3, 1 if exclusive else 2, 16, 16), generator=generator).byte()
    masks[1, :, 1:] = 0  # a small object
    masks[2, :, :3] = 255
    of_batch, of_images = SegmentationLoss(config), SegmentationLoss(config, "image-dice+ce")
    true = masks[:, 0].long() if exclusive else masks.float()
    each = torch.stack([of_images.overlap(logits[i : i + 1], true[i : i + 1]) for i in range(3)]).mean()
    whole = of_batch.overlap(logits, true)
    torch.testing.assert_close(of_images(logits, masks) - of_batch(logits, masks), each - whole)
    assert (each - whole).abs() > 1e-3


def test_a_stopped_run_can_end_with_its_best_epoch(discs, tmp_path, monkeypatch):
    from medmamba.training.segmentation import SegmentationTrainer

    def stop_in_the_second(self, stopping):
        return self.progress.epoch == 1

    monkeypatch.setattr(SegmentationTrainer, "_must_stop", stop_in_the_second)
    result = run(discs, tmp_path / "run", epochs=5, finish_early=True)
    assert result.finished and result.best_epoch == 1 and result.test.n == 6
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_teacher_is_learnt_beside_the_masks(discs, tmp_path):
    from medmamba.segmentation import create_segmenter

    teacher = create_segmenter("test", ("disc",), size=32).eval()
    with torch.no_grad():  # says that everything is a disc
        teacher.net.segmentation_head[0].weight.zero_()
        teacher.net.segmentation_head[0].bias.fill_(9.0)
    result = run(discs, tmp_path / "run", epochs=4, teacher=teacher, distill=1.0)
    found = result.load().predict(np.zeros((32, 32, 3), np.uint8)).probabilities
    assert found.mean() > 0.6  # 0.43 without a teacher
    with pytest.raises(RecipeError, match="teacher"):
        run(discs, tmp_path / "other", epochs=1, distill=0.5)
    with pytest.raises(RecipeError, match="classes"):
        run(discs, tmp_path / "other", epochs=1, distill=0.5, teacher=create_segmenter("test", ("dot",), size=32))


def test_recipes_of_classifiers_are_refused(discs, tmp_path):
    with pytest.raises(RecipeError, match="mixup"):
        run(discs, tmp_path / "run", epochs=1, mixup=0.2)


def test_data_without_splits_are_divided_and_missing_ones_are_named(tmp_path):
    write_pairs(tmp_path / "data", 12)
    result = run(tmp_path / "data", tmp_path / "run", epochs=1)
    assert result.val.n == 1 and result.test.n == 2
    write_pairs(tmp_path / "half" / "train", 4)
    with pytest.raises(DatasetError, match="no images in val"):
        run(tmp_path / "half", tmp_path / "other", epochs=1)
