"""What a source gives away: linear classifiers that see no more than it, and the card that shows them."""

import json

import numpy as np
import pytest
from PIL import Image

from hub import shortcuts
from medmamba.cards import SHORTCUTS_NAME
from medmamba.data import open_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise, with a bright frame in one class; in the external images, the frame is in the other."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8), ("test", 8), ("elsewhere", 8)):
        for label in ("a", "b"):
            folder = root / ("external" if split == "elsewhere" else f"own/{split}") / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 120, (80, 96, 3), dtype=np.uint8)
                if (label == "a") != (split == "elsewhere"):
                    pixels[:6], pixels[-6:] = 220, 220
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_a_frame_that_tells_the_class_is_found_and_does_not_hold_elsewhere(data, tmp_path, capsys):
    arguments = ["--data", str(data / "own"), "--external", str(data / "external"), "--out", str(tmp_path)]
    assert shortcuts.main(arguments) == 0
    rows = json.loads((tmp_path / SHORTCUTS_NAME).read_text(encoding="utf-8"))["rows"]
    for way in shortcuts.WAYS:
        assert rows[way]["internal"]["accuracy"] == 1 and rows[way]["external"]["accuracy"] == 0
        assert rows[way]["internal"]["sensitivity"] == {"a": 1.0, "b": 1.0} and rows[way]["external"]["images"] == 16
    assert json.loads(capsys.readouterr().out) == rows


def test_each_way_sees_only_its_own(data):
    grey = shortcuts.grey_images(open_dataset(data / "own").split("val"))
    inside, outside = grey.copy(), grey.copy()
    inside[:, shortcuts.FRAME : -shortcuts.FRAME, shortcuts.FRAME : -shortcuts.FRAME] = 0
    assert np.array_equal(shortcuts.frames(grey), shortcuts.frames(inside))
    outside[:, 0, 0] = 1
    assert not np.array_equal(shortcuts.frames(grey), shortcuts.frames(outside))
    block = grey.copy()
    block[:, :8, :8] = grey[:, :8, :8].mean((1, 2), keepdims=True)
    assert np.allclose(shortcuts.thumbnails(grey), shortcuts.thumbnails(block), atol=1e-6)
