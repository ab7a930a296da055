"""A small file with several labels per image, and one with grades, each from the images to the model card."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hub.validate import validate
from medmamba import MedMamba
from medmamba.__main__ import main
from medmamba.cards import check_card, read_facts, write_card
from medmamba.data import DatasetError, open_dataset, registry
from medmamba.evaluation import evaluate_model
from medmamba.metrics import evaluate
from medmamba.metrics.calibration import to_probabilities
from medmamba.training import train
from medmamba.training.loss import classification_loss, soft_targets
from medmamba.training.recipe import RecipeError

CHEST, RETINA = registry.get("chestmnist"), registry.get("retinamnist")
OPTIONS = dict(
    epochs=5, batch_size=16, size=32, lr=5e-3, warmup_epochs=0, label_smoothing=0, ema=0, **{"augment.hflip": 0}
)
COMMON = dict(device="cpu", progress=False)


def chest_file(path: Path, n: int = 96) -> Path:
    """Writes a file as ChestMNIST is stored, (N, 28, 28) uint8 and (N, 14) labels: label i brightens cell i."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        labels = (rng.random((count, 14)) < 0.3).astype(np.uint8)
        labels[:14] |= np.eye(14, dtype=np.uint8)
        images = rng.normal(60, 8, (count, 28, 28))
        for label in range(14):
            row, column = 7 * (label // 4), 7 * (label % 4)
            images[:, row : row + 7, column : column + 7] += 130 * labels[:, label, None, None]
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    np.savez_compressed(path, **arrays)
    return path


def retina_file(path: Path, n: int = 80) -> Path:
    """Writes a file as RetinaMNIST is stored, (N, 28, 28, 3) uint8 and (N, 1) grades: the higher, the brighter."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        grades = np.arange(count) % 5
        images = rng.normal(40, 12, (count, 28, 28, 3)) + 35 * grades[:, None, None, None]
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8)}
        arrays |= {f"{split}_labels": grades[:, None].astype(np.uint8)}
    np.savez_compressed(path, **arrays)
    return path


def problems(folder: Path, repo: str) -> list[str]:
    """What hub.publish would object to, but for the figures, which tests of training do not draw."""
    return [text for text in validate(folder, repo).problems if not text.endswith("medmamba evaluate writes it")]


def said(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_several_labels_from_the_file_to_the_card(tmp_path, capsys) -> None:
    data = chest_file(tmp_path / "chestmnist.npz")
    out = tmp_path / "chestmnist"
    result = train(data, out, "finetune", "test", dataset="chestmnist", select=["auroc", "loss"], **OPTIONS, **COMMON)
    model = result.load()
    assert model.config.task == "multilabel" and model.config.labels == list(CHEST.id2label.values())
    limits = model.config.calibration["thresholds"]
    assert len(limits) == 14 and len(set(limits)) > 1
    assert result.test["auroc"] > 0.7  # 0.5 by chance
    # The thresholds come from val alone and are those that evaluate and predict apply.
    val = evaluate_model(model, data, "val", dataset="chestmnist", device="cpu", resamples=0)
    assert val.evaluation.threshold == tuple(limits)
    p = to_probabilities(val.logits, "multilabel", model.config.calibration["temperature"])
    assert val.evaluation["f1"] >= evaluate(val.labels, p, model.config.labels, task="multilabel", resamples=0)["f1"]
    image = open_dataset(data, "test").image(0)
    found = model.predict(image)
    by_name = dict(found.top)
    wanted = [name for name, limit in zip(model.config.labels, limits, strict=True) if by_name[name] > limit]
    assert found.labels == wanted and found.grade is None and found.to_dict()["labels"] == wanted
    Image.fromarray((image.pixels[..., 0] * 255).astype(np.uint8)).save(tmp_path / "x.png")
    record = json.loads(said(capsys, "predict", str(tmp_path / "x.png"), "--model", str(out), "--json"))
    assert record["labels"] == wanted
    rows = list(
        csv.DictReader(io.StringIO(said(capsys, "predict", str(tmp_path / "x.png"), "--model", str(out), "--csv")))
    )
    assert rows[0]["labels"] == ";".join(wanted)
    shown = said(capsys, "predict", str(tmp_path / "x.png"), "--model", str(out))
    assert (", ".join(wanted) or "none of the labels") in shown
    table = said(
        capsys,
        "evaluate",
        "--model",
        str(out),
        "--data",
        str(data),
        "--dataset",
        "chestmnist",
        "--resamples",
        "20",
        "--device",
        "cpu",
        "--quiet",
    )
    assert "| Class | Images | Threshold |" in table and "Accuracy at a threshold of 0.5" in table
    card = write_card(out).read_text()
    assert not check_card(card, read_facts(out))
    assert "Several labels can apply" in card and f"hernia {limits[13]:.3g}" in card
    assert not problems(out, "medmamba/chestmnist")


def test_grades_from_the_file_to_the_card(tmp_path, capsys) -> None:
    data = retina_file(tmp_path / "retinamnist.npz")
    out = tmp_path / "retinamnist"
    chosen = dict(select=["quadratic_kappa", "loss"])
    result = train(data, out, "finetune", "test", dataset="retinamnist", **chosen, **OPTIONS, **COMMON)
    model = result.load()
    assert model.config.task == "ordinal" and model.config.labels == list(RETINA.id2label.values())
    assert result.test["quadratic_kappa"] > 0.6 and result.test["mae"] < 1
    rows = [row["val_quadratic_kappa"] for row in result.history]
    assert rows[result.best_epoch - 1] == max(rows)
    found = model.predict(open_dataset(data, "test").image(4))
    weights = [p * model.config.labels.index(name) for name, p in found.top]
    assert found.grade == pytest.approx(sum(weights), abs=1e-5) and found.labels is None
    table = said(
        capsys,
        "evaluate",
        "--model",
        str(out),
        "--data",
        str(data),
        "--dataset",
        "retinamnist",
        "--resamples",
        "20",
        "--device",
        "cpu",
        "--quiet",
    )
    assert "Quadratic-weighted kappa" in table and "Rows: true class" in table
    card = write_card(out).read_text()
    assert not check_card(card, read_facts(out))
    assert "grades in ascending order" in card and "type: quadratic_kappa" in card
    assert not problems(out, "medmamba/retinamnist")


def graded_folder(root: Path, names: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for grade, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(40 + 60 * grade, 8, (32, 32)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_grades_of_a_folder_need_their_order(tmp_path) -> None:
    names = ("mild", "severe", "extreme")  # sorted by name: extreme, mild, severe
    data = graded_folder(tmp_path / "data", names)
    quick = {**OPTIONS, "epochs": 1, "batch_size": 6}
    with pytest.raises(DatasetError, match="needs its grades in order"):
        train(data, tmp_path / "a", "finetune", "test", task="ordinal", **quick, **COMMON)
    assert not (tmp_path / "a").exists()
    with pytest.raises(RecipeError, match="needs an ordinal task"):
        train(data, tmp_path / "c", "finetune", "test", select=["quadratic_kappa"], **quick, **COMMON)


@pytest.mark.slow
def test_the_command_trains_on_grades_of_a_folder(tmp_path) -> None:
    names = ("mild", "severe", "extreme")
    data = graded_folder(tmp_path / "data", names)
    quick = {**OPTIONS, "epochs": 1, "batch_size": 6}
    words = ["train", "--data", str(data), "--out", str(tmp_path / "b"), "--recipe", "finetune", "--variant", "test"]
    words += ["--task", "ordinal", "--classes", *names, "--device", "cpu", "--quiet", "--set"]
    assert main([*words, *(f"{key}={json.dumps(value)}" for key, value in quick.items())]) == 0
    model = MedMamba.from_pretrained(tmp_path / "b")
    assert model.config.task == "ordinal" and model.config.labels == list(names)


def test_a_distant_grade_costs_more_than_the_next() -> None:
    targets = soft_targets(torch.tensor([0]), 5, 0.0)
    logits = 4 * torch.eye(5)
    losses = [float(classification_loss(logits[i : i + 1], targets, "ordinal")) for i in range(5)]
    plain = [float(classification_loss(logits[i : i + 1], targets, "multiclass")) for i in range(5)]
    assert losses == sorted(losses) and losses[0] < 0.1 and len(set(np.round(plain[1:], 5))) == 1
    # Cross entropy plus the squared differences of the cumulative distributions, with weights per true class.
    p = logits[2].softmax(0)
    by_hand = float(-p[0].log() + ((p.cumsum(0) - 1) ** 2).sum())
    assert losses[2] == pytest.approx(by_hand, rel=1e-5)
    weights = torch.tensor([2.0, 1, 1, 1, 1])
    assert float(classification_loss(logits[2:3], targets, "ordinal", weights)) == pytest.approx(2 * by_hand, rel=1e-5)
