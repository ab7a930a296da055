"""Pictures of results: the image, and colours of classes."""

from __future__ import annotations

import numpy as np

from ..imaging.image import MedicalImage

# Okabe and Ito's colours, which remain distinct in the common forms of colour blindness (jfly.uni-koeln.de/color).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def shown(image: MedicalImage) -> np.ndarray:
    """Returns an image as (H, W, 3) uint8, for pictures."""
    pixels = image.to_uint8()
    return np.repeat(pixels[..., :1], 3, 2) if pixels.shape[2] != 3 else pixels
