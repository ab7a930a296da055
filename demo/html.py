"""Small pieces of HTML. All text passes through `esc`: names of classes and files come from visitors."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from .options import NOTICE

# The mark: the path of a scan over an image.
MARK = (
    '<svg viewBox="0 0 32 32" width="30" height="30" aria-hidden="true" focusable="false">'
    '<rect x="1.5" y="1.5" width="29" height="29" rx="8" fill="none" stroke="currentColor" stroke-width="2"/>'
    '<path d="M8 10h16v6H8v6h16" fill="none" stroke="var(--mm-accent)" stroke-width="2.6" '
    'stroke-linecap="round" stroke-linejoin="round"/></svg>'
)
_ICONS = {
    "good": '<path d="M4.5 10.5l3.5 3.5 7.5-8"/>',
    "warn": '<path d="M10 6.5v4.5M10 13.8v.2"/><path d="M10 2.8l7.6 13.4H2.4z" stroke-linejoin="round"/>',
    "error": '<circle cx="10" cy="10" r="7.6"/><path d="M10 6.2v4.6M10 13.6v.2"/>',
    "info": '<circle cx="10" cy="10" r="7.6"/><path d="M10 9.2v4.6M10 6.2v.2"/>',
}


def esc(value: object) -> str:
    """Text for HTML, attributes included."""
    return html.escape(str(value), quote=True)


def data_uri(pixels: np.ndarray, exact: bool = True) -> str:
    """uint8 (H, W), (H, W, 3) or (H, W, 4) as a data URI: nothing to serve, nothing to delete.

    Args:
        exact: as a PNG; else as a WebP a tenth of the size, for thumbnails.
    """
    buffer = io.BytesIO()
    kind = "png" if exact else "webp"
    Image.fromarray(pixels).save(buffer, kind, **({} if exact else {"quality": 82}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def icon(kind: str) -> str:
    return (
        '<svg class="mm-icon" viewBox="0 0 20 20" width="18" height="18" fill="none" stroke="currentColor" '
        f'stroke-width="1.7" stroke-linecap="round" aria-hidden="true" focusable="false">{_ICONS[kind]}</svg>'
    )


def header(version: str) -> str:
    """Name, what it is, and the switch between light and dark."""
    return (
        f'<header class="mm-header"><div class="mm-brand">{MARK}<div><h1>medmamba</h1>'
        f"<p>Medical image classification with MedMamba</p></div></div>"
        f'<div class="mm-header-side"><span class="mm-version">version {esc(version)}</span>'
        '<button type="button" class="mm-theme" data-mm-theme aria-label="Switch between light and dark">'
        '<svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true" focusable="false">'
        '<circle cx="10" cy="10" r="6.6" fill="none" stroke="currentColor" stroke-width="1.7"/>'
        '<path d="M10 3.4a6.6 6.6 0 0 1 0 13.2z" fill="currentColor"/></svg></button></div></header>'
    )


def notice() -> str:
    return f'<p class="mm-notice" role="note">{icon("info")}<span>{esc(NOTICE)}</span></p>'


def callout(kind: str, title: str, text: str = "") -> str:
    """A remark: kind "good", "warn", "error" or "info"."""
    role = "alert" if kind == "error" else "note"
    body = f"<p>{esc(text)}</p>" if text else ""
    text = f"<div><strong>{esc(title)}</strong>{body}</div>"
    return f'<div class="mm-callout mm-{kind}" role="{role}">{icon(kind)}{text}</div>'


def card(body: str, title: str = "", text: str = "", css: str = "", attributes: str = "") -> str:
    """A box; `body` is HTML, `title` and `text` are not."""
    lead = f"<p>{esc(text)}</p>" if text else ""
    head = f'<div class="mm-card-head"><h2>{esc(title)}</h2>{lead}</div>' if title else ""
    return f'<section class="mm-card {css}" {attributes}>{head}{body}</section>'


def error(title: str, text: str) -> str:
    """A result that could not be had, and what to do."""
    return card(callout("error", title, text))


def empty(title: str, text: str) -> str:
    """What stands where a result will be."""
    art = '<div class="mm-empty-art" aria-hidden="true"></div>'
    return f'<section class="mm-empty">{art}<h2>{esc(title)}</h2><p>{esc(text)}</p></section>'


def licence_name(identifier: str | None) -> str:
    """A licence as people write it: "CC BY-NC 4.0"."""
    if not identifier:
        return "not stated"
    head, *middle = identifier.upper().split("-")
    if head == "LICENSEREF":
        return "terms of its own"
    if head == "CC" and len(middle) > 1:
        return f"CC {'-'.join(middle[:-1])} {middle[-1]}"
    return identifier


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Pairs of name and value; values are HTML."""
    cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{value}</dd></div>" for name, value in rows if value)
    return f'<dl class="mm-facts">{cells}</dl>'


def bars(pairs: list[tuple[str, float]], caption: str, limit: int = 12) -> str:
    """Probabilities as bars, best first; beyond `limit` folded away."""

    def row(label: str, value: float, first: bool) -> str:
        return (
            f'<tr{" class=mm-first" if first else ""}><th scope="row">{esc(label)}</th>'
            f'<td class="mm-bar" aria-hidden="true"><span style="width:{100 * value:.2f}%"></span></td>'
            f'<td class="mm-num">{percent(value)}</td></tr>'
        )

    head = f'<table class="mm-bars"><caption>{esc(caption)}</caption><tbody>'
    shown = "".join(row(label, value, i == 0) for i, (label, value) in enumerate(pairs[:limit]))
    rest = pairs[limit:]
    more = ""
    if rest:
        body = "".join(row(label, value, False) for label, value in rest)
        more = (
            f'<details class="mm-more"><summary>{len(rest)} more classes</summary>'
            f'<table class="mm-bars"><tbody>{body}</tbody></table></details>'
        )
    return f"{head}{shown}</tbody></table>{more}"


def percent(value: float) -> str:
    """With as many digits as mean something: 99.97 %, 93 %, 0.4 %."""
    if 0 < value < 0.0005:
        return "<0.1%".replace("<", "&lt;")
    if value > 0.9995:
        return "&gt;99.9%" if value < 1 else "100%"
    return f"{100 * value:.1f}%"


def table(header_cells: list[str], rows: list[list[str]], caption: str, sort: bool = False, css: str = "") -> str:
    """Rows of HTML cells under plain text headers; with `sort`, headers are buttons that page.js sorts by.

    On narrow screens each row becomes a card, which names its cells by `data-label`.
    """

    def head(text: str) -> str:
        if not sort or not text:
            return f'<th scope="col">{esc(text)}</th>'
        return f'<th scope="col" aria-sort="none"><button type="button" data-mm-sort>{esc(text)}</button></th>'

    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{esc(name)}"><div>{cell}</div></td>' if cell else "<td></td>"
            for name, cell in zip(header_cells, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    head_row = "".join(map(head, header_cells))
    return (
        f'<div class="mm-scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f'<table class="mm-table {css}"><caption>{esc(caption)}</caption>'
        f"<thead><tr>{head_row}</tr></thead><tbody>{body}</tbody></table></div>"
    )
