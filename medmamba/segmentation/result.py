"""What a model segmented in one image: masks at the image's own size, regions with area and score, and pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dense.pictures import COLOURS
from ..utils.extras import require

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Region:
    """One connected region of a class.

    Attributes:
        label: the class.
        area: pixels of the image.
        area_mm2: in mm², where the pixel spacing is known; else None.
        score: mean probability of the class inside of the region.
        box: (left, top, right, bottom) in pixels, right and bottom excluded.
    """

    label: str
    area: int
    area_mm2: float | None
    score: float
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of one image.

    Attributes:
        source: file name, or what kind of object it was.
        classes: names, in the order of the maps.
        probabilities: (K, H, W) float32, at the size of the image.
        thresholds: probability from which a pixel belongs to a class, one for each class.
        exclusive: a pixel belongs to the class with the highest probability if that exceeds the background's.
        background: (H, W) probability of the background; None unless `exclusive`.
        pixels: (H, W, 3) uint8, the image, for pictures.
        spacing: (row, column) distance of pixels in mm, where the image says so.
        notes: what was done to the file; what deserves attention begins with "warning".
    """

    source: str
    classes: tuple[str, ...]
    probabilities: np.ndarray = field(repr=False)
    thresholds: tuple[float, ...]
    pixels: np.ndarray = field(repr=False)
    exclusive: bool = False
    background: np.ndarray | None = field(default=None, repr=False)
    spacing: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.probabilities.shape[1], self.probabilities.shape[2]

    @property
    def masks(self) -> np.ndarray:
        """(K, H, W) bool: the pixels of each class."""
        if not self.exclusive or self.background is None:
            return self.probabilities >= np.asarray(self.thresholds, np.float32).reshape(-1, 1, 1)
        best = np.concatenate((self.background[None], self.probabilities)).argmax(0)
        return best == np.arange(1, len(self.classes) + 1).reshape(-1, 1, 1)

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint16: 0 for the background, else 1 plus the index of the class; the most probable where several."""
        masks = self.masks
        score = np.where(masks, self.probabilities, -1)
        return np.where(masks.any(0), score.argmax(0) + 1, 0).astype(np.uint16)

    @property
    def regions(self) -> list[Region]:
        """The connected regions (also diagonally) of every class, largest first."""
        ndimage = require("scipy", "regions of a segmentation") and require("scipy.ndimage", "regions", "segment")
        pixel = math.prod(self.spacing) if self.spacing else None
        found = []
        for label, mask, probability in zip(self.classes, self.masks, self.probabilities, strict=True):
            numbered, count = ndimage.label(mask, np.ones((3, 3)))
            if not count:
                continue
            areas = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
            sums = np.bincount(numbered.ravel(), probability.ravel().astype(float), minlength=count + 1)[1:]
            for area, total, (rows, columns) in zip(areas, sums, ndimage.find_objects(numbered), strict=True):
                box = (columns.start, rows.start, columns.stop, rows.stop)
                found.append(Region(label, int(area), pixel and float(area * pixel), float(total / area), box))
        return sorted(found, key=lambda region: -region.area)

    def with_thresholds(self, *thresholds: float) -> Segmentation:
        """Returns the same segmentation at other thresholds: one for all classes, or one for each.

        Raises:
            ValueError: another number of thresholds, a value out of [0, 1], or exclusive classes, which have none.
        """
        import dataclasses

        if self.exclusive:
            raise ValueError("classes of this model are exclusive: the most probable one is taken, without a threshold")
        given = thresholds * len(self.classes) if len(thresholds) == 1 else thresholds
        if len(given) != len(self.classes) or not all(0 <= value <= 1 for value in given):
            raise ValueError(f"thresholds are one or {len(self.classes)} values in [0, 1], got {thresholds}")
        return dataclasses.replace(self, thresholds=tuple(map(float, given)))

    def overlay(self, opacity: float = 0.4) -> Image.Image:
        """Returns the image with each class in a colour of its own and its outline drawn.

        Args:
            opacity: of the colour, from 0 (outline alone) to 1.

        Raises:
            ValueError: an opacity out of [0, 1].
        """
        from PIL import Image

        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be in [0, 1], got {opacity}")
        picture = self.pixels.astype(np.float32)
        for number, mask in enumerate(self.masks):
            colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
            picture[mask] = (1 - opacity) * picture[mask] + opacity * colour
            picture[_outline(mask)] = colour
        return Image.fromarray(np.rint(picture).astype(np.uint8))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types for JSON: the regions, and per class area, share of the image and number of regions."""
        import dataclasses

        total = math.prod(self.size)
        regions = self.regions
        pixel = math.prod(self.spacing) if self.spacing else None
        classes = [
            {
                "label": label,
                "area": int(mask.sum()),
                "area_mm2": pixel and float(mask.sum() * pixel),
                "share": float(mask.sum() / total),
                "regions": sum(region.label == label for region in regions),
            }
            for label, mask in zip(self.classes, self.masks, strict=True)
        ]
        return {
            "source": self.source,
            "size": list(self.size),
            "spacing": self.spacing and list(self.spacing),
            "classes": classes,
            "regions": [dataclasses.asdict(region) for region in regions],
            "notes": list(self.notes),
        }

    def save(self, path: Any, source: Any = None) -> Any:
        """Writes the masks as PNG, NIfTI or DICOM Segmentation, by the suffix; see `medmamba.segmentation.write`."""
        from .write import write_masks

        return write_masks(self, path, source)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels of a mask (H, W) that border on pixels outside of it, one pixel wide."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
