"""Greyscale images given to models of colour images, and the reverse."""

import numpy as np
import pytest

from medmamba.imaging import load_image
from medmamba.imaging.colour import chroma, colour_note

RNG = np.random.default_rng(0)
GREY = np.repeat(RNG.integers(0, 256, (40, 50, 1), np.uint8), 3, 2)
COLOUR = RNG.integers(0, 256, (40, 50, 3), np.uint8)


@pytest.mark.parametrize(
    ("pixels", "trained", "warned"),
    [
        (GREY, True, "greyscale image"),
        (GREY, False, ""),
        (GREY, None, ""),
        (GREY[..., 0], True, "greyscale image"),
        (COLOUR, False, "colour image"),
        (COLOUR, True, ""),
        (GREY * 0 + 7, True, ""),
    ],
)
def test_the_kind_of_image_is_compared_with_that_of_training(pixels, trained, warned):
    note = colour_note(load_image(pixels), trained)
    assert warned in note and bool(note) == bool(warned)


def test_traces_of_compression_are_not_colour():
    noisy = np.clip(GREY.astype(int) + RNG.integers(0, 2, GREY.shape), 0, 255).astype(np.uint8)
    assert 0 < chroma(load_image(noisy)) < 0.004


def test_predictions_warn(tiny_model):
    config = tiny_model.config
    for dataset, images in (("bloodmnist", (GREY, COLOUR)), ("pneumoniamnist", (COLOUR, GREY))):
        tiny_model.config = config.replace(training={"dataset": dataset})
        notes = [[n for n in p.image_notes if "was trained on" in n] for p in tiny_model.predict(list(images))]
        assert [len(n) for n in notes] == [1, 0]
