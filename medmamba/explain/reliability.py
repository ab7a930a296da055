"""How well each attribution method did when it was measured, from the figures of docs/explain.md.

The figures are of `benchmarks/explain.py`: 100 test images of each of four bundled models. A method orders the parts of
an image; where the score falls sooner as they are removed in that order (deletion), or rises sooner as they are
restored (insertion), than in each of five random orders, it was better than chance. A random map is in one of six.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from .methods import methods

FILE = "measured.json"
GOOD, MIXED = 0.6, 0.6
"""Lowest share, over models and both curves, of a method that measured well; and the median of one that is mixed."""
DEFAULT_LAYER = {"gradcam": "gradcam:stage4"}
"""Name of a method in the tables, where it is another."""


@dataclass(frozen=True)
class Reliability:
    """What was measured of a method.

    Attributes:
        method: its name.
        images: number of images of each model.
        shares: by model: shares of the images for which the map was better than every random order, by deletion and by
            insertion.
        passed: share of the images for which the map changed when the weights were replaced by random ones.
    """

    method: str
    images: int
    shares: Mapping[str, tuple[float, float]]
    passed: float

    @property
    def lowest(self) -> float:
        """The lowest share."""
        return min(min(pair) for pair in self.shares.values())

    @property
    def median(self) -> float:
        """The median share."""
        values = sorted(value for pair in self.shares.values() for value in pair)
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2

    @property
    def level(self) -> Literal["good", "mixed", "poor"]:
        """Whether it was better than chance on most images: of every model ("good"), of most ("mixed"), or not."""
        if self.lowest >= GOOD and self.passed >= 0.95:
            return "good"
        return "mixed" if self.median >= MIXED and self.passed >= 0.95 else "poor"

    @property
    def highest(self) -> float:
        """The highest share."""
        return max(max(pair) for pair in self.shares.values())

    def __str__(self) -> str:
        said = {"good": "measured well", "mixed": "depends on the model", "poor": "measured poorly"}[self.level]
        return f"{said}: better than chance on {100 * self.lowest:.0f} to {100 * self.highest:.0f}% of images"


@functools.cache
def reliabilities() -> Mapping[str, Reliability]:
    """Returns what was measured, by method; of Grad-CAM at its default layer."""
    record = json.loads(resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    found = {}
    for name in methods():
        row = record["methods"].get(DEFAULT_LAYER.get(name, name))
        if row is not None:
            shares = {model: (float(d), float(i)) for model, (d, i) in row["shares"].items()}
            found[name] = Reliability(name, int(record["images"]), shares, float(row["passed"]))
    return found


def recommended() -> list[str]:
    """Returns the methods that measured well, the best first."""
    good = [one for one in reliabilities().values() if one.level == "good"]
    return [one.method for one in sorted(good, key=lambda one: (-one.lowest, one.method))]
