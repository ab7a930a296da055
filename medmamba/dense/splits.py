"""Splits for data that have none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import DatasetError


def divided(units: Sequence[str], fractions: Sequence[float], seed: int, name: str) -> list[str]:
    """Divides images into train, val and test, all images of a unit (a patient) on one side.

    Args:
        units: patient of each image, or the image itself.
        fractions: of train, val and test.
        seed: of the order.
        name: of the dataset, for messages.

    Raises:
        DatasetError: fractions that do not sum to 1, or too few units for three splits.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DatasetError(f"fractions are three positive numbers that sum to 1 (train, val, test), got {fractions}")
    known = sorted(set(units))
    if len(known) < 3:
        raise DatasetError(f"{name} has {len(known)} patients or images, too few for three splits")
    order = np.random.default_rng(seed).permutation(len(known))
    test = max(round(fractions[2] * len(known)), 1)
    val = max(round(fractions[1] * len(known)), 1)
    place = {known[i]: "test" if n < test else "val" if n < test + val else "train" for n, i in enumerate(order)}
    return [place[unit] for unit in units]
