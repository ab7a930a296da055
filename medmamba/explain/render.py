"""Figures, with matplotlib's object interface only: nothing global is touched, so it is safe in servers and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..imaging.load import MedicalImage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

    from .explanation import Explanation
    from .scan_field import ScanField

DPI = 100
SMALLEST, LARGEST = 384, 4096  # pixels of the image's long side on a figure; between them its own resolution is kept
FAINT = 0.25
"""An image whose values span less than this share of black to white is stretched for display."""
_MARGIN = 12  # pixels
_TITLE, _BAR = 46, 106


def overlay_figure(explanation: Explanation, alpha: float = 0.75) -> Figure:
    """The overlay with title and colour bar, one figure pixel per image pixel (small images enlarged by a whole
    factor, those above 4096 pixels reduced)."""
    height, width = _shown_size(explanation.image.size)
    total_w, total_h = max(width + _BAR + 2 * _MARGIN, 360), height + _TITLE + 2 * _MARGIN
    figure = new_figure(total_w / DPI, total_h / DPI)
    image_box = (_MARGIN / total_w, _MARGIN / total_h, width / total_w, height / total_h)
    bar_box = ((width + 2 * _MARGIN) / total_w, _MARGIN / total_h, 14 / total_w, height / total_h)
    axes = figure.add_axes(image_box)
    reduced = max(explanation.image.size) > LARGEST
    axes.imshow(
        overlay_pixels(explanation, alpha), interpolation="antialiased" if reduced else "nearest", aspect="auto"
    )
    axes.set_axis_off()
    bar = add_bar(figure, figure.add_axes(bar_box), explanation)
    bar.set_label(bar_label(explanation), fontsize=8)
    text = f"{explanation.label}: logit {explanation.logit:.2f}, probability {explanation.probability:.1%}"
    text = f"{explanation.title}\n{text}"
    figure.text(_MARGIN / total_w, 1 - 6 / total_h, text, va="top", fontsize=9)
    return figure


def overlay_pixels(explanation: Explanation, alpha: float = 0.75) -> np.ndarray:
    """uint8 (h, w, 3): the grey image, coloured where the map is strong."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    values, limit = explanation.attribution_full, colour_limit(explanation)
    share = np.clip(np.abs(values) / limit, 0, 1)[..., None]  # (h, w, 1)
    colours = colour_map(explanation.signed)(_to_unit(values, limit, explanation.signed))[..., :3]
    grey = display_image(explanation.image).mean(-1, keepdims=True)
    # The weaker the attribution, the more of the image shows through, so that a map near 0 does not tint it. Any slower
    # than in proportion would draw outlines where the sign changes.
    weight = alpha * share
    return np.rint(255 * ((1 - weight) * grey + weight * colours)).astype(np.uint8)


def comparison_figure(explanations: list[Explanation], alpha: float = 0.75) -> Figure:
    """The image and each overlay, in a grid, each with its own colour bar: units differ between methods."""
    panels = len(explanations) + 1
    rows = -(-panels // 4)
    columns = -(-panels // rows)
    height, width = explanations[0].image.size
    side = 2.6
    figure = new_figure(
        columns * side * 1.25, rows * (side * min(max(height / width, 0.5), 2) + 0.45), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    first = explanations[0]
    axes[0].imshow(display_image(first.image))
    axes[0].set_title(f"{first.label} {first.probability:.1%}", fontsize=9)
    for ax, explanation in zip(axes[1:], explanations, strict=False):
        ax.imshow(overlay_pixels(explanation, alpha))
        ax.set_title(explanation.title, fontsize=9)
        add_bar(figure, ax.inset_axes((1.03, 0, 0.05, 1)), explanation)
    return figure


def scan_figure(field: ScanField) -> Figure:
    """The image with the pixel, and the influence on that pixel: of all directions together and of each alone, in
    logarithmic colours over four decades."""
    from matplotlib.colors import LogNorm

    figure = new_figure(11.5, 7.2, layout="constrained")
    axes = figure.subplots(2, 3)
    peak = float(field.merged.max()) or 1.0
    axes[0, 0].imshow(display_image(field.image))
    axes[0, 0].plot(field.image_pixel[1], field.image_pixel[0], "+", color="red", markersize=12, markeredgewidth=2)
    axes[0, 0].set_title(f"pixel {field.image_pixel}, stage {field.stage}, block {field.block}", fontsize=9)
    maps = [
        (f"all directions; the pixel on itself: +{field.skip:.2g}", field.merged),
        *zip(field.names, field.directions, strict=True),
    ]
    shown: Any = None
    for ax, (name, values) in zip(axes.flatten()[1:], maps, strict=True):
        shown = ax.imshow(np.maximum(values, peak * 1e-4), norm=LogNorm(peak * 1e-4, peak), cmap="magma")
        ax.plot(field.pixel[1], field.pixel[0], "+", color="cyan", markersize=10)
        reach = field.reach.get(name)
        ax.set_title(name + (f": 90% within {reach} tokens" if reach is not None else ""), fontsize=9)
    for ax in axes.flatten():
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(shown, ax=axes, label="|d output at the pixel / d input|, mean over channels", shrink=0.8)
    return figure


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A `Figure` of this size in inches that can save itself.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "medmamba[explain]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def add_bar(figure: Figure, axes: Axes, explanation: Explanation) -> Colorbar:
    """A colour bar in `axes`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = colour_limit(explanation)
    norm = Normalize(-limit if explanation.signed else 0, limit)
    bar = figure.colorbar(ScalarMappable(norm, colour_map(explanation.signed)), cax=axes)
    bar.ax.tick_params(labelsize=7)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]
    bar.ax.yaxis.get_offset_text().set(fontsize=7, x=0)
    return bar


def bar_label(explanation: Explanation) -> str:
    """What the values are, and of a signed map which colour speaks for the class."""
    from .methods import METHODS

    method = METHODS.get(explanation.method)
    unit = method.unit if method else ""
    sides = "blue against, red for the class" if explanation.signed and method else ""
    return f"{unit}: {sides}" if unit and sides else unit or sides


def colour_map(signed: bool) -> Any:
    """Diverging for signed maps, white at 0; sequential else."""
    from matplotlib import colormaps

    return colormaps["RdBu_r" if signed else "inferno"]


def colour_limit(explanation: Explanation) -> float:
    """The magnitude shown in full colour: the 99.5th percentile, so that a few pixels do not dim all others."""
    magnitude = np.abs(explanation.attribution)
    return float(np.percentile(magnitude, 99.5)) or float(magnitude.max()) or 1.0


def display_image(image: MedicalImage) -> np.ndarray:
    """float (h, w, 3) in [0, 1]; an image with hardly any contrast is stretched."""
    pixels = image.pixels
    if (span := faint_range(image)) is not None:
        pixels = np.clip((pixels - span[0]) / (span[1] - span[0]), 0, 1)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels.mean(-1, keepdims=True), 3, axis=2)


def faint_range(image: MedicalImage) -> tuple[float, float] | None:
    """The values that nearly all pixels lie between, if these are close together, but not the same."""
    step = -(-max(image.size) // 128)
    low, high = (float(v) for v in np.percentile(image.pixels[::step, ::step], (0.5, 99.5)))
    return (low, high) if 1e-4 < high - low < FAINT else None


def _to_unit(values: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    return np.clip(values / limit / 2 + 0.5 if signed else values / limit, 0, 1)


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    longest = max(size)
    factor = -(-SMALLEST // longest) if longest < SMALLEST else min(1.0, LARGEST / longest)
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
