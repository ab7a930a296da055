"""Figures of maps and scan fields, from arrays and plain values.

Uses matplotlib's object interface only, which changes no global state: safe in servers and threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..imaging.load import MedicalImage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

DPI = 100
SMALLEST, LARGEST = 384, 4096  # pixels of the image's long side on a figure; between them its own resolution is kept
FAINT = 0.25
"""An image whose values span less than this share of black to white is stretched for display."""
_MARGIN = 12  # pixels
_BAND = 2**20  # pixels drawn at a time
_TITLE, _BAR = 46, 106


class Map(NamedTuple):
    """A map to draw over an image.

    Attributes:
        title: of its panel.
        values: float (h, w), at the size of the image.
        limit: magnitude drawn in full colour, see `colour_limit`.
        signed: whether negative values occur.
    """

    title: str
    values: np.ndarray
    limit: float
    signed: bool


def overlay_figure(image: MedicalImage, map_: Map, caption: str, bar_label: str, alpha: float = 0.75) -> Figure:
    """Returns the overlay with title and colour bar, one figure pixel per image pixel.

    Images below 384 pixels are enlarged by a whole factor, those above 4096 are reduced.

    Args:
        caption: second line of the title.
        bar_label: label of the colour bar.
        alpha: as in `overlay_pixels`.
    """
    height, width = _shown_size(image.size)
    total_w, total_h = max(width + _BAR + 2 * _MARGIN, 360), height + _TITLE + 2 * _MARGIN
    figure = new_figure(total_w / DPI, total_h / DPI)
    image_box = (_MARGIN / total_w, _MARGIN / total_h, width / total_w, height / total_h)
    bar_box = ((width + 2 * _MARGIN) / total_w, _MARGIN / total_h, 14 / total_w, height / total_h)
    axes = figure.add_axes(image_box)
    interpolation = "antialiased" if max(image.size) > LARGEST else "nearest"
    axes.imshow(overlay_pixels(image, map_, alpha), interpolation=interpolation, aspect="auto")
    axes.set_axis_off()
    bar = add_bar(figure, figure.add_axes(bar_box), map_)
    bar.set_label(bar_label, fontsize=8)
    figure.text(_MARGIN / total_w, 1 - 6 / total_h, f"{map_.title}\n{caption}", va="top", fontsize=9)
    return figure


def overlay_pixels(image: MedicalImage, map_: Map, alpha: float = 0.75) -> np.ndarray:
    """Returns uint8 (h, w, 3): the image in grey, coloured where the map is strong.

    Args:
        alpha: opacity of the strongest colour, 0 to 1.

    Raises:
        ValueError: `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    grey = display_image(image).mean(-1, keepdims=True)
    drawn = np.empty((*grey.shape[:2], 3), np.uint8)
    rows = max(_BAND // max(grey.shape[1], 1), 1)  # at a time: colours of a whole X-ray take half a gigabyte
    for top in range(0, len(grey), rows):
        band = map_._replace(values=map_.values[top : top + rows])
        share = np.clip(np.abs(band.values) / band.limit, 0, 1)[..., None]  # (rows, w, 1)
        colours = colour_map(band.signed)(_to_unit(band))[..., :3]
        # Opacity is proportional to the magnitude: values near 0 do not tint the image, and there is no outline where
        # the sign changes.
        weight = alpha * share
        drawn[top : top + rows] = np.rint(255 * ((1 - weight) * grey[top : top + rows] + weight * colours))
    return drawn


def comparison_figure(image: MedicalImage, title: str, maps: Sequence[Map], alpha: float = 0.75) -> Figure:
    """Returns the image and each overlay in a grid; each has its own colour bar, since units differ between methods."""
    panels = len(maps) + 1
    rows = -(-panels // 4)
    columns = -(-panels // rows)
    height, width = image.size
    side = 2.6
    figure = new_figure(
        columns * side * 1.25, rows * (side * min(max(height / width, 0.5), 2) + 0.45), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(display_image(image))
    axes[0].set_title(title, fontsize=9)
    for ax, map_ in zip(axes[1:], maps, strict=False):
        ax.imshow(overlay_pixels(image, map_, alpha))
        ax.set_title(map_.title, fontsize=9)
        add_bar(figure, ax.inset_axes((1.03, 0, 0.05, 1)), map_)
    return figure


def scan_figure(
    image: MedicalImage,
    title: str,
    image_pixel: tuple[int, int],
    pixel: tuple[int, int],
    merged: tuple[str, np.ndarray],
    directions: Mapping[str, np.ndarray],
) -> Figure:
    """Returns the image with the pixel marked, and the influence on it, merged and by direction, on a log scale over
    four decades.

    Args:
        image_pixel, pixel: (row, column) in the image and in the maps.
        merged: title and map (H', W') of the sum of the directions.
        directions: title to map (H', W') of each direction.
    """
    from matplotlib.colors import LogNorm

    figure = new_figure(11.5, 7.2, layout="constrained")
    axes = figure.subplots(2, 3)
    peak = float(merged[1].max()) or 1.0
    axes[0, 0].imshow(display_image(image))
    axes[0, 0].plot(image_pixel[1], image_pixel[0], "+", color="red", markersize=12, markeredgewidth=2)
    axes[0, 0].set_title(title, fontsize=9)
    shown: Any = None
    for ax, (name, values) in zip(axes.flatten()[1:], [merged, *directions.items()], strict=True):
        shown = ax.imshow(np.maximum(values, peak * 1e-4), norm=LogNorm(peak * 1e-4, peak), cmap="magma")
        ax.plot(pixel[1], pixel[0], "+", color="cyan", markersize=10)
        ax.set_title(name, fontsize=9)
    for ax in axes.flatten():
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(shown, ax=axes, label="|d output at the pixel / d input|, mean over channels", shrink=0.8)
    return figure


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Returns an empty `Figure` of this size in inches, with a canvas to save it.

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


def add_bar(figure: Figure, axes: Axes, map_: Map) -> Colorbar:
    """Draws the colour bar of a map into `axes` and returns it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    norm = Normalize(-map_.limit if map_.signed else 0, map_.limit)
    bar = figure.colorbar(ScalarMappable(norm, colour_map(map_.signed)), cax=axes)
    bar.ax.tick_params(labelsize=7)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]
    bar.ax.yaxis.get_offset_text().set(fontsize=7, x=0)
    return bar


def colour_map(signed: bool) -> Any:
    """Returns a diverging colour map, white at 0, for signed maps, and a sequential one for others."""
    from matplotlib import colormaps

    return colormaps["RdBu_r" if signed else "inferno"]


def colour_limit(attribution: np.ndarray) -> float:
    """Returns the magnitude to draw in full colour: the 99.5th percentile, so that a few pixels do not dim the rest."""
    magnitude = np.abs(attribution)
    return float(np.percentile(magnitude, 99.5)) or float(magnitude.max()) or 1.0


def display_image(image: MedicalImage) -> np.ndarray:
    """Returns the image for display: float (h, w, 3) in [0, 1], stretched where it has hardly any contrast."""
    pixels = image.pixels
    if (span := faint_range(image)) is not None:
        pixels = np.clip((pixels - span[0]) / (span[1] - span[0]), 0, 1)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels.mean(-1, keepdims=True), 3, axis=2)


def faint_range(image: MedicalImage) -> tuple[float, float] | None:
    """Returns the range of nearly all pixel values of a low-contrast image; None for constant and for other images."""
    step = -(-max(image.size) // 128)
    low, high = (float(v) for v in np.percentile(image.pixels[::step, ::step], (0.5, 99.5)))
    return (low, high) if 1e-4 < high - low < FAINT else None


def _to_unit(map_: Map) -> np.ndarray:
    scaled = map_.values / map_.limit
    return np.clip(scaled / 2 + 0.5 if map_.signed else scaled, 0, 1)


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    longest = max(size)
    factor = -(-SMALLEST // longest) if longest < SMALLEST else min(1.0, LARGEST / longest)
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
