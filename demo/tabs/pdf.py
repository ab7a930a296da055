"""The button that makes a PDF when it is pressed, of a page that can be downloaded as HTML too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from medmamba.config import ConfigError
from medmamba.imaging.load import ImageError
from medmamba.pretrained import PretrainedError
from medmamba.reporting.page import to_pdf

from ..advice import plain
from ..context import Context
from ..service import AnswerError
from ..theme import warn

NOT_HERE = (
    "This server has no PDF maker. Download the page as HTML and print it as PDF from the browser. "
    "Whoever runs the server can add it: {}."
)
FAILED = "The PDF was not made"
PROBLEMS = (ImageError, AnswerError, PretrainedError, ConfigError, OSError, ValueError)


class PdfButton:
    """The button. Create it inside `gr.Blocks`, then `attach` it.

    Args:
        label: what it says.
        elem_id: of the button; the hidden one that downloads gets `-file` behind it.
        visible: whether it is shown before there is a page.
    """

    def __init__(self, label: str, elem_id: str, visible: bool = True) -> None:
        self.elem_id = elem_id
        self.button = gr.Button(label, visible=visible, size="sm", elem_id=elem_id)
        # Gradio shows a hidden button again when the row around it appears, so the style sheet hides it too.
        self.file = gr.DownloadButton(
            "Download it", visible="hidden", elem_id=f"{elem_id}-file", elem_classes="mm-unseen"
        )

    def attach(self, context: Context, make: Callable[..., Path | None], inputs: Sequence[Any] = ()) -> None:
        """Makes the button download what `make` writes; a problem is shown beside the page, which stays as it is.

        Args:
            make: gets the session and the values of `inputs`; returns the PDF, or None if there is nothing to print.
            inputs: components.
        """

        def pressed(request: gr.Request, *values: Any) -> str | None:
            try:
                path = make(context.sessions.of(request), *values)
            except ImportError as problem:
                logging.getLogger(__name__).warning("no PDF: %s", problem)
                warn(NOT_HERE.format(problem), FAILED)
                return None
            except PROBLEMS as problem:
                warn(plain(problem), FAILED)
                return None
            return None if path is None else str(path)

        # One at a time, and beside the predictions: a long report takes seconds.
        shared: dict[str, Any] = dict(api_visibility="private", concurrency_id="pdf", show_progress_on=[self.button])
        self.button.click(pressed, list(inputs), self.file, **shared).success(
            None, js=click_js(f"{self.elem_id}-file"), api_visibility="private"
        )


def click_js(elem_id: str) -> str:
    """Returns JavaScript that presses a download button once the server has made its file; without one, nothing."""
    return f"() => setTimeout(() => document.querySelector('#{elem_id}')?.click(), 300)"


def pdf_of(page: Path | None) -> Path | None:
    """Writes the PDF of an HTML page beside it, once; returns its path.

    Raises:
        ImportError: weasyprint is missing, or the library Pango.
    """
    if page is None or not page.is_file():
        return None
    target = page.with_suffix(".pdf")
    if not target.is_file():
        target.write_bytes(to_pdf(page.read_text(encoding="utf-8")))
    return target
