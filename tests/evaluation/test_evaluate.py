"""Evaluation of a model on a dataset: scores, result files and matching of classes."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import medmamba
from medmamba.cli import evaluate as cli_evaluate
from medmamba.data import DatasetError, ImageDataset, Record, open_dataset, registry
from medmamba.evaluation import decode, evaluate_model, match_classes, score
from medmamba.inference.predict import predict
from medmamba.metrics import Evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Makes three classes of noise images of different sizes, one of them grey, in a test split."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for label in range(3):
        (root / "test" / f"class_{label}").mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 255, (32 + 8 * i, 40, 3), dtype=np.uint8)
            image = Image.fromarray(pixels if i else pixels[..., 0])
            image.save(root / "test" / f"class_{label}" / f"p{i // 2}_{label}{i}.png")
    return root


@pytest.fixture
def calibrated(tiny_model):
    tiny_model.config = tiny_model.config.replace(
        calibration={"method": "temperature", "temperature": 2.0, "n": 9, "ece_before": 0.2, "ece_after": 0.1}
    )
    return tiny_model


def test_it_scores_what_predict_says(calibrated, folder):
    """Same logits, to half an 8-bit level after resizing, and same calibrated probabilities."""
    scored = evaluate_model(calibrated, folder, device="cpu", resamples=50, batch_size=4)
    index = open_dataset(folder, "test")
    said = [predict(calibrated, folder / str(record.source)) for record in index.records]
    assert np.abs(scored.logits - np.array([p.logits for p in said])).max() < 0.02
    right = np.mean([p.label == index.classes[record.label] for p, record in zip(said, index.records, strict=True)])
    assert scored.evaluation["accuracy"] == pytest.approx(right)
    probabilities = [dict(p.top)[index.classes[record.label]] for p, record in zip(said, index.records, strict=True)]
    assert scored.evaluation["nll"] == pytest.approx(-np.mean(np.log(probabilities)), abs=0.02)
    assert scored.uncalibrated["accuracy"] == scored.evaluation["accuracy"]
    assert scored.uncalibrated["nll"] != scored.evaluation["nll"]


def test_everything_is_written_and_readable(calibrated, folder, tmp_path):
    scored = evaluate_model(calibrated, folder, out=tmp_path, device="cpu", resamples=50)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results.json", "results.md", "confusion.png", "roc.png", "reliability.png"}
    data = json.loads((tmp_path / "results.json").read_text())["splits"]["test"]
    assert data.pop("uncalibrated")["ece"] == scored.uncalibrated["ece"]
    assert Evaluation.from_dict(data)["auroc"] == scored.evaluation["auroc"]
    assert "Balanced accuracy" in (tmp_path / "results.md").read_text()
    for name in ("confusion", "roc", "reliability"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300


def test_batches_do_not_matter_and_the_model_is_left_as_it_was(tiny_model, folder):
    tiny_model.train()
    one = evaluate_model(tiny_model, folder, device="cpu", batch_size=1, resamples=0)
    many = evaluate_model(tiny_model, folder, device="cpu", batch_size=64, resamples=0)
    assert np.abs(one.logits - many.logits).max() < 1e-4
    assert tiny_model.training and one.uncalibrated is None


def test_classes_are_matched_by_name_not_by_place(tiny_model, folder):
    config = tiny_model.config
    index = open_dataset(folder, "test")
    backwards = ImageDataset(
        [dataclasses.replace(r, label=2 - r.label) for r in index.records], index.classes[::-1], index.reader
    )
    assert match_classes(backwards, config).labels.tolist() == index.labels.tolist()
    part = ImageDataset([Record("x", 0), Record("y", 1)], ["Class 2", "class-0"], index.reader)
    assert match_classes(part, config).labels.tolist() == [2, 0]
    stranger = ImageDataset([Record("x", 0)], ["mole", "class_1"], index.reader)
    with pytest.raises(DatasetError, match=r"does not know mole; it knows class_0, class_1, class_2"):
        match_classes(stranger, config)
    several = ImageDataset([Record("x", (0, 1, 1))], ["class_2", "class_0", "class_1"], index.reader, "multilabel")
    with pytest.raises(DatasetError, match="multilabel task and the model is multiclass"):
        match_classes(several, config)
    assert match_classes(several, config.replace(task="multilabel")).labels.tolist() == [[1, 1, 0]]


def test_short_names_of_the_registry_fit_a_model_with_long_ones(tiny_model):
    entry = next(e for e in map(registry.get, registry.names()) if e.display_names and e.display_names != e.classes)
    config = tiny_model.config.replace(num_classes=entry.num_classes, id2label=entry.id2label)
    records = [Record(str(i), i) for i in range(entry.num_classes)]
    index = ImageDataset(records, entry.classes, reader=None)
    known = config.replace(training={"dataset": entry.name})
    assert match_classes(index, known).labels.tolist() == list(range(entry.num_classes))
    assert list(match_classes(index, known).classes) == known.labels


def test_patients_are_resampled_where_they_are_known(tiny_model, folder):
    plain = evaluate_model(tiny_model, folder, device="cpu", resamples=20)
    grouped = evaluate_model(tiny_model, folder, device="cpu", resamples=20, patient_pattern=r"^(p\d)_")
    assert (plain.evaluation.resampled_by, grouped.evaluation.resampled_by) == ("image", "patient")
    assert grouped.evaluation.n_patients == 3


def test_decoding_gives_the_preprocessed_image_in_eight_bits(tiny_model, folder):
    from medmamba.imaging.load import load_image
    from medmamba.imaging.preprocess import normalise, preprocess

    index = open_dataset(folder, "test")
    config = tiny_model.config
    images, _ = decode(index, config).batch([0, 3])
    for i, found in zip((0, 3), normalise(images, config.preprocess), strict=True):
        expected = preprocess(load_image(folder / str(index.records[i].source)), config.preprocess)
        assert (found - expected).abs().max() <= 1 / 255 + 1e-6


def test_missing_split_and_missing_model(tiny_model, folder, tmp_path):
    with pytest.raises(DatasetError, match="val"):
        evaluate_model(tiny_model, folder, "val", device="cpu")
    assert evaluate_model(tiny_model, folder, None, device="cpu", resamples=0).evaluation.n_images == 15
    with pytest.raises(medmamba.PretrainedError):
        evaluate_model(tmp_path / "nothing", folder, device="cpu")


def test_scores_of_known_logits(folder, tiny_model):
    index = open_dataset(folder, "test")
    logits = torch.eye(3)[index.targets] * 5
    scored = score(logits, index, tiny_model.config, resamples=0)
    assert scored.evaluation["accuracy"] == 1 and scored.evaluation["auroc"] == 1
    assert score(-logits, index, tiny_model.config, resamples=0).evaluation["accuracy"] == 0


def test_command_line(tiny_model, folder, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    cli_evaluate.add_parser(parser.add_subparsers(required=True))
    command = f"evaluate --model {tmp_path / 'model'} --data {folder} --out {tmp_path / 'out'} --quiet --device cpu"
    args = parser.parse_args([*command.split(), "--resamples", "20"])
    assert args.run(args) == 0
    assert "15 images, 3 classes" in capsys.readouterr().out and (tmp_path / "out" / "results.json").exists()
