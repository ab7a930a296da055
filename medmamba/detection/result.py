"""What a model detected in one image: boxes with labels and scores, and pictures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dense.pictures import COLOURS

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Box:
    """One detected object.

    Attributes:
        label: the class.
        score: in [0, 1].
        box: (left, top, right, bottom) in pixels of the image.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """The objects detected in one image.

    Attributes:
        source: file name, or what kind of object it was.
        boxes: highest score first.
        size: height and width of the image.
        pixels: (H, W, 3) uint8, the image, for pictures.
        classes: names of all classes of the model.
        notes: what was done to the file; what deserves attention begins with "warning".
    """

    source: str
    boxes: list[Box]
    size: tuple[int, int]
    pixels: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of boxes of each class."""
        return {label: sum(box.label == label for box in self.boxes) for label in self.classes}

    def above(self, score: float) -> Detection:
        """Returns the boxes of at least this score."""
        return dataclasses.replace(self, boxes=[box for box in self.boxes if box.score >= score])

    def overlay(self, width: int | None = None) -> Image.Image:
        """Returns the image with the boxes drawn, with labels and scores, each class in a colour of its own.

        Args:
            width: of the lines in pixels; by default one for every 300 pixels of the longer side.
        """
        from PIL import Image, ImageDraw, ImageFont

        picture = Image.fromarray(self.pixels)
        draw = ImageDraw.Draw(picture)
        line = width or max(1, round(max(self.size) / 300))
        font = ImageFont.load_default(max(10, round(max(self.size) / 50)))
        for box in reversed(self.boxes):  # the most probable on top
            colour = COLOURS[self.classes.index(box.label) % len(COLOURS)]
            draw.rectangle(box.box, outline=colour, width=line)
            place, text = (box.box[0] + line, box.box[1] + line), f"{box.label} {box.score:.2f}"
            draw.rectangle(draw.textbbox(place, text, font), fill=colour)
            red, green, blue = colour
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 110
            draw.text(place, text, fill="black" if bright else "white", font=font)
        return picture

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types, for JSON."""
        return {
            "source": self.source,
            "size": list(self.size),
            "counts": self.counts,
            "boxes": [{**dataclasses.asdict(box), "box": list(box.box)} for box in self.boxes],
            "notes": list(self.notes),
        }
