"""Faithfulness checks that remove parts of the image: deletion and insertion curves, and infidelity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .regions import grid, make_baseline
from .subject import Subject


@dataclass(frozen=True, eq=False)
class Curves:
    """Deletion and insertion curves, in the order of the map (strongest evidence first) and in random orders.

    A curve holds the logit minus that of the image with everything replaced, divided by the magnitude of the difference
    between the two ends: for a class with evidence in the image it runs between 1 and 0. It uses the logit, not the
    probability, because the logit is what is explained, and the probability of a confident model saturates.

    Attributes:
        fractions: (S,) fraction of the image replaced (deletion) or restored (insertion).
        deletion, insertion: (S,) in the order of the map.
        random_deletion, random_insertion: (orders, S).
        removal: baseline that replaces the cells.
    """

    fractions: np.ndarray = field(repr=False)
    deletion: np.ndarray = field(repr=False)
    insertion: np.ndarray = field(repr=False)
    random_deletion: np.ndarray = field(repr=False)
    random_insertion: np.ndarray = field(repr=False)
    removal: str | float = "blur"

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion curve; low is good."""
        return area(self.deletion, self.fractions)

    @property
    def insertion_auc(self) -> float:
        """Area under the insertion curve; high is good."""
        return area(self.insertion, self.fractions)

    @property
    def random_deletion_auc(self) -> tuple[float, float]:
        """Mean and standard deviation over random orders."""
        return _mean_sd([area(curve, self.fractions) for curve in self.random_deletion])

    @property
    def random_insertion_auc(self) -> tuple[float, float]:
        """Mean and standard deviation over random orders."""
        return _mean_sd([area(curve, self.fractions) for curve in self.random_insertion])


def removal_curves(
    subject: Subject,
    map_: Tensor,
    removal: str | float = "blur",
    random_orders: int = 5,
    steps: int = 20,
    seed: int = 0,
    known: Curves | None = None,
    cells: int = 196,
) -> Curves:
    """Computes deletion and insertion curves (Petsiuk et al. 2018) over the cells of a grid.

    Cells rather than pixels, because scattered single pixels form patterns unlike any training image, and coarse maps
    cannot rank them. Ties are broken at random.

    Args:
        subject: image and class.
        map_: (H, W).
        removal: baseline that replaces cells, as in `make_baseline`.
        random_orders: number of random orders to compare with.
        steps: points of a curve.
        seed: of the random orders.
        known: curves of another map for the same image, class and settings, whose random orders are reused.
        cells: approximate number of cells.
    """
    x, start = subject.x, make_baseline(subject.x, removal, subject.config.preprocess)
    score, labels = cell_means(map_, cells)
    count = len(score)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(count, generator=generator)
    orders = [shuffled[score[shuffled].argsort(descending=True, stable=True)]]
    if known is None:
        orders += [torch.randperm(count, generator=generator) for _ in range(random_orders)]
    taken = torch.linspace(0, count, min(steps, count) + 1).round().long()  # (S,) cells
    ranks = torch.stack([order.argsort() for order in orders])  # (orders, cells): position of each cell in the order
    # (orders, S - 2, cells): whether a cell has been replaced by then. Both ends are the same for all orders.
    present = ranks[:, None] < taken[1:-1, None]
    ends = torch.tensor([False, True])[:, None].expand(2, count)
    # Restoring the first cells of an order means replacing the others.
    states = torch.cat((ends, present.flatten(0, 1), ~present.flatten(0, 1)))
    whole, empty, *inner = _logits(subject, x, start, states, labels)
    deletion, insertion = np.reshape(inner, (2, len(orders), -1))
    scale = abs(whole - empty) or 1.0
    column = np.ones((len(orders), 1))
    deletion = (np.hstack((whole * column, deletion, empty * column)) - empty) / scale
    insertion = (np.hstack((empty * column, insertion, whole * column)) - empty) / scale
    return Curves(
        (taken / count).numpy(),
        deletion[0],
        insertion[0],
        deletion[1:] if known is None else known.random_deletion,
        insertion[1:] if known is None else known.random_insertion,
        removal,
    )


def cell_means(map_: Tensor, cells: int = 196) -> tuple[Tensor, Tensor]:
    """Returns the means (n,) of a map (H, W) over about `cells` cells of 4x4 pixels or more, and the labels (H, W)."""
    H, W = map_.shape
    labels = grid(H, W, min(cells, (H // 4) * (W // 4)))
    sums = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, labels.flatten(), map_.cpu().double().flatten())
    return sums / labels.flatten().bincount(), labels


@torch.no_grad()
def _logits(subject: Subject, x: Tensor, start: Tensor, states: Tensor, labels: Tensor) -> np.ndarray:
    """Returns the logits (n,) of x with cells replaced by `start` where `states` (n, cells) is True."""
    subject.planned = subject.evaluations + len(states)
    labels = labels.to(x.device)
    values = []
    for part in states.to(x.device).split(subject.batch_size):
        values.append(subject(torch.where(part[:, labels].unsqueeze(1), start, x)))
    return torch.cat(values).cpu().double().numpy()


def infidelity(
    subject: Subject,
    map_: Tensor,
    removal: str | float = "blur",
    n: int = 40,
    known: list[Tensor] | None = None,
) -> tuple[float, float]:
    """Computes the infidelity (Yeh et al. 2019) and its ratio to the mean squared change of the logit.

    Replaces squares of 1/8 to 1/2 of the side at random positions. The map is scaled by the best non-negative factor.

    Args:
        subject: image and class.
        map_: (H, W).
        removal: baseline that replaces the squares, as in `make_baseline`.
        n: number of squares.
        known: outputs of the model from another map of the same image, class and settings, drawn from the same state of
            the random generator; an empty list is filled.
    """
    from captum.metrics import infidelity as captum_infidelity

    x, start = subject.x, make_baseline(subject.x, removal, subject.config.preprocess)
    C, H, W = x.shape[1:]
    outputs = [] if known is None else known
    recorded = iter(list(outputs))
    subject.planned = n + -(-n // subject.batch_size)
    predicted: list[Tensor] = []

    def forward(batch: Tensor) -> Tensor:
        if (answer := next(recorded, None)) is None:
            answer = subject(batch)
            outputs.append(answer)
        return answer

    def replace_squares(batch: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(len(batch), 1, H, W)
        for m in mask:
            side = int(torch.randint(max(min(H, W) // 8, 1), max(min(H, W) // 2, 1) + 1, ()))
            top, left = int(torch.randint(H - side + 1, ())), int(torch.randint(W - side + 1, ()))
            m[:, top : top + side, left : left + side] = 1
        mask = mask.to(x.device)
        predicted.append((mask[:, 0] * map_).sum((1, 2)))
        mask = mask.expand(-1, C, -1, -1)
        return mask, torch.lerp(batch, start.expand_as(batch), mask)

    # The map holds the contribution of a pixel over all channels; captum expects it by channel.
    by_channel = (map_ / C).expand(1, C, H, W)
    with torch.no_grad():
        value = captum_infidelity(
            forward,
            replace_squares,
            x,
            by_channel,
            n_perturb_samples=n,
            max_examples_per_batch=min(subject.batch_size, n),
            normalize=True,
        ).item()
    # Captum alternates between a batch of changed images and the original.
    change = torch.cat([before - after for after, before in zip(outputs[::2], outputs[1::2], strict=True)])
    mean_square = change.square().mean().item()
    # Captum's best scale may be negative, which would make an inverted map perfect.
    if torch.cat(predicted) @ change <= 0:
        value = mean_square
    return max(value, 0.0), min(max(value / mean_square, 0.0), 1.0) if mean_square else 0.0


def area(curve: np.ndarray, fractions: np.ndarray) -> float:
    """Returns the area under a curve by the trapezoidal rule."""
    return float((np.diff(fractions) * (curve[1:] + curve[:-1]) / 2).sum())


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
