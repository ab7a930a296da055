"""Attribution methods that cover parts of the image, on captum."""

from __future__ import annotations

import math

from ..imaging.preprocess import denormalise
from .attribution import Attribution, Baseline, check_count
from .regions import grid, make_baseline, superpixels
from .subject import Subject


def occlusion(
    subject: Subject, *, window: int | None = None, stride: int | None = None, baseline: Baseline = "mean"
) -> Attribution:
    """Computes the drop of the logit when a window is replaced by a baseline, averaged over the windows that cover a
    pixel (Zeiler and Fergus 2014). Default: windows of an eighth of the input, overlapping by half."""
    from captum.attr import Occlusion

    C, H, W = subject.x.shape[1:]
    window = max(min(H, W) // 8, 1) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    check_count("window", window)
    check_count("stride", stride)
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
    """Computes the drop of the logit when a segment, of "superpixels" or a "grid", is replaced by a baseline."""
    from captum.attr import FeatureAblation

    check_count("n_segments", n_segments, 2)
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
