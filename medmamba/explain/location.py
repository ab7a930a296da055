"""Where the weight of a map lies: maps at the border often follow markers, frames and padding, not the subject."""

from __future__ import annotations

import numpy as np

BORDER, CORNER = 0.1, 0.25
"""Width of the border and side of a corner, as fractions of the side of the image."""
BORDER_LIMIT, CORNER_LIMIT = 0.5, 0.35
"""Weight above which a map is reported. An even map has 0.36 in the border and 0.06 in a corner."""


def border_weight(attribution: np.ndarray) -> float:
    """Returns the fraction of the weight of a map (H, W), by magnitude, in its border of a tenth of the sides."""
    weight = np.abs(attribution)
    rows, columns = (max(1, round(BORDER * side)) for side in weight.shape)
    total = float(weight.sum())
    return 1 - float(weight[rows:-rows, columns:-columns].sum()) / total if total else 0.0


def corner_weights(attribution: np.ndarray) -> dict[str, float]:
    """Returns the fraction of the weight of a map (H, W), by magnitude, in each corner, a quarter of the sides."""
    weight = np.abs(attribution)
    rows, columns = (max(1, round(CORNER * side)) for side in weight.shape)
    total = float(weight.sum()) or 1.0
    return {
        "top left": float(weight[:rows, :columns].sum()) / total,
        "top right": float(weight[:rows, -columns:].sum()) / total,
        "bottom left": float(weight[-rows:, :columns].sum()) / total,
        "bottom right": float(weight[-rows:, -columns:].sum()) / total,
    }


def location_note(attribution: np.ndarray) -> str:
    """Returns a sentence if much of the weight of a map lies in a corner or in the border, else ""."""
    place, share = max(corner_weights(attribution).items(), key=lambda pair: pair[1])
    where = f"the {place} corner"
    if share <= CORNER_LIMIT:
        where, share = "the border of the image", border_weight(attribution)
        if share <= BORDER_LIMIT:
            return ""
    return f"{share:.0%} of the weight lies in {where}: check for markers, text, frames or padding there"
