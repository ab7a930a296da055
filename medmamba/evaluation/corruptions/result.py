"""`Corruptions`: balanced errors of a model on corrupted images, as JSON and Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...metrics import Estimate
from ...utils import config_checks as checks
from ...utils.files import write_text
from ...utils.strict_json import read_json

CORRUPTIONS_NAME = "corruptions.json"


@dataclass(frozen=True)
class Corruptions:
    """Balanced errors (1 - balanced accuracy) on corrupted images.

    Attributes:
        published: dataset of MedMNIST-C whose kinds and severities were applied.
        n_images: number of images, each corrupted in every way.
        n_available: number of images of the split from which they were drawn.
        clean: error on the same images without corruption.
        errors: errors of each kind at severities 1 to 5.
        mean: mean of `errors` over kinds and severities.
        excess: `mean` minus `clean`: what the corruptions cost.
        seed: of the noise and of the choice of images.
        resamples: bootstrap resamples of the intervals; 0: no intervals.
        level: coverage of the intervals.
        weights: SHA-256 of the weights; "" if not recorded.
        context: model, data and split.
    """

    published: str
    n_images: int
    n_available: int
    clean: Estimate
    errors: Mapping[str, tuple[float, ...]]
    mean: Estimate
    excess: Estimate
    seed: int
    resamples: int
    level: float = 0.95
    weights: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The kind with the largest mean error."""
        return max(self.errors, key=lambda kind: sum(self.errors[kind]))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, with None for NaN."""
        data = asdict(self)
        for name in ("clean", "mean", "excess"):
            data[name] = {k: None if math.isnan(v) else v for k, v in data[name].items()}
        return {**data, "errors": {kind: list(errors) for kind, errors in self.errors.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Corruptions:
        """Loads the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: missing, unknown or invalid fields.
        """
        values = dict(data)
        for name in ("clean", "mean", "excess"):
            values[name] = Estimate(**{k: math.nan if v is None else v for k, v in values[name].items()})
        values["errors"] = {
            str(kind): tuple(checks.real(error, f"errors.{kind}", 0, 1) for error in errors)
            for kind, errors in values["errors"].items()
        }
        if not values["errors"]:
            raise ValueError("no kind of corruption")
        return cls(**values)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes JSON and returns its path."""
        return write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of the table: error of each kind by severity, its mean, and what it costs."""
        header = ["Corruption", *(f"Severity {level}" for level in range(1, 6)), "Mean", "Above clean"]
        rows = []
        for kind, errors in sorted(self.errors.items(), key=lambda item: -sum(item[1])):
            mean = sum(errors) / len(errors)
            cells = [f"{error:.3f}" for error in errors]
            rows.append([kind.replace("_", " "), *cells, f"{mean:.3f}", f"{mean - self.clean.value:+.3f}"])
        return header, rows

    def sentence(self) -> str:
        """Returns the result in words."""
        of = "" if self.n_images == self.n_available else f" of {self.n_available}, drawn with seed {self.seed}"
        intervals = f" ({self.level:.0%} bootstrap intervals)" if self.resamples else ""
        return (
            f"Balanced error (1 - balanced accuracy) on {self.n_images} images{of}{intervals}: clean {self.clean}, "
            f"mean over all corruptions {self.mean}, an increase of {self.excess}. Kinds and severities: those of "
            f"MedMNIST-C (arXiv:2406.17536) for {self.published}. Worst: {self.worst.replace('_', ' ')}."
        )

    def to_markdown(self) -> str:
        """Returns the sentence and the table."""
        header, rows = self.rows()
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
        return self.sentence() + "\n\n" + "\n".join(lines) + "\n"


def load_corruptions(folder: str | os.PathLike) -> Corruptions | None:
    """Loads `corruptions.json` from a model folder; None where there is none.

    Raises:
        ValueError: a file that was not written by `Corruptions.save`.
    """
    path = Path(folder) / CORRUPTIONS_NAME
    if not path.is_file():
        return None
    try:
        return Corruptions.from_dict(read_json(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "delete it, or evaluate again with corruptions"
        raise ValueError(f"{path} cannot be read ({error!r}); {advice}") from error
