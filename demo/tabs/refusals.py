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
    actions = [(MODEL + suggestion.name, f"Try {suggestion.name}")] if suggestion else []
    buttons = (
        tag('<button type="button" class="mm-mend" data-mm-window="{}">{}</button>', sent, text)
        for sent, text in [*actions, (ANYWAY, "Answer anyway")]
    )
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
    first = advice(suggestion) if suggestion else "No other model here knows such images either."
    known = f" This model knows {kind}" if kind else " This model knows one kind of image"
    return f"{first}{known}, and refuses {far_share(loaded)}."


def advice(suggestion: Suggestion) -> str:
    """Says what an image looks like, and which model is for it."""
    if not suggestion.kind:
        return f"Try {suggestion.name}."
    return f"This looks like another kind of image, {suggestion.kind}: try {suggestion.name}."


def far_share(loaded: Loaded) -> str:
    """Says how many of the model's own test images would be refused."""
    own = loaded.unusual.measured.get("own", {}) if loaded.unusual else {}
    if "called_far" not in own:
        return "about 1% of its own kind"
    return f"{round(own['called_far'] * own['n'])} of {own['n']:,} of its own test images"


def refused_row(found: Answer) -> Markup:
    """Renders what stands in the table of a batch in place of the remarks."""
    return tag('<span class="mm-tag mm-warn" title="{}">refused</span>', TITLE) if found.refused else NOTHING
