"""How far the scan reaches at a pixel inside and at one outside of a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..imaging.image import Window
from ..imaging.load import ImageSource, MedicalImage
from ..inference.predict import read_image
from ..utils.extras import require
from .scan_field import ScanField, scan_field


@dataclass(frozen=True, eq=False)
class MaskReach:
    """The scan's field of influence at two pixels of an image.

    Attributes:
        inside: at the pixel of the mask that is farthest from its border.
        outside: at the pixel outside that is farthest from the mask; None if the mask covers the image.
        from_inside: for each of the two, the share of the influence, merged over directions, that comes from the
            mask; beside `area`, it tells whether the scan gathers from the lesion more than a uniform field would.
        area: share of the image that the mask covers.
    """

    inside: ScanField = field(repr=False)
    outside: ScanField | None = field(repr=False)
    from_inside: tuple[float, float | None]
    area: float

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the maps, in plain types, for JSON."""
        return {
            "inside": self.inside.to_dict(),
            "outside": self.outside.to_dict() if self.outside else None,
            "from_inside": list(self.from_inside),
            "area": self.area,
        }


def mask_reach(
    model: Any,
    image: ImageSource | MedicalImage,
    mask: np.ndarray,
    stage: int = 1,
    block: int | None = None,
    *,
    frame: int | None = None,
    window: Window | None = None,
) -> MaskReach:
    """Computes the scan's field at a pixel inside and at one outside of a mask.

    Args:
        model: a `MedMambaSegmenter`, or any model that `scan_field` takes.
        image: as in `scan_field`.
        mask: (H, W) bool at the size of the image, such as `model.predict(image).masks[0]`.
        stage, block: as in `scan_field`.
        frame, window: as in `load_image`.

    Raises:
        ValueError: a mask of another size or without pixels; or as in `scan_field`.
        ImportError: scipy is not installed.
    """
    ndimage = require("scipy", "distances from a mask") and require("scipy.ndimage", "distances from a mask", "segment")
    picture = read_image(image, frame, window)
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != picture.size:
        raise ValueError(f"mask is {mask.shape}, and the image {picture.size}; give it at the image's size")
    if not mask.any():
        raise ValueError("mask has no pixel: there is no inside")
    # The border of the image counts as one of the mask, so that the pixel is not at the edge of what is seen.
    inside = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    outside = ndimage.distance_transform_edt(~mask) if not mask.all() else None
    fields: list[ScanField | None] = []
    for distance in (inside, outside):
        if distance is None:
            fields.append(None)
            continue
        row, column = np.unravel_index(int(distance.argmax()), mask.shape)
        fields.append(scan_field(model, picture, (int(row), int(column)), stage, block))
    shares = [None if found is None else _share(found.merged_full, mask) for found in fields]
    assert fields[0] is not None and shares[0] is not None
    return MaskReach(fields[0], fields[1], (shares[0], shares[1]), float(mask.mean()))


def _share(influence: np.ndarray, mask: np.ndarray) -> float:
    return float(influence[mask].sum() / max(float(influence.sum()), 1e-30))
