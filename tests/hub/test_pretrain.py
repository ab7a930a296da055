"""General backbones: the pool without near-duplicates, the distillation, the record of the training, the transfer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hub import pretrain, pretrain_objectives, pretrain_pool, pretrain_table, recipe_table, transfer, transfer_table
from hub.pretrain_pool import SOURCES
from medmamba import MedMamba, create_model
from medmamba.cards import read_facts, render_card
from medmamba.data import ImageDataset
from medmamba.data.dataset import Record


def picture(path, rng, base=None):
    """A smooth random picture, or `base` with a little noise; returns its pixels."""
    if base is None:
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        base = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))
    else:
        base = np.clip(base.astype(int) + rng.integers(-4, 5, base.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(base).save(path)
    return base


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small datasets, one of them non-commercial. One training image is almost a test image of the other."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, classes in (("breastmnist", ("benign", "malignant")), ("dermamnist", ("nevus",))):
        for label in classes:
            for split, count in (("train", 4), ("val", 1), ("test", 2)):
                for number in range(count):
                    picture(root / name / split / label / f"{number}.png", rng)
    held_out = np.asarray(Image.open(root / "dermamnist" / "test" / "nevus" / "0.png"))
    picture(root / "breastmnist" / "train" / "benign" / "copy.png", rng, held_out)
    return root


@pytest.fixture(scope="module")
def pool(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.npz"
    return path, pretrain_pool.build(data, path)


def test_a_near_duplicate_of_a_held_out_image_is_left_out(pool):
    path, counts = pool
    assert counts == {"breastmnist": 8, "breastmnist: like a held-out image": 1, "dermamnist": 4}
    images, labels, meta = pretrain_pool.load(path)
    assert images.shape == (8, 224, 224, 3) and labels.tolist().count(0) == 4
    assert meta["classes"] == ["breastmnist: benign", "breastmnist: malignant", "dermamnist: nevus"]
    assert len(pretrain_pool.load(path, non_commercial=True)[0]) == 12


def test_the_pool_can_be_told_from_its_hashes(data, tmp_path):
    pretrain_pool.build(data, tmp_path / "pool.npz", hashes=tmp_path / "hashes")
    written = (tmp_path / "hashes").read_bytes()
    found = {written[i : i + 8] for i in range(0, len(written), 8)}
    folder = data / "breastmnist" / "train"
    expected = {pretrain_pool.digest(path) for path in folder.rglob("*.png") if path.name != "copy.png"}
    assert found == expected and len(written) == 8 * 8


@pytest.mark.slow
def test_no_released_backbone_has_seen_a_held_out_image(shared):
    """Of the images as files; near-duplicates were left out by the pool, see the test above."""
    if not (shared / "data" / "bloodmnist").is_dir():
        pytest.skip("the datasets are not here")
    written = (Path(pretrain_pool.__file__).parent / "results" / "pretraining-images.sha").read_bytes()
    seen = {written[i : i + 8] for i in range(0, len(written), 8)}
    models = Path(pretrain_pool.__file__).parent / "models"
    counts = json.loads((models / "tiny-medical" / "pretrain.json").read_text(encoding="utf-8"))["pool"]["counts"]
    free = sum(count for name, count in counts.items() if name in pretrain_pool.SOURCES and SOURCES[name].free)
    assert len(written) == 8 * free
    every = list(pretrain_pool.items(shared / "data"))
    learnt = {pretrain_pool.digest(item.path) for item in every if item.learn}
    held_out = {pretrain_pool.digest(item.path) for item in every if not item.learn}
    assert seen <= learnt and len(held_out) > 10_000  # the hashes are those of these files
    assert not seen & held_out


def test_the_sample_x_rays_are_not_among_the_pretraining_images():
    """Of the third tutorial, and of the app, whose images are smaller copies: of patients whom no other split has."""
    here = Path(pretrain_pool.__file__).parent
    written = (here / "results" / "pretraining-images.sha").read_bytes()
    seen = {written[i : i + 8] for i in range(0, len(written), 8)}
    samples = list((here.parent / "notebooks" / "data" / "chest").rglob("*.jpeg"))
    assert len(samples) == 208 and not seen & {pretrain_pool.digest(path) for path in samples}


class StandIn(nn.Module):
    """A teacher with maps at 1/16 and 1/32 of the image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 16, 16), nn.Conv2d(5, 7, 2, 2)
        self.eval().requires_grad_(False)

    def forward(self, x):
        middle = self.first(x)
        return [middle, self.second(middle)]


@pytest.fixture(scope="module")
def backbone(pool, tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("models") / "test-medical"
    pretrain.pretrain(
        pool[0], out, "test", epochs=12, size=64, device="cpu", progress=0, batch_size=4, teacher=StandIn()
    )
    return out


def test_a_backbone_learns_and_is_saved_without_a_classifier(backbone):
    model = MedMamba.from_pretrained(backbone)
    assert model.config.num_classes == 0
    log = json.loads((backbone / "pretrain.json").read_text())["log"]
    losses = [row["loss"] for row in log]
    assert len(log) >= 24 and log[-1]["done"] == 1 and np.mean(losses[-8:]) < np.mean(losses[:4])
    assert [maps.shape[1] for maps in model.forward_pyramid(torch.zeros(1, 3, 64, 64))] == list(model.config.dims)
    with pytest.raises(ValueError, match=r"no classifier.*reset_classifier"):
        model.predict(np.zeros((32, 32, 3), np.uint8))


OTHERS = {
    "labels": dict(teacher_weight=0, label_weight=1),
    "contrast": dict(teacher_weight=0, label_weight=0, contrast_weight=1),
    "masked": dict(teacher_weight=0, label_weight=0, masked_weight=1),
    "all": dict(contrast_weight=0.1, masked_weight=0.1),
}


@pytest.mark.parametrize("name", [pytest.param("labels", marks=pytest.mark.slow), "contrast", "masked", "all"])
def test_a_backbone_learns_by_every_objective(pool, name, tmp_path):
    torch.manual_seed(0)
    options = dict(views=160, size=64, device="cpu", progress=0, batch_size=8, ema=0.5, without=["dermamnist"])
    pretrain.pretrain(pool[0], tmp_path / name, "test", teacher=StandIn(), **options, **OTHERS[name])
    record = json.loads((tmp_path / name / "pretrain.json").read_text())
    losses = [row["loss"] for row in record["log"]]
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert record["views"] == 160 and record["without"] == ["dermamnist"] and record["settings"]["batch_size"] == 8
    training = MedMamba.from_pretrained(tmp_path / name).config.training
    assert ("teacher" in training) == (name == "all") and list(training["sources"]) == ["breastmnist"]
    text = render_card(read_facts(tmp_path / name), "medmamba/other")
    assert ("EfficientNet" in text) == (name == "all") and ("labels of the" in text) == (name in ("labels", "all"))
    for key, value in OTHERS[name].items():
        assert f"--{key.replace('_', '-')} {value:g}" in text
    assert "--without dermamnist" in text and "--views 160" in text and "--set batch_size=8 ema=0.5" in text


def test_the_contrast_is_lowest_where_the_two_views_agree():
    """By hand for two images: each row is compared with the three others."""
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    agree = pretrain_objectives.contrast(torch.cat([apart, apart * 5]))  # lengths do not count
    t = pretrain_objectives.TEMPERATURE
    assert torch.isclose(agree, torch.log(torch.exp(torch.tensor(1 / t)) + 2) - 1 / t)
    assert pretrain_objectives.contrast(torch.cat([apart, apart.flip(0)])) > agree + 1 / t - 0.1


def test_filling_in_counts_hidden_pixels_alone():
    """A network that answers with the mean colour is wrong by the mean absolute value of the hidden pixels."""
    model = pretrain_objectives.Pretraining(medmamba_of_test(), {"masked": 1}, 2, None)
    torch.nn.init.zeros_(model.pixels.weight)
    torch.nn.init.zeros_(model.pixels.bias)
    images = torch.rand(2, 3, 64, 64)
    model.standardise([images])
    constant = torch.full_like(images, 0.75)
    expected = (constant * model.scale + model.offset).abs().mean()
    assert torch.isclose(model.loss(constant, torch.zeros(2, 2)), expected, rtol=1e-2)


def medmamba_of_test():
    return create_model("test", num_classes=0)


def test_unusable_objectives_and_pools_are_refused(pool, tmp_path, capsys):
    student = medmamba_of_test()
    for weights, said in (
        ({"labels": 0}, "all 0"),
        ({"label": 1}, "no objective label"),
        ({"teacher": 1}, "a teacher"),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain_objectives.Pretraining(student, weights, 2, None)
    with pytest.raises(ValueError, match="no labelled images of retinamnist; it has those of breastmnist, dermamnist"):
        pretrain_pool.load(pool[0], without=["retinamnist"])
    assert len(pretrain_pool.load(pool[0], True, ["breastmnist"])[0]) == 4
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        pretrain.pretrain(pool[0], tmp_path / "x", "test", size=100)
    with pytest.raises(SystemExit):
        pretrain.main(["train", "--pool", str(pool[0]), "--out", str(tmp_path / "x"), "--set", "size=64"])
    assert "give these as options, not with --set: size" in capsys.readouterr().err


def test_objectives_are_compared_on_val_alone(tmp_path, monkeypatch, capsys):
    document = tmp_path / "backbones.md"
    monkeypatch.setattr(pretrain_table, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(pretrain_table, "DOCUMENT", document)
    document.write_text("before\n" + "\n".join(pretrain_table.MARKERS) + "\nafter\n")
    (tmp_path / "scores").mkdir()
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / f"contrast-seed{seed}")
        runs[-1].mkdir()
        weights = dict(teacher_weight=0, label_weight=0, contrast_weight=1, masked_weight=0, non_commercial=False)
        log = [{"loss": 2.0}, {"loss": 1.0}]
        (runs[-1] / "pretrain.json").write_text(
            json.dumps(dict(variant="nano", pool={}, log=log, seed=seed, **weights))
        )
        record = result(f"/x/contrast-seed{seed}", 0, 0.5 + 0.1 * seed, "probe", "dermamnist", "nano")
        (tmp_path / "scores" / f"{seed}.json").write_text(json.dumps(record | {"split": "val"}))
    scratch = result("scratch", 0, 0.25, "ten", "dermamnist", "nano") | {"split": "val"}
    (tmp_path / "scores" / "s.json").write_text(json.dumps(scratch))
    words = ["table", str(tmp_path / "scores"), "--runs", *map(str, runs)]
    assert pretrain.main(words) == 0 and pretrain.main(["table", "--check"]) == 0
    page = document.read_text()
    assert "**dermamnist, nano**, 78 validation images" in page
    row = "| `contrast` | contrast 1 | 0.550 ± 0.071 / 0.550 ± 0.071 |  |  |"
    assert row in page and page.index("| `scratch` |  |  | 0.250 / 0.250 |  |") < page.index(row)
    with pytest.raises(ValueError, match="of test images"):
        transfer_table.keep([tmp_path / "scores"])
    (tmp_path / "changed").mkdir()
    for changed in ({"settings": {"lr": 1e-3}}, {"balance": "none"}):
        (tmp_path / "changed" / "0.json").write_text(json.dumps(result("scratch", 0, 0.5) | changed))
        with pytest.raises(ValueError, match="another recipe"):
            transfer_table.keep([tmp_path / "changed"])
    monkeypatch.setattr(transfer_table, "KEPT", tmp_path / "kept-transfer")
    weighted = result("scratch", 0, 0.5) | {"settings": {"balance": "loss"}, "balance": "loss"}
    (tmp_path / "changed" / "0.json").write_text(json.dumps(weighted))
    (tmp_path / "changed" / "1.json").write_text(json.dumps(result("scratch", 0, 0.5) | {"balance": "loss-sqrt"}))
    kept = transfer_table.keep([tmp_path / "changed"])
    assert [path.name for path in kept] == [f"scratch-breastmnist-{way}-0.json" for way in ("full-weights", "full")]
    assert json.loads(kept[0].read_text()) == result("scratch", 0, 0.5, "full-weights") | {"balance": "loss"}
    (tmp_path / "scores" / "s.json").write_text(json.dumps(result("scratch", 0, 0.25)))
    with pytest.raises(ValueError, match="scored on test images"):
        pretrain.main(words)
    document.write_text(page.replace("0.550", "0.999"))
    assert pretrain.main(["table", "--check"]) == 1 and "hub.pretrain table" in capsys.readouterr().err


def test_its_record_and_card_state_what_it_learnt_from(backbone):
    training = MedMamba.from_pretrained(backbone).config.training
    assert training["sources"] == {
        "breastmnist": {
            "title": pretrain_pool.SOURCES["breastmnist"].title,
            "licence": "CC BY 4.0",
            "images": 8,
            "excluded": 1,
        }
    }
    assert training["labels_of"] == ["breastmnist"] and training["images"] == 8 and training["licence"] == "cc-by-4.0"
    before = (backbone / "config.json").read_text()
    assert pretrain.main(["describe", str(backbone)]) == 0
    assert json.loads((backbone / "config.json").read_text()) == json.loads(before)
    text = render_card(read_facts(backbone), "medmamba/test-medical")
    for said in ("Apache-2.0", "metadata name no licence", "CC BY 4.0 | 8 | 1 |", "**not** transfer to unseen data"):
        assert said in text
    assert "pipeline_tag: image-feature-extraction" in text and "--from medmamba/test-medical" in text


def result(start, seed, accuracy, way="full", name="breastmnist", variant="tiny"):
    scores = dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"), accuracy)
    images = {"train": 546, "val": 78, "test": 156}
    return dict(start=start, set=name, way=way, seed=seed, variant=variant, images=images, size=224, **scores)


def test_the_table_has_mean_spread_and_number_of_seeds(tmp_path, monkeypatch, capsys):
    models = tmp_path / "models"
    models.mkdir()
    for name, value in (("KEPT", tmp_path / "kept"), ("MODELS", models), ("DOCUMENT", tmp_path / "backbones.md")):
        monkeypatch.setattr(transfer_table, name, value)
    transfer_table.DOCUMENT.write_text("before\n" + "\n".join(transfer_table.MARKERS) + "\nafter\n")
    (tmp_path / "new").mkdir()
    records = [result("/somewhere/tiny-medical", seed, value) for seed, value in enumerate((0.8, 0.84, 0.88))]
    records += [result("scratch", 0, 0.5), result("scratch", 0, 0.7, name="dermamnist")]
    for number, record in enumerate(records):
        (tmp_path / "new" / f"{number}.json").write_text(json.dumps(record))
    assert transfer.main(["table", "--check"]) == 1
    assert transfer.main(["table", str(tmp_path / "new")]) == 0 and transfer.main(["table", "--check"]) == 0
    page = transfer_table.DOCUMENT.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "somewhere" not in page
    row = "| all training images | 546 | `tiny-medical` | 224 | 3 |" + " 0.840 ± 0.040 |" * 3
    assert row in page and page.index("`scratch` | 224 | 1 | 0.500 |") < page.index(row)
    assert page.index("### dermamnist, tiny\n\n156 test images; not in the pool") < page.index("### breastmnist, tiny")
    (tmp_path / "new" / "0.json").write_text(json.dumps(records[0] | {"images": {"train": 20, "test": 156}}))
    with pytest.raises(ValueError, match="different images"):
        transfer.main(["table", str(tmp_path / "new")])


def test_the_committed_tables_are_those_of_the_kept_results():
    assert transfer.main(["table", "--check"]) == 0, "run: python -m hub.transfer table"
    assert pretrain.main(["table", "--check"]) == 0, "run: python -m hub.pretrain table"
    assert recipe_table.main(["--check"]) == 0, "run: python -m hub.recipe_table"
    paths = sorted(transfer_table.KEPT.glob("*/*.json"))
    assert paths
    paths += [*pretrain_table.KEPT.glob("**/*.json"), *recipe_table.KEPT.glob("*.json")]
    for path in paths:
        assert not re.search(r"/(work|tmp|home|root|Users)/", path.read_text(encoding="utf-8")), path


def test_training_images_are_drawn_by_class_and_seed():
    splits = ["train"] * 100 + ["test"] * 10
    labels = [0] * 88 + [1] * 10 + [2] * 2 + [0] * 10
    index = ImageDataset([Record(i, labels[i], splits[i]) for i in range(110)], ("a", "b", "c"), reader=None)
    part = transfer.limit_training(index, 20)
    assert part.split("train").class_counts.tolist() == [18, 2, 1] and part.split_sizes["test"] == 10
    assert part.records == transfer.limit_training(index, 20).records
    assert part.records != transfer.limit_training(index, 20, seed=1).records
    assert transfer.limit_training(part, 21) is part
    assert transfer.ten_per_class(index, 0).split("train").class_counts.tolist() == [10, 10, 2]


def test_a_start_is_measured_once_by_every_way(backbone, data, tmp_path, monkeypatch, capsys):
    root, rng = tmp_path / "data", np.random.default_rng(1)
    for split, count in (("train", 5), ("val", 2), ("test", 2)):
        for label in ("a", "b"):
            for number in range(count):
                picture(root / "cells" / split / label / f"{number}.png", rng)
    monkeypatch.setattr(
        transfer, "fine_tune", lambda *args: dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"), 1)
    )
    words = ["measure", "--data", str(root), "--out", str(tmp_path / "out"), "--sets", "cells", "--variant", "test"]
    words += ["--starts", "scratch", str(backbone), "--seeds", "0", "1", "--device", "cpu", "--train-images", "8"]
    assert transfer.main(words) == 0
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 9  # two seeds of two starts and two ways, and one probe
    found = json.loads((tmp_path / "out" / "test-medical-cells-probe-0.json").read_text())
    assert found["images"] == {"train": 8, "val": 4, "test": 4} and 0 <= found["auroc"] <= 1 and found["size"] == 32
    capsys.readouterr()
    assert transfer.main(words) == 0 and not capsys.readouterr().out
    full = json.loads((tmp_path / "out" / "scratch-cells-full-0.json").read_text())
    assert full["balance"] == "loss-sqrt" and "balance" not in found
    for other, said in ((["--split", "val"], 'split "test", not "val"'), (["--set", "lr=1e-4"], 'not {"lr":')):
        with pytest.raises(ValueError, match=said):
            transfer.main([*words, *other])


def test_settings_are_those_of_every_start(tmp_path, monkeypatch):
    class Chosen(Exception):
        pass

    def stop(*given, **options):
        raise Chosen(given, options)

    monkeypatch.setattr(transfer, "train", stop)
    monkeypatch.setattr(transfer, "load_recipe", stop)
    for start in ("scratch", "medmamba/tiny-medical", transfer.teacher.NAME):
        settings = {"balance": "none", "layer_decay": 0.5}
        with pytest.raises(Chosen) as found:
            transfer.fine_tune(start, None, tmp_path, "cpu", 0, "tiny", 64, settings=settings)
        options = found.value.args[1]
        assert (options["size"], options["balance"], options["layer_decay"]) == (64, "none", 0.5)


@pytest.mark.parametrize("way", ["probe", pytest.param("full", marks=pytest.mark.slow)])
def test_starts_can_be_compared_without_reading_test_images(backbone, way, tmp_path, capsys):
    rng = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 2)):
        for label in ("a", "b"):
            for number in range(count):
                picture(tmp_path / "cells" / split / label / f"{number}.png", rng)
    unreadable = tmp_path / "cells" / "test" / "a" / "0.png"
    unreadable.parent.mkdir(parents=True)
    unreadable.write_bytes(b"no image")
    words = ["measure", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--sets", "cells", "--seeds", "0"]
    words += ["--starts", str(backbone), "--device", "cpu", "--split", "val", "--cache", str(tmp_path / "cache")]
    assert transfer.main([*words, "--ways", way]) == 0
    found = json.loads((tmp_path / "out" / f"test-medical-cells-{way}-0.json").read_text())
    assert found["split"] == "val" and found["images"] == {"train": 6, "val": 4} and 0 <= found["auroc"] <= 1
    assert way == "probe" or sorted((tmp_path / "cache" / "cells" / "full").glob("*.npy"))


def test_changes_of_the_recipe_are_compared_on_val_alone(tmp_path, monkeypatch):
    document, scores = tmp_path / "training.md", tmp_path / "scores"
    monkeypatch.setattr(recipe_table, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(recipe_table, "DOCUMENT", document)
    document.write_text("before\n" + "\n".join(recipe_table.MARKERS) + "\nafter\n")
    for number, settings in enumerate(({}, {"balance": "none"}, {"balance": "none"})):
        folder = tmp_path / "scores" / str(number)
        folder.mkdir(parents=True)
        record = result("/x/tiny-medical", number, 0.5 + 0.1 * number) | {"split": "val"}
        name = f"tiny-medical-breastmnist-full-{number}.json"
        (folder / name).write_text(json.dumps(record | ({"settings": settings} if settings else {})))
    assert recipe_table.main([str(scores / "0"), str(scores / "1"), str(scores / "2")]) == 0
    assert recipe_table.main(["--check"]) == 0 and len(list((tmp_path / "kept").glob("*.json"))) == 3
    page = document.read_text()
    assert "| breastmnist | tiny, `tiny-medical` | as it is | 1 | 0.500 | 0.500 | 0.500 |" in page
    assert "| tiny, `tiny-medical` | `balance=none` | 2 |" + " 0.650 ± 0.071 |" * 3 in page
    assert "/x/" not in "".join(path.read_text() for path in (tmp_path / "kept").glob("*.json"))
    document.write_text(page.replace("0.650", "0.950"))
    assert recipe_table.main(["--check"]) == 1
    (scores / "0" / "tiny-medical-breastmnist-full-0.json").write_text(json.dumps(result("scratch", 0, 0.5)))
    with pytest.raises(ValueError, match="scored on test images"):
        recipe_table.main([str(scores / "0")])
