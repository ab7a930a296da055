"""Bootstrap resamples as weights, stratified by class and grouped by patient where known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .scores import Floats, Ints

_CHUNK_ELEMENTS = 2**22  # of weights in memory at once: 16 MB


def resampling_units(labels: Ints, patients: Sequence[str | None] | None) -> tuple[Ints, Ints]:
    """Returns the resampling unit of each image `(N,)`, and the stratum of each unit `(U,)`.

    A unit is a patient, or an image without one. Its stratum is its class, or its most frequent class where a patient
    has images of several. Multi-label data have a single stratum.
    """
    n = len(labels)
    keys = [(i,) if patients is None or patients[i] is None else patients[i] for i in range(n)]
    numbers: dict[object, int] = {}
    unit_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    if labels.ndim == 2:
        return unit_of, np.zeros(len(numbers), dtype=np.int64)
    # Counts pairs, since a table of units by classes can exceed memory.
    pairs, counts = np.unique(unit_of * (int(labels.max()) + 1) + labels, return_counts=True)
    units, classes = np.divmod(pairs, int(labels.max()) + 1)
    order = np.lexsort((classes, -counts, units))  # by unit, most frequent class first; ties: lowest class
    first = np.flatnonzero(np.diff(units[order], prepend=-1))
    return unit_of, classes[order][first]


def bootstrap_weights(unit_of: Ints, stratum_of: Ints, resamples: int, seed: int) -> Iterator[Floats]:
    """Yields the weights of the images in `resamples` resamples, in chunks `(R, N)`.

    Each resample draws, with replacement, as many units from each stratum as it has; the weight of an image is the
    number of times its unit was drawn.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // len(unit_of))
    strata = [np.flatnonzero(stratum_of == stratum) for stratum in np.unique(stratum_of)]
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        # Counts are small integers, exact in float32.
        drawn = np.empty((rows, len(stratum_of)), dtype=np.float32)
        for units in strata:
            drawn[:, units] = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), rows)
        yield drawn[:, unit_of]
