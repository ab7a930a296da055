"""Faithfulness checks of attribution maps, none of which needs expert annotations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..imaging.load import MedicalImage
from ..imaging.preprocess import preprocess
from ..model import MedMamba
from .conditions import controlled
from .explanation import Explanation, attribute, check_batch_size, find_method
from .methods import Method, check_options
from .randomisation import SIMILAR, Randomisation, State, random_states, randomisation_check
from .removal import Curves, area, infidelity, removal_curves
from .subject import Progress, Subject, frozen_view

METRICS = ("infidelity", "sensitivity", "removal", "randomisation")
PERTURBATIONS, REPEATS, ORDERS, CURVE_STEPS, RANDOM_MODELS = 40, 4, 5, 20, 3
"""Defaults of `Assessor`."""


@dataclass(frozen=True, eq=False)
class Trust:
    """Results of the checks of one explanation. Checks that were not requested are None.

    Attributes:
        method: title of the explanation.
        infidelity: mean squared difference between the change of the logit when random squares are replaced and the sum
            of the map over them, with the map scaled to fit best (Yeh et al. 2019); in squared logits.
        unexplained: infidelity relative to the mean squared change: 0 is perfect, 1 as good as an empty map.
        sensitivity: largest relative change of the map when each value of the normalised input moves by at most
            `radius` (Yeh et al. 2019); 0 is stable.
        curves: deletion and insertion, against random orders.
        randomisation: similarity to the maps of models with random weights.
        settings: of the checks.
        seconds: wall-clock time.
    """

    method: str
    infidelity: float | None = None
    unexplained: float | None = None
    sensitivity: float | None = None
    curves: Curves | None = None
    randomisation: Randomisation | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def better_than_chance(self) -> str | None:
        """Whether the map finds what the model uses: "yes", "no" or "unclear"; None without deletion and insertion.

        "yes" if both curves are better than those of every random order; "no" if neither is better than the mean of the
        random orders, or if models with random weights give a similar map, which then shows the image.
        """
        if (curves := self.curves) is None or not len(curves.random_deletion):
            return None
        if self.randomisation is not None and not self.randomisation.passed:
            return "no"
        deletion = [area(curve, curves.fractions) - curves.deletion_auc for curve in curves.random_deletion]
        insertion = [curves.insertion_auc - area(curve, curves.fractions) for curve in curves.random_insertion]
        if min(*deletion, *insertion) > 0:
            return "yes"
        return "no" if sum(deletion) <= 0 and sum(insertion) <= 0 else "unclear"

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns rows of (check, result, good value) for a table."""
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
        """Returns the results as aligned text."""
        return text_table(("check", self.method, "good"), self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Returns the record in plain types, for JSON."""
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "method",
                "better_than_chance",
                "infidelity",
                "unexplained",
                "sensitivity",
                "settings",
                "seconds",
            )
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


class Assessor:
    """Checks explanations of one model.

    For several maps of the same image and class, computes the model's outputs for random squares and random orders only
    once; the models with random weights are reused for all images.

    Args:
        model: the model explained.
        removal: baseline that replaces removed parts, as in `explain`.
        perturbations: number of random squares for the infidelity.
        radius, repeats: size and number of the perturbations for the sensitivity.
        random_orders, steps: number of random orders, and points of the deletion and insertion curves.
        random_models: number of models with random weights to compare with.
        cascade: randomise the weights stage by stage from the classifier down, rather than all at once.
        seed: for the random numbers of the checks.
        batch_size: as in `explain`.

    Raises:
        ValueError: the model cannot be explained, or a number is out of range.
    """

    def __init__(
        self,
        model: MedMamba,
        *,
        removal: str | float = "blur",
        perturbations: int = PERTURBATIONS,
        radius: float = 0.02,
        repeats: int = REPEATS,
        random_orders: int = ORDERS,
        steps: int = CURVE_STEPS,
        random_models: int = RANDOM_MODELS,
        cascade: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
    ):
        self.view = frozen_view(model)
        self.batch_size = check_batch_size(batch_size, self.view)
        if random_models < 1:
            raise ValueError(f"random_models must be at least 1, got {random_models}")
        self.settings: dict[str, Any] = dict(
            removal=removal,
            perturbations=perturbations,
            radius=radius,
            repeats=repeats,
            random_orders=random_orders,
            steps=steps,
            random_models=random_models,
            cascade=cascade,
            seed=seed,
        )
        self._states: list[State] = []
        self._shared: _Shared | None = None

    def assess(
        self, explanation: Explanation, metrics: Sequence[str] = METRICS, progress: Progress | None = None
    ) -> Trust:
        """Checks an explanation of this model.

        Args:
            explanation: made by `explain` with this model.
            metrics: checks to run, from `METRICS`.
            progress: called with the fraction done; return False to cancel.

        Raises:
            ValueError: unknown metric, or the explanation was made with another model.
            ImportError: captum is missing.
            ExplainCancelled: `progress` returned False.
        """
        began = time.perf_counter()
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; choose from {', '.join(METRICS)}")
        requested, options = explanation.request
        method = find_method(requested)
        filled = check_options(method, options)
        whole = self._subject(explanation, progress)
        shared = self._prepare(explanation, whole)
        found: dict[str, Any] = {}
        chosen = [name for name in METRICS if name in metrics]
        for i, name in enumerate(chosen):
            part = self._subject(explanation, whole.span(i / len(chosen), (i + 1) / len(chosen)))
            map_ = torch.from_numpy(explanation.attribution).to(part.x.device)
            with controlled(part.x.device, self.settings["seed"]):
                found |= self._check(name, part, explanation, method, filled, map_, shared)
        whole.report(1.0)
        return Trust(explanation.title, **found, settings=dict(self.settings), seconds=time.perf_counter() - began)

    def _subject(self, explanation: Explanation, progress: Progress | None) -> Subject:
        config, device = self.view.config, self.view.patch_embed.proj.weight.device
        x = preprocess(explanation.image, config.preprocess, config.in_chans, device).unsqueeze(0)
        return Subject(self.view, x, explanation.target, self.batch_size, progress)

    def _prepare(self, explanation: Explanation, whole: Subject) -> _Shared:
        """Returns what is known of this image and class, after checking that the explanation is of this model."""
        if (
            self._shared is None
            or self._shared.image is not explanation.image
            or self._shared.target != explanation.target
        ):
            with controlled(whole.x.device, self.settings["seed"]):
                whole.measure()
            assert whole.logits is not None
            self._shared = _Shared(explanation.image, explanation.target, whole.logits[explanation.target].item())
        logit = self._shared.logit
        if abs(logit - explanation.logit) > 0.01 * max(abs(logit), 1):
            raise ValueError(
                f"this explanation is for a logit of {explanation.logit:.3f}, but this model gives {logit:.3f}: it was "
                "made with other weights; explain the image with this model first"
            )
        return self._shared

    def _check(
        self,
        name: str,
        part: Subject,
        explanation: Explanation,
        method: Method,
        options: dict[str, Any],
        map_: Tensor,
        shared: _Shared,
    ) -> dict[str, Any]:
        s, seed = self.settings, explanation.parameters["seed"]
        if name == "infidelity":
            value, share = infidelity(part, map_, s["removal"], s["perturbations"], shared.answers)
            return {"infidelity": value, "unexplained": share}
        if name == "removal":
            shared.curves = removal_curves(
                part, map_, s["removal"], s["random_orders"], s["steps"], s["seed"], shared.curves
            )
            return {"curves": shared.curves}
        if name == "randomisation":
            if not self._states:
                self._states = random_states(self.view, s["random_models"], s["cascade"], s["seed"])
            return {"randomisation": randomisation_check(part, method, options, map_, self._states, seed)}
        runs = itertools.count()

        def run(batch: Tensor, runs: Iterator[int] = runs) -> Tensor:
            i = next(runs)
            if i == 0:  # captum starts with the unchanged image
                return map_
            moved = Subject(
                self.view,
                batch,
                explanation.target,
                self.batch_size,
                part.span((i - 1) / s["repeats"], i / s["repeats"]),
            )
            return attribute(moved, method, options, seed).values

        return {"sensitivity": sensitivity(run, part.x, s["radius"], s["repeats"])}


@dataclass(eq=False)
class _Shared:
    """Values shared by the checks of all maps of one image and class."""

    image: MedicalImage
    target: int
    logit: float
    answers: list[Tensor] = field(default_factory=list)
    curves: Curves | None = None


def assess(
    model: MedMamba,
    explanation: Explanation,
    metrics: Sequence[str] = METRICS,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Trust:
    """Checks an explanation; for several, an `Assessor` is faster.

    The sensitivity check repeats the explanation `repeats` times, and the randomisation check `random_models` times
    (with `cascade`, for each stage); the other checks only run forward passes.

    Args:
        model: the model explained.
        explanation: made by `explain` with this model.
        metrics: checks to run, from `METRICS`.
        progress: called with the fraction done; return False to cancel.
        settings: arguments of `Assessor`.

    Raises:
        ValueError: unknown metric or setting out of range, or the explanation was made with another model.
        ImportError: captum is missing.
        ExplainCancelled: `progress` returned False.
    """
    return Assessor(model, **settings).assess(explanation, metrics, progress)


def sensitivity(run: Callable[[Tensor], Tensor], x: Tensor, radius: float, repeats: int) -> float:
    """Computes the max-sensitivity of `run`, which maps (1, C, H, W) to (H, W).

    Every run must draw the same random numbers, so that only the changed input changes the map.
    """
    from captum.metrics import sensitivity_max

    def explanation_func(batch: Tensor | tuple[Tensor, ...]) -> Tensor:
        batch = batch[0] if isinstance(batch, tuple) else batch
        return run(batch).detach()[None, None]

    return sensitivity_max(
        explanation_func, x, perturb_radius=radius, n_perturb_samples=repeats, max_examples_per_batch=1
    ).item()


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
