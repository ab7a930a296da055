"""A page for the record: images, what a model said of them, and how that came about, as one HTML file or PDF.

The page shows nothing of a file but its name, its hash, its pixels and how they were displayed: no header element of a
DICOM file, so no patient. The same facts, by the same names, go into CSV tables and into the metadata of PNG files.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .._version import __version__
from ..cards.card import NOTICE
from ..config import MedMambaConfig
from ..explain import Comparison
from ..imaging.image import MedicalImage
from ..inference.predict import Failure, Prediction
from ..serving.record import WARNING, Applied, applied, warnings_of, without_unusual
from ..utils.checksums import WEIGHTS_NAME, file_hash
from ..utils.files import write_atomically, write_text
from ..utils.text import printable
from .blocks import Block, Bullets, Picture, Section, Table, Text, picture
from .page import render, to_pdf

MOST_IMAGES = 100
"""Images on a page; more belong into a table."""
SHOWN_PIXELS = 480
"""Longest side of an image on the page."""
_UNUSUAL = {
    "near": "it does not look like the images that the model was trained on; the prediction may be meaningless",
    "far": "it is unlike all images that the model was trained on or tested with; the prediction is meaningless",
}
_ORIGINS = {"argument": "set by the user", "file": "from the file", "range": "full value range"}


@dataclass(frozen=True)
class RecordedModel:
    """Which model answered.

    Attributes:
        name: as it was asked for.
        architecture: such as "nano".
        weights: SHA-256 of its weights.
        calibrated: whether its scores are calibrated probabilities.
        task: "multiclass", "multilabel" or "ordinal".
    """

    name: str
    architecture: str
    weights: str
    calibrated: bool
    task: str

    @classmethod
    def of(cls, name: str, folder: str | os.PathLike, config: MedMambaConfig) -> RecordedModel:
        """Returns what a record says of the model in a folder, by a name without a path."""
        title = Path(name).name if Path(name).is_dir() or Path(name).is_file() else name
        calibrated = config.calibration.get("method") == "temperature"
        weights = file_hash(Path(folder) / WEIGHTS_NAME)
        return cls(title, config.architecture, weights, calibrated, config.task)


@dataclass(frozen=True, eq=False)
class Entry:
    """One image of a record.

    Attributes:
        name: of its file, without the folder.
        digest: SHA-256 of the file; "" if there is none.
        result: the prediction, or why there is none.
        how: it was read.
        shown: uint8 (H, W) or (H, W, 3), as displayed; None if it cannot be read.
        comparison: maps of the prediction, if any were computed.
        maps: PNG of the maps, if they were drawn already.
    """

    name: str
    digest: str
    result: Prediction | Failure
    how: Applied = field(default_factory=Applied)
    shown: np.ndarray | None = None
    comparison: Comparison | None = None
    maps: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        source: Any,
        result: Prediction | Failure,
        image: MedicalImage | None = None,
        comparison: Comparison | None = None,
    ) -> Entry:
        """Returns the entry of an image.

        Args:
            source: its file, or a name.
            result: of the model.
            image: as it was read for the model; None if it cannot be read.
            comparison: maps, if any.
        """
        path = Path(os.fsdecode(source) if isinstance(source, str | os.PathLike) else str(source))
        digest = file_hash(path) if path.is_file() else ""
        if isinstance(result, Failure):
            result = Failure(path.name, result.error.replace(str(path), path.name))
        if image is None:
            return cls(path.name, digest, result)
        return cls(path.name, digest, result, applied(image), _shown(image), comparison)

    def with_maps(self, png: bytes) -> Entry:
        """Returns the entry with a picture of its maps that was drawn already."""
        return dataclasses.replace(self, maps=png)

    @property
    def warnings(self) -> list[str]:
        """What affects how reliable the answer is, or why there is none."""
        if isinstance(self.result, Failure):
            return [self.result.error]
        said = [text.removeprefix(WARNING) for text in warnings_of(without_unusual(self.result), self.how)]
        level = self.result.unusual_level or "near"
        return [_UNUSUAL[level], *said] if self.result.unusual else said

    @property
    def window(self) -> str:
        """Level and width that were applied, and where they come from; "" if none was."""
        if self.how.window is None:
            return ""
        center, width = self.how.window
        return f"{center:g} / {width:g} ({_ORIGINS.get(self.how.window_from, self.how.window_from)})"


def record_facts(model: RecordedModel, entry: Entry | None = None, date: str | None = None) -> dict[str, str]:
    """Returns the facts of a record by name: for the columns of a CSV table, and the metadata of a PNG.

    Args:
        model: that answered.
        entry: the image; None for the model alone.
        date: ISO 8601, default: now, with the offset to UTC.
    """
    facts = {
        "model": model.name,
        "architecture": model.architecture,
        "weights_sha256": model.weights,
        "software": f"medmamba {__version__}",
        "date": date or now(),
    }
    if entry is not None:
        decisions = "" if isinstance(entry.result, Failure) else "; ".join(map(str, entry.result.decisions))
        frame = f"{entry.how.frame + 1} of {entry.how.n_frames}" if entry.how.n_frames > 1 else ""
        facts |= {
            "file": entry.name,
            "file_sha256": entry.digest,
            "frame": frame,
            "window": entry.window,
            "decisions": decisions,
            "warnings": "; ".join(entry.warnings),
        }
        if isinstance(entry.result, Prediction):
            facts |= {"prediction": entry.result.label, "probability": f"{entry.result.probability:.6f}"}
    return {name: printable(value) for name, value in {**facts, "notice": NOTICE}.items()}


def now() -> str:
    """Returns date and time in ISO 8601, to the second, with the offset to UTC."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def record_page(model: RecordedModel, entries: Sequence[Entry], *, date: str | None = None) -> str:
    """Returns one HTML page, which needs no other file, about one or several images.

    Args:
        model: that answered.
        entries: at most `MOST_IMAGES`.
        date: ISO 8601; default: now.

    Raises:
        ValueError: no image, or too many.
        ImportError: jinja2 is missing.
    """
    if not 1 <= len(entries) <= MOST_IMAGES:
        raise ValueError(
            f"a page for the record shows 1 to {MOST_IMAGES} images, not {len(entries)}; write a table of more "
            "(medmamba predict --out)"
        )
    about = {
        "Model": f"{model.name} (MedMamba-{model.architecture})",
        "Weights, SHA-256": model.weights,
        "Software": f"medmamba {__version__}",
        "Date": date or now(),
        "Probabilities": "calibrated on validation images" if model.calibrated else "not calibrated",
    }
    sections = [] if len(entries) == 1 else [_overview(entries)]
    sections += [_section(number, entry, model) for number, entry in enumerate(entries, 1)]
    what = entries[0].name if len(entries) == 1 else f"{len(entries)} images"
    return render(f"Research only: record of {what}", sections, notice=NOTICE, about=about)


def write_record(
    path: str | os.PathLike, model: RecordedModel, entries: Sequence[Entry], *, date: str | None = None
) -> Path:
    """Writes `record_page` as .html, or as .pdf, which needs `pip install "medmamba[report]"`; returns the path.

    Raises:
        ValueError: another suffix, no image, or too many.
        ImportError: a package for it is missing.
    """
    path = Path(path)
    check_record_path(path)
    html = record_page(model, entries, date=date)
    if path.suffix.lower() == ".html":
        return write_text(path, html)
    content = to_pdf(html)
    return write_atomically(path, lambda partial: partial.write_bytes(content))


def check_record_path(path: Path) -> None:
    """Raises ValueError unless a record can be written there: a .html or .pdf file in a folder that exists."""
    if path.suffix.lower() not in (".html", ".pdf"):
        raise ValueError(f"{path}: the page for the record is a .html or .pdf file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def _overview(entries: Sequence[Entry]) -> Section:
    rows = []
    for entry in entries:
        if isinstance(entry.result, Failure):
            rows.append([entry.name, "none", "", "; ".join(entry.warnings)])
        else:
            rows.append([entry.name, _said(entry.result), f"{entry.result.probability:.1%}", "; ".join(entry.warnings)])
    return Section("overview", "Overview", (Table(["Image", "Prediction", "Probability", "Warnings"], rows),))


def _said(result: Prediction) -> str:
    if result.labels is not None:
        return ", ".join(result.labels) or "none of the labels"
    return result.label


def _section(number: int, entry: Entry, model: RecordedModel) -> Section:
    how, result = entry.how, entry.result
    blocks: list[Block] = []
    if entry.warnings:
        title = "Not classified:" if isinstance(result, Failure) else "Warnings:"
        blocks += [Text(title), Bullets(entry.warnings)]
    if entry.shown is not None:
        blocks.append(Picture(_png(entry.shown), f"{entry.name}, as displayed", 45))
    facts = [
        ["File", entry.name],
        ["SHA-256 of the file", entry.digest or "not a file"],
        ["Window (level / width)", entry.window or "none"],
        ["Frame", f"{how.frame + 1} of {how.n_frames}" if how.n_frames > 1 else "the only one"],
    ]
    if isinstance(result, Failure):
        return Section(f"image-{number}", entry.name, (*blocks, Table(["Fact", "Value"], facts[:2])))
    facts.insert(0, ["Prediction", f"{_said(result)} ({result.probability:.1%})"])
    facts += [[said.name, said.answer] for said in result.decisions]
    blocks.append(Table(["Fact", "Value"], facts))
    shares = [[label, f"{100 * value:.2f} %"] for label, value in result.top]
    blocks.append(Table(["Class", "Probability" if model.calibrated else "Score (not calibrated)"], shares))
    if entry.comparison is not None:
        first = entry.comparison.explanations[0]
        names = ", ".join(explanation.title for explanation in entry.comparison.explanations)
        text = f"Maps for {first.label}: {names}. A map shows what influenced the output, not where a disease is."
        drawn = picture(entry.comparison.figure(), text, 100) if entry.maps is None else Picture(entry.maps, text, 100)
        blocks.append(drawn)
    notes = [note for note in result.image_notes if not note.startswith(WARNING)]
    if notes:
        blocks += [Text("How the file was processed:"), Bullets(notes)]
    return Section(f"image-{number}", entry.name, tuple(blocks))


def _shown(image: MedicalImage) -> np.ndarray:
    drawn = image.to_pil().convert("RGB" if image.pixels.shape[2] >= 3 else "L")
    drawn.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return np.asarray(drawn)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
