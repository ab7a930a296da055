"""Gradio theme: one accent colour on cool neutrals, in light and dark. See also style.css and page.js."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.themes.utils import colors, sizes

from .html import escape

ACCENT = colors.Color(
    name="teal_ink",
    c50="#eef8f6", c100="#d6efeb", c200="#aedfd8", c300="#7cc9c0", c400="#4fb3aa", c500="#2a958d",
    c600="#0f766e", c700="#0c5f59", c800="#0b4c48", c900="#0a3f3b", c950="#052523",
)  # fmt: skip
NEUTRAL = colors.Color(
    name="slate_mist",
    c50="#f6f8f8", c100="#eef1f1", c200="#e0e5e5", c300="#c8d0d0", c400="#8c9898", c500="#647171",
    c600="#4c5858", c700="#37413f", c800="#1d2524", c900="#151b1a", c950="#0d1211",
)  # fmt: skip


def escaped(value: Any) -> str | None:
    """Returns HTML as a plain `str`, escaping text that is not `Markup`."""
    return None if value is None else str(escape(value))


# Not a `class` statement, for which Gradio would write a .pyi file beside this one; its name selects the front-end
# component. Not a method patched on an instance either: Gradio creates new instances per visitor.
_Html: Any = ABCMeta.__new__(
    ComponentMeta, "HTML", (gr.HTML,), {"postprocess": lambda _, value: escaped(value), "__module__": __name__}
)


def Html(value: str = "", **options: Any) -> gr.HTML:
    """Creates a `gr.HTML` without Gradio's prose styles that escapes every value not built by `demo.html.tag`.

    Args:
        options: passed to `gr.HTML`.
    """
    return _Html(value, apply_default_css=False, padding=False, **options)


def warn(text: str, title: str) -> None:
    """Shows a message beside the page for some seconds; the text is escaped, which `gr.Warning` would show as HTML."""
    gr.Warning(escape(text), title=title)


def theme() -> gr.themes.Base:
    """Returns the theme; its fonts are bundled with Gradio, so nothing is fetched from other servers."""
    return gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=NEUTRAL,
        radius_size=sizes.radius_md,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        # Not weight 600, of which Gradio ships only a few glyphs.
        font=(gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="#142120",
        body_text_color_dark="#e6edec",
        body_text_color_subdued="#566463",
        body_text_color_subdued_dark="#9fb0ae",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_950",
        border_color_primary="*neutral_200",
        border_color_primary_dark="#2a3533",
        block_background_fill="#ffffff",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="#2a3533",
        block_border_width="1px",
        block_shadow="none",
        block_radius="12px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="#3f4c4b",
        block_label_text_color_dark="#b6c4c2",
        block_title_text_color="#3f4c4b",
        block_title_text_color_dark="#b6c4c2",
        block_title_text_weight="600",
        block_label_text_weight="600",
        block_info_text_color="#566463",
        block_info_text_color_dark="#9fb0ae",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_color="#8a9796",
        input_border_color_dark="#5b6b69",
        input_border_width="1px",
        input_placeholder_color="#647171",
        input_placeholder_color_dark="#8fa19f",
        button_large_radius="10px",
        button_small_radius="8px",
        button_small_text_size="*text_sm",
        button_small_text_weight="600",
        button_small_padding="9px 14px",
        button_large_text_weight="600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_400",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_300",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#04201e",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="#b9c4c3",
        button_secondary_border_color_dark="#43514f",
        button_secondary_text_color="#142120",
        button_secondary_text_color_dark="#e6edec",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        loader_color="*primary_600",
        loader_color_dark="*primary_400",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_border_color="#8a9796",
        checkbox_border_color_dark="#6d7f7c",
        checkbox_label_background_fill="transparent",
        checkbox_label_background_fill_dark="transparent",
        checkbox_label_background_fill_hover="*neutral_100",
        checkbox_label_background_fill_hover_dark="*neutral_800",
        checkbox_label_background_fill_selected="transparent",
        checkbox_label_background_fill_selected_dark="transparent",
        checkbox_label_text_color_selected="*body_text_color",
        checkbox_label_text_color_selected_dark="*body_text_color",
        checkbox_label_border_width="0px",
        checkbox_label_border_width_dark="0px",
        checkbox_label_shadow="none",
        checkbox_label_padding="5px 8px 5px 2px",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_400",
        link_text_color_hover="*primary_700",
        link_text_color_hover_dark="*primary_300",
        error_background_fill="#fdf1f1",
        error_background_fill_dark="#2a1719",
        error_text_color="#9b2c36",
        error_text_color_dark="#f2a7ad",
        error_border_color="#e6b8bc",
        error_border_color_dark="#5f2f34",
    )
