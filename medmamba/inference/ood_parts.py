"""How far a signature is from the training images: distances of its parts, combined as p-values.

Each part of a signature (colour, texture, layout, one stage of the network; see `signature`) has two statistics:

- the squared Mahalanobis distance within its largest principal components (Lee et al. 2018, arXiv:1807.03888);
- the squared length of what they leave over, as in ViM (Wang et al. 2022, arXiv:2203.10807): foreign images vary where
  the training images do not.

With the distance of the pooled features to the nearest class mean, that is 15 statistics for four stages. The excess of
log(1 + d) of each distance d over its median among validation images, in units of the distance from there to the 95th
percentile, is a p-value on the assumption of an exponential tail: p = 0.5 * 10 ** -excess. The score is the mean of the
excesses, so it orders images as Fisher's method does. Those below the median count 0, and no more than `MOST` counts,
so that no single peculiarity, such as a colour cast, decides. Since the statistics are not independent, the threshold
is not computed but taken from validation images. Nothing is fitted to foreign images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .signature import STILL

Floats = NDArray[np.float64]
COMPONENTS = 32
MOST = 5.0  # counts of the excess of one statistic: p = 5e-6
_LEAST = 1e-12
_STILL = 1e-2  # of the mean deviation: columns that never move in training may move that far
_LEFT = 0.2  # variance per column left over, at least: what never varied in training may vary a little
_ALONG = 0.02  # the same along a component
_REACH = 0.25  # the least: where validation images hardly differ, small differences must not count as large
_SAFE = 1e12  # standard deviations; more is not told apart, and could overflow


@dataclass(frozen=True, eq=False)
class Part:
    """Training images in some columns of their signatures.

    Attributes:
        name: such as "colour" or "stage 2".
        first: the first of these columns.
        mean, std: (D,), of the training images.
        axes: (k, D), principal components of the standardised columns.
        variances: (k,), along them.
        rest: variance left over, in total.
    """

    name: str
    first: int
    mean: Floats = field(repr=False)
    std: Floats = field(repr=False)
    axes: Floats = field(repr=False)
    variances: Floats = field(repr=False)
    rest: float = 1.0

    @property
    def end(self) -> int:
        """The column after the last."""
        return self.first + len(self.mean)

    def distances(self, signatures: Floats) -> Floats:
        """Returns log(1 + d) of both distances, (N, 2), of signatures (N, S); d is about 1 for training images."""
        z = signatures[:, self.first : self.end] - self.mean
        z /= self.std  # in place: many images are limited by memory
        np.clip(z, -_SAFE, _SAFE, out=z)
        inside = np.square(z @ self.axes.T)
        within = (inside / self.variances).mean(1)
        outside = np.maximum(np.einsum("nd,nd->n", z, z) - inside.sum(1), 0) / self.rest
        return np.log1p(np.stack((within, outside), 1))


def fit_part(name: str, first: int, values: Floats, still: float = 0.0) -> Part:
    """Fits a part to these columns of training images, (N, D), whose deviation counts as at least `still`."""
    mean, std = values.mean(0), values.std(0)
    std = np.maximum(std, max(_STILL * float(std.mean()), still, 1e-9))
    mean, std = _stored(mean), _stored(std)
    z = (values - mean) / std
    count = max(1, min(COMPONENTS, z.shape[1] - 2, len(z) // 4))
    # The components are those of the smaller of the two Gram matrices, of images or of columns.
    small = z @ z.T if len(z) < z.shape[1] else z.T @ z
    size, vectors = np.linalg.eigh(small / len(z))
    size, vectors = np.maximum(size[::-1][:count], 0), vectors[:, ::-1][:, :count]
    axes = vectors.T @ z if len(z) < z.shape[1] else vectors.T
    axes = axes / np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), _LEAST)
    total = float((z**2).sum() / len(z))
    rest = max(total - float(size.sum()), _LEFT * z.shape[1])
    variances = np.maximum(size, _ALONG)
    return Part(name, first, mean, std, axes.astype(np.float16).astype(np.float64), _stored(variances), rest)


@dataclass(frozen=True, eq=False)
class Combined:
    """The parts of signatures together.

    Attributes:
        parts: in the order of their columns.
        centre, reach: (1 + 2 * parts,), median of log(1 + d) of each distance among validation images, and how far the
            95th percentile is from there; the first is the distance of the pooled features.
        far: score above which an image is far from all that the model knows, see `tail`.
        pixel_limit: the same for `pixel_score`.
    """

    parts: tuple[Part, ...]
    centre: Floats = field(repr=False)
    reach: Floats = field(repr=False)
    far: float = math.inf
    pixel_limit: float = math.inf

    @property
    def width(self) -> int:
        """Number of columns of the signatures."""
        return self.parts[-1].end

    def excesses(self, signatures: Floats, features: Floats) -> Floats:
        """Returns the excess (N, 1 + 2 * parts) of each statistic.

        Args:
            signatures: (N, S).
            features: (N,), distances of the pooled features to the nearest class mean.
        """
        logs = [np.log1p(features)[:, None], *(part.distances(signatures) for part in self.parts)]
        return np.clip((np.concatenate(logs, 1) - self.centre) / self.reach, 0, MOST)

    def pixel_score(self, pixels: Floats) -> Floats:
        """Returns the score (N,) of pixel statistics (N, at least `signature.PIXELS`) alone."""
        chosen = [(i, part) for i, part in enumerate(self.parts) if part.end <= pixels.shape[1]]
        logs = np.concatenate([part.distances(pixels) for _, part in chosen], 1)
        columns = [1 + 2 * i + j for i, _ in chosen for j in (0, 1)]
        return np.clip((logs - self.centre[columns]) / self.reach[columns], 0, MOST).mean(1)


def fit_parts(
    signatures: Floats, columns: Mapping[str, slice], validation: Floats, distances: Floats
) -> tuple[tuple[Part, ...], Floats, Floats]:
    """Returns parts, centre and reach, see `Combined`.

    Args:
        signatures: (N, S), of training images.
        columns: of each part.
        validation: (M, S), of validation images.
        distances: (M,), of the pooled features of these to the nearest class mean.
    """
    parts = tuple(
        fit_part(name, part.start, signatures[:, part], STILL.get(name, 0.0)) for name, part in columns.items()
    )
    logs = [np.log1p(distances)[:, None], *(part.distances(validation) for part in parts)]
    found = np.concatenate(logs, 1)
    centre = np.median(found, axis=0)
    reach = np.maximum(np.quantile(found, 0.95, axis=0) - centre, _REACH)
    return parts, _stored(centre), _stored(reach)


def tail(scores: Sequence[float] | Floats, share: float) -> float:
    """Returns the score that this share of images like these is expected to exceed.

    Beyond the highest tenth, in which an exponential is fitted to the excesses: of a hundred images the quantile itself
    would be decided by one.
    """
    values = np.asarray(scores, np.float64)
    edge = float(np.quantile(values, 0.9))
    above = values[values > edge] - edge
    return edge + math.log(0.1 / share) * float(above.mean()) if len(above) else edge


def _stored(values: np.ndarray) -> Floats:
    """Returns values as they are after a round trip through the file."""
    return values.astype(np.float32).astype(np.float64)
