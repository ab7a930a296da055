"""`python -m hub.corruptions` and the table in the card."""

import numpy as np
import pytest
from PIL import Image

import medmamba
from hub import corruptions
from medmamba.cards import render_card
from medmamba.cards.facts import CardError, read_facts
from medmamba.evaluation.corruptions import PUBLISHED, load_corruptions


@pytest.fixture
def trial(tmp_path, monkeypatch):
    kept = {"contrast_down": PUBLISHED["breastmnist"]["contrast_down"]}
    monkeypatch.setattr("medmamba.evaluation.corruptions.run.PUBLISHED", {"breastmnist": kept})
    model = medmamba.create_model("test", num_classes=2)
    model.config = model.config.replace(
        id2label={0: "malignant", 1: "normal, benign"}, training={"dataset": "breastmnist", "split": "own"}
    )
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for label in ("malignant", "normal, benign"):
        folder = tmp_path / "data" / "breastmnist" / "test" / label
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_the_command_writes_what_the_card_shows(trial, capsys):
    words = ["--data", str(trial / "data"), "--models", str(trial / "model"), "--cache", str(trial / "cache")]
    assert corruptions.main([*words, "--images", "6", "--resamples", "10", "--device", "cpu"]) == 0
    found = load_corruptions(trial / "model")
    assert found.n_images == 6 and found.n_available == 8 and list(found.errors) == ["contrast_down"]
    text = render_card(read_facts(trial / "model"), "org/name")
    assert "## Corrupted images" in text and found.to_markdown().strip() in text
    assert "--images 6`" in text


def test_a_table_of_other_weights_is_not_shown(trial):
    words = ["--data", str(trial / "data"), "--models", str(trial / "model"), "--cache", str(trial / "cache")]
    corruptions.main([*words, "--images", "4", "--resamples", "0", "--device", "cpu"])
    path = trial / "model" / "corruptions.json"
    weights = load_corruptions(trial / "model").weights
    path.write_text(path.read_text().replace(weights, "0" * 64))
    assert "## Corrupted images" not in render_card(read_facts(trial / "model"), "org/name")
    path.write_text("{}")
    with pytest.raises(CardError, match=r"corruptions\.json cannot be read"):
        read_facts(trial / "model")
