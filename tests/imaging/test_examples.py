"""The images that come with the package."""

import re
from pathlib import Path

import numpy as np
import pytest

import medmamba

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "examples"


def test_every_example_is_named_read_and_credited():
    files = [path for path in FOLDER.iterdir() if path.suffix in (".webp", ".jpeg", ".jpg")]
    said = medmamba.example_image.__doc__
    credits = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in files:
        kind, _, what = path.stem.partition("_")
        assert what in re.sub(r"\s+", " ", said) and f"`{kind}_*" in credits
        image = medmamba.example_image(path.stem)
        assert image.source == path.name
        assert image.pixels.shape[:2] == {"skin": (256, 256), "smear": (480, 640)}.get(kind, (224, 224))
        np.testing.assert_array_equal(image.pixels, medmamba.load_image(path).pixels)
    assert len(files) == 22


def test_the_default_and_names_with_spaces():
    assert medmamba.example_image().source == "blood_neutrophil.webp"
    assert medmamba.example_image("blood immature granulocyte").source == "blood_immature_granulocyte.webp"


@pytest.mark.parametrize("name", ["blood", "../README", "", "chest_xray_sample"])
def test_other_names_are_refused_with_a_list(name):
    with pytest.raises(medmamba.ImageError, match=r"blood_basophil.*chest_pneumonia.*skin_melanoma"):
        medmamba.example_image(name)
