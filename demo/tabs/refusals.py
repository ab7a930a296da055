"""What the Classify tab shows in place of an answer for an image unlike all that the model knows."""

from __future__ import annotations

from medmamba.inference.suggest import Suggestion

from ..html import NOTHING, Markup, callout, data_uri, join, tag
from ..service import Answer
from ..store import Loaded

ANYWAY = "anyway"
MODEL = "model:"
"""Prefix of what the button of a suggested model sends."""
REFUSED = "this image is unlike those the model knows"
TITLE = f"Not answered: {REFUSED}"


def refusal_html(found: Answer, loaded: Loaded, suggestion: Suggestion | None) -> Markup:
    """Renders a refusal: why, which model to try, and a button that gets the answer anyway."""
    height, width = loaded.config.preprocess.input_size
    button = '<button type="button" class="mm-mend" data-mm-window="{}">{}</button>'
    buttons = [tag(button, ANYWAY, "Answer anyway")]
    if suggestion:
        buttons.insert(0, tag(button, MODEL + suggestion.name, f"Try {suggestion.name}"))
    return tag(
        '<section class="mm-card mm-answer mm-doubt" aria-live="polite" aria-label="Not answered">{}'
        '<div class="mm-answer-top"><figure class="mm-seen"><img src="{}" alt="The image as the model sees it">'
        "<figcaption>Model input, {}×{}</figcaption></figure></div></section>",
        callout("warn", TITLE, reason_of(loaded, suggestion), join(buttons, " ")),
        data_uri(found.seen),
        width,
        height,
    )


def reason_of(loaded: Loaded, suggestion: Suggestion | None) -> str:
    """Says why an image is not answered, and what it looks like."""
    kind = loaded.facts.entry.modality if loaded.facts.entry else ""
    known = f"The model knows one kind of image: {kind}. " if kind else ""
    text = f"{known}Of its own test images, {far_share(loaded)} are refused like this one."
    return text + (f" {advice(suggestion)}" if suggestion else " No other model here knows such images.")


def advice(suggestion: Suggestion) -> str:
    """Says what an image looks like, and which model is for it."""
    looks = f"This looks like another kind of image: {suggestion.kind}. " if suggestion.kind else ""
    return f"{looks}Try the model {suggestion.name}."


def far_share(loaded: Loaded) -> str:
    """Returns the measured share of the model's own test images that would be refused, in words."""
    own = loaded.unusual.measured.get("own", {}) if loaded.unusual else {}
    return f"{own['called_far']:.1%}" if "called_far" in own else "about 1%"


def refused_row(found: Answer) -> Markup:
    """Renders what stands in the table of a batch in place of the remarks."""
    return tag('<span class="mm-tag mm-warn" title="{}">refused</span>', TITLE) if found.refused else NOTHING
