"""The golden prediction: a reference output stored with a model, to verify that its weights load and run correctly."""

from pathlib import Path

import numpy as np

from medmamba import MedMamba
from medmamba.imaging.load import MedicalImage
from medmamba.utils.text import json_text

GOLDEN_NAME = "golden.json"
HEIGHT, WIDTH = 96, 128
TOLERANCE = 2e-3  # relative to the largest logit, at least 2e-3: float32 across machines and backends


class GoldenError(ValueError):
    """A model does not reproduce its golden prediction."""


def golden_image(channels: int) -> np.ndarray:
    """Returns a uint8 (96, 128, channels) test image, from integer arithmetic, so identical on every machine."""
    y, x, c = np.mgrid[:HEIGHT, :WIDTH, :channels]
    return ((x * (3 + c) + y * (5 - c) + (x * y) // (7 + 2 * c)) % 256).astype(np.uint8)


def _predict(model: MedMamba):
    pixels = golden_image(model.config.in_chans).astype(np.float32) / 255
    return model.predict(MedicalImage(pixels, source="golden", format="numpy", mode="uint8", bit_depth=8))


def write_golden(model: MedMamba, folder: Path) -> dict:
    """Writes golden.json, the logits of `golden_image` with the model's own preprocessing; returns its content."""
    channels, prediction = model.config.in_chans, _predict(model)
    golden = {
        "image": f"hub.golden.golden_image({channels}): uint8 ({HEIGHT}, {WIDTH}, {channels})",
        "labels": model.config.labels,
        "logits": [round(value, 6) for value in prediction.logits],
        "label": prediction.label,
    }
    Path(folder, GOLDEN_NAME).write_text(json_text(golden, indent=2) + "\n", encoding="utf-8")
    return golden


def check_golden(model: MedMamba, golden: dict, where: str) -> float:
    """Returns the largest difference between the logits of a model and the recorded ones.

    Raises:
        GoldenError: the difference exceeds `TOLERANCE`, or the classes differ.
    """
    if golden["labels"] != model.config.labels:
        raise GoldenError(f"{where}: the classes are {model.config.labels}, but {GOLDEN_NAME} has {golden['labels']}")
    expected = np.array(golden["logits"])
    found = np.array(_predict(model).logits)
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # also catches NaN
        raise GoldenError(
            f"{where}: the golden prediction is not reproduced: logits differ by {difference:.2g}. Either the weights "
            f"or the code changed; if that was intended, delete {GOLDEN_NAME} and publish again"
        )
    return difference
