"""Addresses: `?tab=` and `?model=` name what is shown; page.js reads and writes them.

The tab is a matter of the page alone. The model is set here, because its answer and card come from the server.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..context import Context
from ..theme import Html, warn
from .classify import ClassifyTab

EVENT = (
    "window.mmChooseModel = (name) => trigger('click', {index: name});"
    "const tell = () => window.mmModel ? window.mmModel(props.value, true) : setTimeout(tell, 100); tell();"
)
WRITE = "(title) => { window.mmModel?.(title); }"


def build(context: Context, classify: ClassifyTab) -> None:
    """Builds the channel through which page.js chooses a model, and its events. Call inside `gr.Blocks`."""
    channel = Html(context.default_title, js_on_load=EVENT, elem_id="mm-address")

    def choose(event: gr.EventData, request: gr.Request) -> Any:
        session = context.sessions.of(request)
        title = str(event.index)
        if title not in context.titles(session):
            warn(f"There is no model {title[:100]!r} here; {context.default_title} is shown.", "Address")
            return gr.skip()
        return gr.update(choices=context.choices(session), value=title)

    private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    channel.click(choose, None, classify.model, **private).then(
        classify.rerun, [classify.model, *classify.view], classify.outputs, concurrency_id="classify", **private
    )
    classify.model.change(None, classify.model, None, js=WRITE, **private)
