"""Writes sections as one HTML file that needs no other, and as PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.extras import require
from ..utils.files import write_atomically, write_text
from .blocks import Section

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(
    title: str, sections: Sequence[Section], *, notice: str, about: Mapping[str, str], compact: bool = False
) -> str:
    """Returns the HTML of a report; all texts are escaped.

    Args:
        notice: shown under the title.
        about: facts by name for the table on top.
        compact: in smaller type, for a single page.
    """
    jinja2 = require("jinja2", "reports", "report")
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(autoescape=True, **options)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, notice=notice, about=about, compact=compact)


def to_pdf(html: str) -> bytes:
    """Returns a PDF of A4 pages with numbers.

    Raises:
        ImportError: weasyprint is missing, or the libraries that it needs (Pango).
    """
    try:
        weasyprint: Any = require("weasyprint", "a report as PDF", "report")
    except OSError as error:  # weasyprint is there and Pango is not
        raise ImportError(
            f"a report as PDF needs the library Pango, which weasyprint did not find ({error}); install it, or print "
            "the HTML from a browser"
        ) from error
    fetcher = weasyprint.urls.URLFetcher(
        allowed_protocols=("data",)
    )  # the pictures in the page, nothing from elsewhere
    return weasyprint.HTML(string=html, url_fetcher=fetcher).write_pdf()


def write(folder: Path, name: str, html: str, pdf: bool) -> dict[str, Path]:
    """Writes `name`.html and, if wanted, `name`.pdf; returns the paths by suffix; nothing if the PDF fails."""
    content = to_pdf(html) if pdf else None
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"html": write_text(folder / f"{name}.html", html)}
    if content is not None:
        data = content
        paths["pdf"] = write_atomically(folder / f"{name}.pdf", lambda partial: partial.write_bytes(data))
    return paths
