"""Line charts as inline SVG: styled by the page in light and dark, without a chart library in the browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html import Markup, join, tag

WIDTH, HEIGHT = 340, 200
NARROW = 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 10, 10, 34


@dataclass(frozen=True)
class Line:
    """A curve; `style` is "a" (accent), "b" (neutral), "faint" or "dash"."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "a"


def chart(
    lines: list[Line],
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = WIDTH,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Draws a figure with legend. Lines with the same name share an entry; `width` is in SVG units, like the font.

    Args:
        mark: x and label of a vertical line.
    """
    xs = [float(v) for line in lines for v in line.x] or [0.0, 1.0]
    ys = [float(v) for line in lines for v in line.y if math.isfinite(v)] or [0.0, 1.0]
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = y_range or (min(ys), max(ys))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    if y_range is None:
        margin = 0.06 * (y1 - y0)
        y0, y1 = (0.0 if y0 >= 0 and y0 - margin < 0.25 * y1 else y0 - margin), y1 + margin

    top = _TOP + (12 if mark else 0)  # where its label stands, clear of the curves

    def px(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - top - _BOTTOM)

    parts: list[Markup] = []
    for tick in ticks(y0, y1):
        y = py(tick)
        parts.append(
            tag('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>', _LEFT, width - _RIGHT, y, y)
            + tag('<text x="{}" y="{:.1f}" text-anchor="end">{:g}</text>', _LEFT - 8, y + 4, tick)
        )
    for tick in ticks(x0, x1):
        x, y = px(tick), HEIGHT - _BOTTOM + 18
        parts.append(tag('<text x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>', x, y, tick))
    end = width - _RIGHT
    parts.append(tag('<text x="{}" y="{}" text-anchor="end" class="axis">{}</text>', end, HEIGHT - 4, x_label))
    if mark is not None:
        x, y = px(mark[0]), top - 8
        parts.append(tag('<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>', y, HEIGHT - _BOTTOM, x=x))
        beside, anchor = (x - 5, "end") if mark[0] > (x0 + x1) / 2 else (x + 5, "start")
        parts.append(tag('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>', beside, y + 3, anchor, mark[1]))
    # Dashed lines are drawn last: over a solid line of equal values, both remain visible.
    for line in sorted(lines, key=lambda line: ("faint", "b", "a", "dash").index(line.style)):
        points = [(px(x), py(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(tag('<polyline class="line-{}" points="{}"/>', line.style, path))
        if len(points) == 1 or (line.style in ("a", "b", "dash") and len(points) <= 40):
            parts += [
                tag('<circle class="dot-{}" cx="{:.1f}" cy="{:.1f}" r="2.4"/>', line.style, x, y) for x, y in points
            ]
    names = dict.fromkeys((line.name, line.style) for line in lines)
    legend = join(tag('<li><i class="key-{}" aria-hidden="true"></i>{}</li>', style, name) for name, style in names)
    last = "; ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in lines if len(line.y) and line.style != "faint")
    return tag(
        '<figure class="mm-chart"><figcaption><strong>{title}</strong><span>{y_label}</span></figcaption>'
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}: {last}">{parts}</svg>'
        "<ul>{legend}</ul></figure>",
        title=title,
        y_label=y_label,
        width=width,
        height=HEIGHT,
        last=last,
        parts=join(parts),
        legend=legend,
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Returns about `about` round numbers between two values."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
