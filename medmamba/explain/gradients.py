"""Attribution methods based on gradients, on captum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attribution import Attribution, Baseline, check_count, check_positive
from .feature_maps import find_layer
from .regions import make_baseline
from .subject import Subject


def saliency(subject: Subject) -> Attribution:
    """Computes |gradient|, maximum over channels (Simonyan et al. 2013)."""
    from captum.attr import Saliency

    subject.planned = 1
    gradient = Saliency(subject).attribute(_input(subject), abs=False)
    return Attribution(gradient.abs().amax(1)[0])


def smoothgrad(subject: Subject, *, samples: int = 25, noise: float = 0.15) -> Attribution:
    """Computes |mean gradient| over noisy copies (Smilkov et al. 2017); `noise` is relative to the image's range."""
    from captum.attr import NoiseTunnel, Saliency

    check_count("samples", samples)
    check_positive("noise", noise)
    subject.planned = samples + 1
    sigma = noise * (subject.x.max() - subject.x.min()).item()
    notes = [] if sigma else ["the image is constant, so the noise, which is relative to its range, is zero"]
    gradient = NoiseTunnel(Saliency(subject)).attribute(
        _input(subject), nt_samples=samples, nt_samples_batch_size=subject.batch_size, stdevs=sigma, abs=False
    )
    return Attribution(gradient.abs().amax(1)[0], {"sigma": sigma}, notes=notes)


def input_x_gradient(subject: Subject) -> Attribution:
    """Computes gradient times normalised input, summed over channels."""
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
    """Integrates gradients on the straight line from a baseline (Sundararajan et al. 2017), summed over channels.

    Attributions must sum to the change of the logit along the line, and those of any segment to the change over that
    segment. Starts with two segments of n_steps / 2 Gauss-Legendre points each; while the total error exceeds
    `tolerance` times the change, the segment with the largest error is halved, up to `max_steps` points.
    """
    from captum.attr import IntegratedGradients

    check_count("n_steps", n_steps, 2)
    check_positive("tolerance", tolerance)
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
        # Where large attributions cancel, rounding alone leaves an error.
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
    """Integrated gradients over a segment of the line."""

    begin: float
    end: float
    attribution: Tensor  # (1, C, H, W)
    miss: float  # sum of the attribution minus the change of the logit


def gradient_shap(
    subject: Subject,
    *,
    samples: int = 50,
    baselines: tuple[Baseline, ...] = ("mean", "black", "blur"),
    noise: float = 0.1,
) -> Attribution:
    """Averages gradients at random points between noisy copies of the image and random baselines (Lundberg and Lee
    2017)."""
    check_count("samples", samples)
    baselines = (baselines,) if isinstance(baselines, str | int | float) else tuple(baselines)
    if not baselines:
        raise ValueError('gradient_shap needs at least one baseline, such as baselines=("mean",)')
    starts = torch.cat([make_baseline(subject.x, b, subject.config.preprocess) for b in baselines])
    sigma = noise * (subject.x.max() - subject.x.min()).item()
    subject.planned = samples + 1 + len(starts)
    total = torch.zeros_like(subject.x)
    # As captum's GradientShap, but without NumPy's global generator, which other threads use.
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
    """Weights the channels of a feature map by their mean gradient (Selvaraju et al. 2017).

    `layer` is "stage1" to "stage4", or one branch of a block: "stage3.conv" or "stage3.scan" (last block of the stage),
    or "stage3.block2.scan". `relu` keeps only evidence for the class, as in the paper.
    """
    from captum.attr import LayerGradCam

    subject.planned = 1
    module = find_layer(subject.model, layer)
    # Starts the autograd graph here; captum's hook, which is registered later, sees this output.
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
    # Bilinear weights do not sum to exactly 1: without the clamp, a map of one pixel would not be constant, and
    # rounding would rank its pixels differently on every machine.
    values = F.interpolate(cam, subject.x.shape[2:], mode="bilinear", align_corners=False)[0, 0]
    values = values.clamp(cam.min(), cam.max())
    return Attribution(values, {"layer_size": list(size)}, notes=notes)


def _input(subject: Subject) -> Tensor:
    return subject.x.clone().requires_grad_()
