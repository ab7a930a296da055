"""Does a map say what the model does? Four checks that need no expert and no drawn outline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import MedMamba
from ..preprocess import preprocess
from .explanation import Explanation, attribute, find_method
from .methods import check_options
from .randomisation import SIMILAR, Randomisation, randomisation_check
from .regions import grid, make_baseline
from .subject import Progress, Subject, controlled, frozen_view

METRICS = ("infidelity", "sensitivity", "removal", "randomisation")


@dataclass(frozen=True, eq=False)
class Curves:
    """The logit while cells of the image are replaced (deletion) or brought back (insertion), in the order of the map,
    strongest evidence first, and in random orders.

    Curves hold the logit minus that of the image with everything replaced, relative to the difference between the two
    ends: for a class that the image speaks for they run between 1 and 0. The logit, not the probability, because that
    is what was explained, and because the probability of a confident model does not move.

    Attributes:
        fractions: (S,) share of the image replaced or brought back.
        deletion, insertion: (S,) in the order of the map.
        random_deletion, random_insertion: (orders, S).
        removal: what the cells were replaced with.
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


@dataclass(frozen=True, eq=False)
class Trust:
    """What the checks found of one explanation. A check that was not asked for is None.

    Attributes:
        infidelity: mean squared difference between the change of the logit when random squares are replaced and the sum
            of the map over them, the map scaled to fit best (Yeh et al. 2019); in squared logits.
        unexplained: the same as a share of the mean squared change: 0 perfect, 1 as good as an empty map.
        sensitivity: largest relative change of the map when each input value moves by at most `radius` (of the
            normalised input); 0 is stable.
        curves: deletion and insertion against random orders.
        randomisation: how alike the map is to the map of a model with random weights.
        settings: of the checks.
    """

    method: str
    infidelity: float | None = None
    unexplained: float | None = None
    sensitivity: float | None = None
    curves: Curves | None = None
    randomisation: Randomisation | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def rows(self) -> list[tuple[str, str, str]]:
        """(check, result, what is good) for a table beside the map."""
        rows = []
        if self.infidelity is not None and self.unexplained is not None:
            rows.append(("infidelity", f"{self.infidelity:.3g}", "low"))
            rows.append(("change not explained by the map", f"{self.unexplained:.0%}", "low; 100% is an empty map"))
        if self.sensitivity is not None:
            rows.append(("max-sensitivity", f"{self.sensitivity:.2f}", "low"))
        if (curves := self.curves) is not None:
            for name, auc, (mean, sd), good in (
                ("deletion AUC", curves.deletion_auc, curves.random_deletion_auc, "below"),
                ("insertion AUC", curves.insertion_auc, curves.random_insertion_auc, "above"),
            ):
                rows.append((name, f"{auc:.3f}", f"{good} random order, {mean:.3f} ± {sd:.3f}"))
        if (check := self.randomisation) is not None:
            verdict = "passed" if check.passed else "FAILED: the map hardly depends on the weights"
            rows.append(("same map with random weights", f"{check.similarity:.2f}", f"below {SIMILAR}: {verdict}"))
        return rows

    def table(self) -> str:
        """The rows as aligned text."""
        return text_table(("check", self.method, "good"), self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("method", "infidelity", "unexplained", "sensitivity", "settings", "seconds")
        }
        if (curves := self.curves) is not None:
            record["curves"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(curves).items()}
            record |= {"deletion_auc": curves.deletion_auc, "insertion_auc": curves.insertion_auc}
            record |= {
                "random_deletion_auc": curves.random_deletion_auc[0],
                "random_insertion_auc": curves.random_insertion_auc[0],
            }
        if self.randomisation is not None:
            record["randomisation"] = self.randomisation.to_dict()
        return record


def assess(
    model: MedMamba,
    explanation: Explanation,
    metrics: Sequence[str] = METRICS,
    *,
    removal: str | float = "blur",
    perturbations: int = 40,
    radius: float = 0.02,
    repeats: int = 4,
    random_orders: int = 5,
    steps: int = 20,
    cascade: bool = False,
    known: Curves | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Trust:
    """Checks an explanation of this model.

    Sensitivity repeats the explanation `repeats` + 1 times and randomisation once (with `cascade`, once per stage); the
    other checks only run the model forward.

    Args:
        metrics: some of `METRICS`.
        removal: what replaces removed parts: a baseline as in `explain`.
        perturbations: random squares for the infidelity.
        radius, repeats: of the perturbations for the sensitivity.
        random_orders, steps: of the deletion and insertion curves.
        cascade: randomise the weights from the classifier down, a stage at a time, rather than all at once.
        known: curves of another explanation of the same image and class, whose random orders are taken over.

    Raises:
        ValueError: unknown metric or removal, or an explanation of another model.
        ImportError: captum is missing.
        ExplainCancelled: `progress` returned False.
    """
    began = time.perf_counter()
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; choose from {', '.join(METRICS)}")
    requested, options = explanation.request
    method = find_method(requested)
    filled = check_options(method, options)
    view = frozen_view(model)
    x = preprocess(explanation.image, view.config.preprocess, view.config.in_chans).unsqueeze(0)
    whole = Subject(view, x, explanation.target, batch_size, progress)
    with controlled(whole.x.device, seed):
        whole.measure()
    assert whole.logits is not None
    logit = whole.logits[explanation.target].item()
    if abs(logit - explanation.logit) > 0.01 * max(abs(logit), 1):
        raise ValueError(
            f"this explanation is of a logit of {explanation.logit:.3f}, for which this model gives {logit:.3f}: it "
            "was made with other weights; explain the image with this model first"
        )
    found: dict[str, Any] = {}
    chosen = [name for name in METRICS if name in metrics]
    for i, name in enumerate(chosen):
        part = Subject(view, x, explanation.target, batch_size, whole.span(i / len(chosen), (i + 1) / len(chosen)))
        map_ = torch.from_numpy(explanation.attribution).to(part.x.device)
        with controlled(part.x.device, seed):
            if name == "infidelity":
                found["infidelity"], found["unexplained"] = infidelity(part, map_, removal, perturbations)
            elif name == "sensitivity":
                runs = itertools.count()

                def run(batch: Tensor, part: Subject = part, runs: Iterator[int] = runs) -> Tensor:
                    i, n = next(runs), repeats + 1
                    moved = Subject(view, batch, explanation.target, batch_size, part.span(i / n, (i + 1) / n))
                    return attribute(moved, method, filled, explanation.parameters["seed"]).values

                found["sensitivity"] = sensitivity(run, part.x, radius, repeats)
            elif name == "removal":
                found["curves"] = removal_curves(part, map_, removal, random_orders, steps, seed, known)
            else:
                found["randomisation"] = randomisation_check(part, method, filled, map_, cascade, seed)
    whole.report(1.0)
    settings = dict(
        removal=removal, perturbations=perturbations, radius=radius, repeats=repeats, random_orders=random_orders
    )
    settings |= dict(steps=steps, cascade=cascade, seed=seed)
    return Trust(explanation.title, **found, settings=settings, seconds=time.perf_counter() - began)


def infidelity(subject: Subject, map_: Tensor, removal: str | float = "blur", n: int = 40) -> tuple[float, float]:
    """Infidelity with squares of 1/8 to 1/2 of the side at random places, and its share of the mean squared change. The
    map is scaled, by a factor of at least 0, to fit best."""
    from captum.metrics import infidelity as captum_infidelity

    x, start = subject.x, make_baseline(subject.x, removal, subject.config.preprocess)
    C, H, W = x.shape[1:]
    subject.planned = n + -(-n // subject.batch_size)
    outputs: list[Tensor] = []
    predicted: list[Tensor] = []

    def forward(batch: Tensor) -> Tensor:
        outputs.append(subject(batch))
        return outputs[-1]

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

    # The map says what a pixel contributes with all its channels; captum wants it by channel.
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
    # Captum evaluates a batch of changed images, then the image, and so on.
    change = torch.cat([before - after for after, before in zip(outputs[::2], outputs[1::2], strict=True)])
    mean_square = change.square().mean().item()
    # Captum's best scale may be negative, for which a map that is wrong everywhere would be perfect.
    if torch.cat(predicted) @ change <= 0:
        value = mean_square
    return max(value, 0.0), min(max(value / mean_square, 0.0), 1.0) if mean_square else 0.0


def sensitivity(run: Callable[[Tensor], Tensor], x: Tensor, radius: float, repeats: int) -> float:
    """Max-sensitivity of `run`, from (1, C, H, W) to (H, W). Each run draws the same random numbers, so that only the
    changed input moves the map."""
    from captum.metrics import sensitivity_max

    def explanation_func(batch: Tensor | tuple[Tensor, ...]) -> Tensor:
        batch = batch[0] if isinstance(batch, tuple) else batch
        return run(batch).detach()[None, None]

    return sensitivity_max(
        explanation_func, x, perturb_radius=radius, n_perturb_samples=repeats, max_examples_per_batch=1
    ).item()


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
    """Deletion and insertion curves (Petsiuk et al. 2018) over cells of a grid.

    Cells rather than pixels: scattered single pixels make patterns that the model has never seen, and coarse maps could
    not rank them. Ties are in random order.

    Args:
        map_: (H, W).
        known: curves of another map of the same image, class and settings, whose random orders are taken over.
    """
    x, start = subject.x, make_baseline(subject.x, removal, subject.config.preprocess)
    H, W = x.shape[2:]
    labels = grid(H, W, min(cells, (H // 4) * (W // 4)))
    count = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(count, generator=generator)
    score = torch.zeros(count, dtype=torch.float64).index_add_(0, labels.flatten(), map_.cpu().double().flatten())
    score /= labels.flatten().bincount()
    orders = [shuffled[score[shuffled].argsort(descending=True, stable=True)]]
    if known is None:
        orders += [torch.randperm(count, generator=generator) for _ in range(random_orders)]
    taken = torch.linspace(0, count, min(steps, count) + 1).round().long()  # (S,) cells
    subject.planned = 2 * len(orders) * len(taken)
    deletion, insertion = [], []
    for order in orders:
        rank = torch.empty(count, dtype=torch.long)
        rank[order] = torch.arange(count)
        masks = (rank[labels] < taken[:, None, None]).unsqueeze(1).to(x.device, x.dtype)  # (S, 1, H, W)
        deletion.append(_logits(subject, x, start, masks))
        insertion.append(_logits(subject, start, x, masks))
    whole, empty = deletion[0][0], deletion[0][-1]
    scale = abs(whole - empty) or 1.0
    deletion, insertion = ([(curve - empty) / scale for curve in curves] for curves in (deletion, insertion))
    return Curves(
        (taken / count).numpy(),
        deletion[0],
        insertion[0],
        np.array(deletion[1:]) if known is None else known.random_deletion,
        np.array(insertion[1:]) if known is None else known.random_insertion,
        removal,
    )


def area(curve: np.ndarray, fractions: np.ndarray) -> float:
    """Trapezoidal area."""
    return float((np.diff(fractions) * (curve[1:] + curve[:-1]) / 2).sum())


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def _logits(subject: Subject, full: Tensor, other: Tensor, masks: Tensor) -> np.ndarray:
    values = []
    for part in masks.split(subject.batch_size):
        batch = torch.lerp(full.expand(len(part), -1, -1, -1), other.expand(len(part), -1, -1, -1), part)
        values.append(subject(batch).cpu())
    return torch.cat(values).double().numpy()


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
