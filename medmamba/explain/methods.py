"""The table of attribution methods; each is a function from a `Subject` to a map of the network's input.

DeepLift, LRP and guided backpropagation are not offered, because they would be silently wrong on this architecture:
DeepLift and LRP have no rules for SiLU, LayerNorm and the products of the scan, and guided backpropagation overrides
only ReLUs, so it would leave the scan branch unguided.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .attribution import Attribution
from .gradients import gradcam, gradient_shap, input_x_gradient, integrated_gradients, saliency, smoothgrad
from .occlusions import feature_ablation, occlusion


@dataclass(frozen=True)
class Method:
    """An attribution method as `methods()` lists it.

    Attributes:
        name: what `explain(method=...)` takes.
        summary: one-line description.
        unit: unit of the map's values.
        signed: whether negative values, evidence against the class, occur.
        run: the implementation; its keyword-only arguments are the options of the method.
        single_pass: whether it evaluates the unchanged image first, so that this need not be done separately.
        foreign: whether it is a user-defined function, which may draw random numbers from NumPy.
        reading: how to read the map, in plain words; warmer colours are positive values.
    """

    name: str
    summary: str
    unit: str
    signed: bool
    run: Callable[..., Attribution] = field(repr=False)
    single_pass: bool = False
    foreign: bool = False
    reading: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.run).parameters.values() if p.kind == p.KEYWORD_ONLY}


_STRONGEST = "Brighter: a small change here would move the score most, up or down"
METHODS = {
    method.name: method
    for method in (
        Method(
            "saliency",
            "gradient of the logit",
            "|d logit / d pixel|",
            False,
            saliency,
            single_pass=True,
            reading=f"{_STRONGEST}.",
        ),
        Method(
            "smoothgrad",
            "gradient averaged over noisy copies",
            "|d logit / d pixel|",
            False,
            smoothgrad,
            reading=f"{_STRONGEST}, averaged over noisy copies of the image.",
        ),
        Method(
            "input_x_gradient",
            "gradient times input",
            "logit",
            True,
            input_x_gradient,
            single_pass=True,
            reading="Warmer: what is seen here raises the score, as far as small changes tell; cooler: it lowers it.",
        ),
        Method(
            "integrated_gradients",
            "gradient integrated from a baseline; sums to the change of the logit",
            "logit",
            True,
            integrated_gradients,
            reading="Warmer: what is seen here raises the score, compared with an empty image; cooler: it lowers it.",
        ),
        Method(
            "gradient_shap",
            "gradient averaged over points between noisy copies and baselines",
            "logit",
            True,
            gradient_shap,
            reading="Warmer: what is seen here raises the score, compared with empty and blurred images; cooler: it "
            "lowers it.",
        ),
        Method(
            "gradcam",
            "feature map of a stage, or of its convolution or scan branch, weighted by its gradient; fastest",
            "logit",
            True,
            gradcam,
            single_pass=True,
            reading="Warmer: features that raise the score were found around here; cooler: features that lower it.",
        ),
        Method(
            "occlusion",
            "drop of the logit when a sliding window is covered",
            "logit",
            True,
            occlusion,
            reading="Warmer: hiding this would lower the score; cooler: hiding it would raise it.",
        ),
        Method(
            "feature_ablation",
            "drop of the logit when a superpixel is covered",
            "logit",
            True,
            feature_ablation,
            reading="Warmer: hiding this patch would lower the score; cooler: hiding it would raise it.",
        ),
    )
}


def methods() -> dict[str, Method]:
    """Returns the attribution methods by name."""
    return dict(METHODS)


def check_options(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """Returns all options of a method, with defaults filled in.

    Raises:
        ValueError: the method has no such option.
    """
    if unknown := [name for name in options if name not in method.options]:
        known = ", ".join(f"{name}={default!r}" for name, default in method.options.items()) or "none"
        raise ValueError(
            f"{method.name} has no option {', '.join(map(repr, unknown))}; its options and defaults: {known}"
        )
    return {**method.options, **options}
