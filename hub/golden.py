"""One prediction that travels with a model: whoever loads the weights can tell that they compute what was published."""

import json
from pathlib import Path

import numpy as np

from medmamba import MedMamba
from medmamba.imaging.load import MedicalImage

GOLDEN_NAME = "golden.json"
HEIGHT, WIDTH = 96, 128
TOLERANCE = 2e-3  # of the largest logit, and at least 2e-3: float32 on another machine and backend


class GoldenError(ValueError):
    """A model that does not reproduce its golden prediction."""


def golden_image(channels: int) -> np.ndarray:
    """uint8 (96, 128, channels), from integers alone, so that it is the same everywhere."""
    y, x, c = np.mgrid[:HEIGHT, :WIDTH, :channels]
    return ((x * (3 + c) + y * (5 - c) + (x * y) // (7 + 2 * c)) % 256).astype(np.uint8)


def _predict(model: MedMamba):
    pixels = golden_image(model.config.in_chans).astype(np.float32) / 255
    return model.predict(MedicalImage(pixels, source="golden", format="numpy", mode="uint8", bit_depth=8))


def write_golden(model: MedMamba, folder: Path) -> dict:
    """Writes golden.json: logits of `golden_image`, through the model's own preprocessing."""
    channels, prediction = model.config.in_chans, _predict(model)
    golden = {
        "image": f"hub.golden.golden_image({channels}): uint8 ({HEIGHT}, {WIDTH}, {channels})",
        "labels": model.config.labels,
        "logits": [round(value, 6) for value in prediction.logits],
        "label": prediction.label,
    }
    Path(folder, GOLDEN_NAME).write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return golden


def check_golden(model: MedMamba, golden: dict, where: str) -> float:
    """The largest difference between the logits of a model and those on record.

    Raises:
        GoldenError: they differ by more than `TOLERANCE`, or name other classes.
    """
    if golden["labels"] != model.config.labels:
        raise GoldenError(f"{where}: the classes are {model.config.labels}, on record are {golden['labels']}")
    expected = np.array(golden["logits"])
    found = np.array(_predict(model).logits)
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # NaN is not less
        raise GoldenError(
            f"{where}: the golden prediction is not reproduced, logits differ by {difference:.2g}. Either the weights "
            f"or the code changed; after a change on purpose, delete {GOLDEN_NAME} and publish again"
        )
    return difference
