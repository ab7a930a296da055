"""The attribution methods, each a function from a `Subject` to a map of the network's input, on captum.

Not offered, because they are wrong on this architecture without saying so: DeepLift and LRP have no rules for SiLU,
LayerNorm and the products of the scan; guided backpropagation overrides only the ReLUs, so the scan branch stays
unguided.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..imaging.preprocess import denormalise
from ..model import MedMamba, Stage
from ..utils import modes
from .regions import grid, make_baseline, superpixels
from .subject import Subject, blocks

Baseline = str | float


@dataclass
class Attribution:
    """What a method returns.

    Attributes:
        values: (H, W) float32 at the size of the network's input.
        parameters: settings that the method worked out itself, for the record.
        diagnostics: figures about the quality of the result.
        notes: what a reader must know.
    """

    values: Tensor
    parameters: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """An attribution method as `methods()` lists it.

    Attributes:
        name: what `explain(method=...)` takes.
        summary: one line for people.
        unit: what a value of the map means.
        signed: whether negative values, evidence against the class, occur.
        run: the implementation; its keyword arguments are the options of the method.
        single_pass: it evaluates the image itself first, so that needs not be done separately.
        foreign: a function of the caller, which may draw random numbers of NumPy.
    """

    name: str
    summary: str
    unit: str
    signed: bool
    run: Callable[..., Attribution] = field(repr=False)
    single_pass: bool = False
    foreign: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {p.name: p.default for p in inspect.signature(self.run).parameters.values() if p.kind == p.KEYWORD_ONLY}


def saliency(subject: Subject) -> Attribution:
    """|gradient|, the largest over channels (Simonyan et al. 2013)."""
    from captum.attr import Saliency

    subject.planned = 1
    gradient = Saliency(subject).attribute(_input(subject), abs=False)
    return Attribution(gradient.abs().amax(1)[0])


def smoothgrad(subject: Subject, *, samples: int = 25, noise: float = 0.15) -> Attribution:
    """|mean gradient| over noisy copies (Smilkov et al. 2017); `noise` is relative to the range of the image."""
    from captum.attr import NoiseTunnel, Saliency

    _check_count("samples", samples)
    _check_positive("noise", noise)
    subject.planned = samples + 1
    sigma = noise * (subject.x.max() - subject.x.min()).item()
    notes = [] if sigma else ["the image is constant, so the noise, which is relative to its range, is zero"]
    gradient = NoiseTunnel(Saliency(subject)).attribute(
        _input(subject), nt_samples=samples, nt_samples_batch_size=subject.batch_size, stdevs=sigma, abs=False
    )
    return Attribution(gradient.abs().amax(1)[0], {"sigma": sigma}, notes=notes)


def input_x_gradient(subject: Subject) -> Attribution:
    """Gradient times normalised input, summed over channels."""
    from captum.attr import InputXGradient

    subject.planned = 1
    return Attribution(InputXGradient(subject).attribute(_input(subject)).sum(1)[0])


def integrated_gradients(
    subject: Subject,
    *,
    baseline: Baseline = "mean",
    n_steps: int = 50,
    tolerance: float = 0.01,
    max_steps: int = 400,
) -> Attribution:
    """Gradients integrated on the straight line from a baseline (Sundararajan et al. 2017), summed over channels.

    The attributions must add up to the change of the logit along the line, and those of any part of the line to the
    change over that part. The line begins as two halves of n_steps / 2 Gauss-Legendre points each; as long as the whole
    misses by more than `tolerance` of the change, the part that misses most is halved. `max_steps` bounds the points.
    """
    from captum.attr import IntegratedGradients

    _check_count("n_steps", n_steps, 2)
    _check_positive("tolerance", tolerance)
    method = IntegratedGradients(subject)
    x, start = subject.x, make_baseline(subject.x, baseline, subject.config.preprocess)
    half = math.ceil(n_steps / 2)
    subject.planned += 2 * half + 4

    def integrate(begin: float, end: float) -> _Part:
        attribution, miss = method.attribute(
            torch.lerp(start, x, end),
            baselines=torch.lerp(start, x, begin),
            n_steps=half,
            internal_batch_size=subject.batch_size,
            return_convergence_delta=True,
        )
        return _Part(begin, end, attribution, miss.item())

    parts = [integrate(0, 0.5), integrate(0.5, 1)]
    steps = 2 * half
    while True:
        miss = sum(part.miss for part in parts)
        change = sum(part.attribution.sum().item() for part in parts) - miss
        # Rounding alone leaves an error where large attributions cancel.
        rounding = 1e-6 * sum(part.attribution.abs().sum().item() for part in parts)
        converged = abs(miss) <= max(tolerance * abs(change), rounding)
        if converged or steps + 2 * half > max_steps:
            break
        worst = max(parts, key=lambda part: abs(part.miss))
        parts.remove(worst)
        middle = (worst.begin + worst.end) / 2
        subject.planned += 2 * half + 4
        parts += [integrate(worst.begin, middle), integrate(middle, worst.end)]
        steps += 2 * half
    values = torch.stack([part.attribution for part in parts]).sum((0, 1, 2))  # parts, batch, channels: (H, W)
    diagnostics = {
        "logit_difference": change,
        "completeness_delta": miss,
        "completeness_error": abs(miss / change) if change else 0.0,
        "steps": steps,
        "converged": converged,
    }
    notes = []
    if not converged:
        notes.append(
            f"integrated gradients did not converge: after {steps} steps they miss {abs(miss):.3g} of a logit "
            f"difference of {change:.3g}; raise max_steps, or take another baseline"
        )
    if torch.equal(x, start):
        notes.append(f"the image equals the baseline {baseline!r}, so there is nothing to attribute; take another")
    return Attribution(values, diagnostics=diagnostics, notes=notes)


@dataclass(eq=False)
class _Part:
    """Integrated gradients over a part of the line."""

    begin: float
    end: float
    attribution: Tensor  # (1, C, H, W)
    miss: float  # sum of the attribution less the change of the logit


def gradient_shap(
    subject: Subject,
    *,
    samples: int = 50,
    baselines: tuple[Baseline, ...] = ("mean", "black", "blur"),
    noise: float = 0.1,
) -> Attribution:
    """Gradients at random points between noisy copies of the image and random baselines (Lundberg and Lee 2017)."""
    _check_count("samples", samples)
    baselines = (baselines,) if isinstance(baselines, str | int | float) else tuple(baselines)
    if not baselines:
        raise ValueError('gradient_shap needs at least one baseline, such as baselines=("mean",)')
    starts = torch.cat([make_baseline(subject.x, b, subject.config.preprocess) for b in baselines])
    sigma = noise * (subject.x.max() - subject.x.min()).item()
    subject.planned = samples + 1 + len(starts)
    total = torch.zeros_like(subject.x)
    # What captum's GradientShap computes, without NumPy's global generator, which other threads draw from.
    draw = np.random.RandomState(subject.seed % 2**32)
    for done in range(0, samples, subject.batch_size):
        n = min(subject.batch_size, samples - done)
        noisy = subject.x + torch.normal(0.0, torch.full((n, *subject.x.shape[1:]), sigma, device=subject.x.device))
        start = starts[draw.choice(len(starts), n).tolist()]
        share = torch.tensor(draw.uniform(0.0, 1.0, n), device=noisy.device, dtype=noisy.dtype).view(-1, 1, 1, 1)
        point = (share * noisy + (1 - share) * start).requires_grad_()
        (gradient,) = torch.autograd.grad(subject(point).sum(), point)
        total += ((noisy - start) * gradient).sum(0, keepdim=True)
    values = (total / samples).sum((0, 1))
    with torch.no_grad():
        change = (subject(subject.x) - torch.cat([subject(start) for start in starts.split(1)]).mean()).item()
    missing = abs(values.sum().item() - change)
    diagnostics = {"logit_difference": change, "completeness_error": missing / abs(change) if change else 0.0}
    return Attribution(values, {"sigma": sigma}, diagnostics)


def gradcam(subject: Subject, *, layer: str = "stage4", relu: bool = False) -> Attribution:
    """Channels of a feature map weighted by their mean gradient (Selvaraju et al. 2017).

    `layer` is "stage1" to "stage4", or one half of a block: "stage3.conv" and "stage3.scan" (the last block of the
    stage), "stage3.block2.scan". `relu` keeps evidence for the class only, as in the paper.
    """
    from captum.attr import LayerGradCam

    subject.planned = 1
    module = find_layer(subject.model, layer)
    # The graph begins here: what comes before is computed without one, and captum's hook, set later, sees this output.
    handle = module.register_forward_hook(lambda _module, _input, output: output.detach().requires_grad_())
    try:
        # (1, 1, H / 2^(i+2), W / 2^(i+2))
        cam = LayerGradCam(subject, module).attribute(subject.x.detach(), relu_attributions=relu)
    finally:
        handle.remove()
    size = tuple(cam.shape[2:])
    notes = []
    if max(size) < 3:
        notes.append(f"the map of {layer} has only {size[0]}x{size[1]} pixels here; an earlier stage locates better")
    # Weights of bilinear interpolation do not add up to 1 to the last bit: without the limits, a map of one pixel would
    # not be constant, and rounding would rank its pixels, differently on every machine.
    values = F.interpolate(cam, subject.x.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    values = values.clamp(cam.min(), cam.max())
    return Attribution(values, {"layer_size": list(size)}, notes=notes)


def occlusion(
    subject: Subject, *, window: int | None = None, stride: int | None = None, baseline: Baseline = "mean"
) -> Attribution:
    """Fall of the logit when a window is replaced by a baseline, averaged over the windows that cover a pixel
    (Zeiler and Fergus 2014). Default: windows of an eighth of the input, half overlapping."""
    from captum.attr import Occlusion

    C, H, W = subject.x.shape[1:]
    window = max(min(H, W) // 8, 1) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    _check_count("window", window)
    _check_count("stride", stride)
    if window > min(H, W) or stride > window:
        raise ValueError(
            f"occlusion needs stride <= window <= {min(H, W)}, the input's side; got window {window}, stride {stride}"
        )
    subject.planned = 1 + math.prod(math.ceil((side - window) / stride) + 1 for side in (H, W))
    values = Occlusion(subject).attribute(
        subject.x,
        sliding_window_shapes=(C, window, window),
        strides=(C, stride, stride),
        baselines=make_baseline(subject.x, baseline, subject.config.preprocess),
        perturbations_per_eval=subject.batch_size,
    )
    return Attribution(values[0, 0], {"window": window, "stride": stride})  # all channels hold the same


def feature_ablation(
    subject: Subject, *, segments: str = "superpixels", n_segments: int = 64, baseline: Baseline = "mean"
) -> Attribution:
    """Fall of the logit when a segment is replaced by a baseline; `segments` is "superpixels" or "grid"."""
    from captum.attr import FeatureAblation

    _check_count("n_segments", n_segments, 2)
    H, W = subject.x.shape[2:]
    if segments == "superpixels":
        mask = superpixels(denormalise(subject.x[0], subject.config.preprocess), n_segments)
    elif segments == "grid":
        mask = grid(H, W, n_segments)
    else:
        raise ValueError(f'segments must be "superpixels" or "grid", got {segments!r}')
    count = int(mask.max()) + 1
    subject.planned = count + 1
    values = FeatureAblation(subject).attribute(
        subject.x,
        baselines=make_baseline(subject.x, baseline, subject.config.preprocess),
        feature_mask=mask.to(subject.x.device)[None, None],
        perturbations_per_eval=subject.batch_size,
    )
    return Attribution(values[0, 0], {"n_segments": count})


METHODS = {
    method.name: method
    for method in (
        Method("saliency", "gradient of the logit", "|d logit / d pixel|", False, saliency, single_pass=True),
        Method("smoothgrad", "gradient, averaged over noisy copies", "|d logit / d pixel|", False, smoothgrad),
        Method("input_x_gradient", "gradient times input", "logit", True, input_x_gradient, single_pass=True),
        Method(
            "integrated_gradients",
            "gradient, integrated from a baseline; adds up to the change of the logit",
            "logit",
            True,
            integrated_gradients,
        ),
        Method(
            "gradient_shap",
            "gradient, averaged between copies and baselines",
            "logit",
            True,
            gradient_shap,
        ),
        Method(
            "gradcam",
            "a stage, or its convolution or scan branch, weighted by its gradient; fastest",
            "logit",
            True,
            gradcam,
            single_pass=True,
        ),
        Method("occlusion", "fall of the logit when a sliding window is covered", "logit", True, occlusion),
        Method(
            "feature_ablation",
            "fall of the logit when a superpixel is covered",
            "logit",
            True,
            feature_ablation,
        ),
    )
}


def methods() -> dict[str, Method]:
    """The attribution methods by name."""
    return dict(METHODS)


def layers(model: MedMamba) -> list[str]:
    """What `gradcam` takes as `layer` for this model, from input to output."""
    model = cast(MedMamba, modes.unwrap(model))
    names = []
    for i in range(1, len(model.stages) + 1):
        for j in range(1, len(blocks(model, i)) + 1):
            names += [f"stage{i}.block{j}.conv", f"stage{i}.block{j}.scan"]
        names += [f"stage{i}.conv", f"stage{i}.scan", f"stage{i}"]
    return names


def find_layer(model: MedMamba, name: str) -> nn.Module:
    """The module whose output is the (B, C, H, W) map of that name.

    Raises:
        ValueError: no such layer.
    """
    if name not in layers(model):
        short = ", ".join(n for n in layers(model) if "block" not in n)
        raise ValueError(f"no layer {name!r}; there are {short}, and branches of single blocks like stage1.block1.scan")
    stage, *rest = name.split(".")
    number = int(stage.removeprefix("stage"))
    if not rest:
        return cast(Stage, model.stages[number - 1]).map
    block = blocks(model, number)[int(rest[0].removeprefix("block")) - 1 if len(rest) == 2 else -1]
    return block.conv if rest[-1] == "conv" else block.ssm_map


def check_options(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a method, defaults filled in.

    Raises:
        ValueError: one that the method does not have.
    """
    if unknown := [name for name in options if name not in method.options]:
        known = ", ".join(f"{name}={default!r}" for name, default in method.options.items()) or "none"
        raise ValueError(
            f"{method.name} has no option {', '.join(map(repr, unknown))}; its options and defaults: {known}"
        )
    return {**method.options, **options}


def _input(subject: Subject) -> Tensor:
    return subject.x.clone().requires_grad_()


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
