"""HTML building blocks that escape their values.

Class, model and file names, notes and errors are untrusted and never concatenated with HTML. `tag` fills a literal
template and escapes every value that is not `Markup` from another `tag`; `demo.theme.Html`, the only component that
shows HTML, also escapes anything that is not `Markup`. A test checks that all templates are literals.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from medmamba.metrics.result import Estimate

from .options import NOTICE

__all__ = ["Markup", "escape", "join", "pick_js", "tag"]


def tag(template: str, /, *values: object, **named: object) -> Markup:
    """Fills a template with escaped values; `Markup` values are inserted unchanged.

    Args:
        template: literal HTML in `str.format` syntax. Attributes must be quoted.
    """
    return Markup(template).format(*values, **named)


def join(parts: Iterable[object], by: str = "") -> Markup:
    """Joins pieces of HTML; plain strings, including `by`, are escaped."""
    return escape(by).join(escape(part) for part in parts)


NOTHING = Markup("")

# Logo: the path of a scan over an image.
MARK = Markup(
    '<svg viewBox="0 0 32 32" width="30" height="30" aria-hidden="true" focusable="false">'
    '<rect x="1.5" y="1.5" width="29" height="29" rx="8" fill="none" stroke="currentColor" stroke-width="2"/>'
    '<path d="M8 10h16v6H8v6h16" fill="none" stroke="var(--mm-accent)" stroke-width="2.6" '
    'stroke-linecap="round" stroke-linejoin="round"/></svg>'
)
_ICONS = {
    "good": Markup('<path d="M4.5 10.5l3.5 3.5 7.5-8"/>'),
    "warn": Markup('<path d="M10 6.5v4.5M10 13.8v.2"/><path d="M10 2.8l7.6 13.4H2.4z" stroke-linejoin="round"/>'),
    "error": Markup('<circle cx="10" cy="10" r="7.6"/><path d="M10 6.2v4.6M10 13.6v.2"/>'),
    "info": Markup('<circle cx="10" cy="10" r="7.6"/><path d="M10 9.2v4.6M10 6.2v.2"/>'),
}


def data_uri(pixels: np.ndarray, exact: bool = True) -> str:
    """Encodes a uint8 image (H, W), (H, W, 3) or (H, W, 4) as a data URI, so that no file is served or deleted.

    Args:
        exact: encode as PNG; else as lossy WebP at a tenth of the size, for thumbnails.
    """
    buffer = io.BytesIO()
    kind = "png" if exact else "webp"
    Image.fromarray(pixels).save(buffer, kind, **({} if exact else {"quality": 82}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def icon(kind: str) -> Markup:
    """Renders the icon "good", "warn", "error" or "info"."""
    return tag(
        '<svg class="mm-icon" viewBox="0 0 20 20" width="18" height="18" fill="none" stroke="currentColor" '
        'stroke-width="1.7" stroke-linecap="round" aria-hidden="true" focusable="false">{}</svg>',
        _ICONS[kind],
    )


def header(version: str) -> Markup:
    """Renders the page header: name, tagline, version and the light/dark switch."""
    return tag(
        '<header class="mm-header"><div class="mm-brand">{mark}<div><h1>medmamba</h1>'
        "<p>Medical image classification with MedMamba</p></div></div>"
        '<div class="mm-header-side"><span class="mm-version">version {version}</span>'
        '<button type="button" class="mm-theme" data-mm-theme aria-label="Switch between light and dark">'
        '<svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true" focusable="false">'
        '<circle cx="10" cy="10" r="6.6" fill="none" stroke="currentColor" stroke-width="1.7"/>'
        '<path d="M10 3.4a6.6 6.6 0 0 1 0 13.2z" fill="currentColor"/></svg></button></div></header>',
        mark=MARK,
        version=version,
    )


def notice() -> Markup:
    """Renders the notice that this is not a medical device."""
    return tag('<p class="mm-notice" role="note">{}<span>{}</span></p>', icon("info"), NOTICE)


def callout(kind: str, title: object, text: object = "", action: Markup = NOTHING) -> Markup:
    """Renders a callout of kind "good", "warn", "error" or "info"; `action` is a button that resolves it."""
    role = "alert" if kind == "error" else "note"
    body = tag("<p>{}</p>", text) if text else NOTHING
    return tag(
        '<div class="mm-callout mm-{}" role="{}">{}<div><strong>{}</strong>{}{}</div></div>',
        kind,
        role,
        icon(kind),
        title,
        body,
        action,
    )


def card(body: Markup, title: object = "", text: object = "", css: str = "", attributes: Markup = NOTHING) -> Markup:
    """Renders a box with a heading, a line of text and `body`."""
    lead = tag("<p>{}</p>", text) if text else NOTHING
    head = tag('<div class="mm-card-head"><h2>{}</h2>{}</div>', title, lead) if title else NOTHING
    return tag('<section class="mm-card {}" {}>{}{}</section>', css, attributes, head, body)


def error(title: object, text: object) -> Markup:
    """Renders an error in place of a result, with advice."""
    return card(callout("error", title, text))


def empty(title: object, text: object) -> Markup:
    """Renders the placeholder of a result."""
    return tag(
        '<section class="mm-empty"><div class="mm-empty-art" aria-hidden="true"></div><h2>{}</h2><p>{}</p></section>',
        title,
        text,
    )


def with_detail(value: object, detail: object) -> Markup:
    """Renders a value with a detail in smaller type."""
    return tag("{}<span>{}</span>", value, detail)


def licence_name(identifier: str | None) -> str:
    """Formats a licence identifier for display: "CC BY-NC 4.0"."""
    if not identifier:
        return "not stated"
    head, *middle = identifier.upper().split("-")
    if head == "LICENSEREF":
        return "custom terms"
    if head == "CC" and len(middle) > 1:
        return f"CC {'-'.join(middle[:-1])} {middle[-1]}"
    return identifier


def facts(rows: Iterable[tuple[object, object]]) -> Markup:
    """Renders name/value pairs; pairs without a value are omitted."""
    cells = join(tag("<div><dt>{}</dt><dd>{}</dd></div>", name, value) for name, value in rows if value)
    return tag('<dl class="mm-facts">{}</dl>', cells)


def bullets(items: Iterable[object], css: str = "") -> Markup:
    """Renders an unordered list."""
    return tag('<ul class="{}">{}</ul>', css, join(tag("<li>{}</li>", item) for item in items))


def bars(pairs: list[tuple[str, float]], caption: str, limit: int = 12) -> Markup:
    """Renders probabilities as bars, highest first; those beyond `limit` are collapsed."""

    def row(label: str, value: float, first: bool) -> Markup:
        return tag(
            '<tr class="{}"><th scope="row">{}</th><td class="mm-bar" aria-hidden="true">'
            '<span style="width:{:.2f}%"></span></td><td class="mm-num">{}</td></tr>',
            "mm-first" if first else "",
            label,
            100 * value,
            percent(value),
        )

    shown = join(row(label, value, i == 0) for i, (label, value) in enumerate(pairs[:limit]))
    rest = pairs[limit:]
    more = NOTHING
    if rest:
        more = tag(
            '<details class="mm-more"><summary>{} more classes</summary>'
            '<table class="mm-bars"><tbody>{}</tbody></table></details>',
            len(rest),
            join(row(label, value, False) for label, value in rest),
        )
    return tag(
        '<table class="mm-bars"><caption>{}</caption><tbody>{}</tbody></table>{}',
        caption,
        shown,
        more,
    )


def percent(value: float) -> str:
    """Formats a share with meaningful digits: >99.9%, 93.0%, 0.4%."""
    if 0 < value < 0.0005:
        return "<0.1%"
    if value > 0.9995:
        return ">99.9%" if value < 1 else "100%"
    return f"{100 * value:.1f}%"


def interval_text(estimate: Estimate) -> str:
    """Formats an interval as "0.912 – 0.953", or "" if there is none."""
    return "" if math.isnan(estimate.low) else f"{estimate.low:.3f} – {estimate.high:.3f}"


def table(
    header_cells: list[str], rows: Sequence[Sequence[object]], caption: str, sort: bool = False, css: str = ""
) -> Markup:
    """Renders a table; with `sort`, headers are buttons handled by page.js.

    On narrow screens each row becomes a card with its cells labelled by `data-label`.
    """

    def head(text: str) -> Markup:
        if not sort or not text:
            return tag('<th scope="col">{}</th>', text)
        return tag('<th scope="col" aria-sort="none"><button type="button" data-mm-sort>{}</button></th>', text)

    def cell(name: str, value: object) -> Markup:
        return tag('<td data-label="{}"><div>{}</div></td>', name, value) if value else Markup("<td></td>")

    body = join(
        tag("<tr>{}</tr>", join(cell(name, value) for name, value in zip(header_cells, row, strict=True)))
        for row in rows
    )
    return tag(
        '<div class="mm-scroll" tabindex="0" role="region" aria-label="{caption}">'
        '<table class="mm-table {css}"><caption>{caption}</caption>'
        "<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
        caption=caption,
        css=css,
        head=join(map(head, header_cells)),
        body=body,
    )


def folder_html(zone: str, megabytes: int) -> Markup:
    """Renders the button that chooses a folder for a drop zone, and the place of what `folder.js` says about it.

    Args:
        zone: `elem_id` of the drop zone.
        megabytes: largest folder that is packed.
    """
    return tag(
        '<p class="mm-hint"><button type="button" class="mm-link" data-mm-folder="{}" data-mm-largest="{}">'
        'Choose a folder</button> <span role="status"></span></p>',
        zone,
        megabytes,
    )


def pick_js(attribute: str, event: str) -> str:
    """Returns JavaScript for a `gr.HTML` that sends the `data-<attribute>` of a clicked button as `index`."""
    return (
        f"element.addEventListener('click', (e) => {{ const b = e.target.closest('[data-{attribute}]');"
        f" if (b) trigger('{event}', {{index: b.dataset.{camel(attribute)}}}); }});"
    )


def camel(attribute: str) -> str:
    """Converts mm-example to mmExample, as in `HTMLElement.dataset`."""
    first, *rest = attribute.split("-")
    return first + "".join(word.capitalize() for word in rest)
