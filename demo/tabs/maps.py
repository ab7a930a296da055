"""What the Explain tab shows, as HTML: maps over the image, checks of them, deletion and insertion curves."""

from __future__ import annotations

from medmamba.explain import Comparison, Explanation, Trust, methods
from medmamba.explain.render import faint_range

from ..advice import WARNING, in_app
from ..charts import NARROW, Line, chart
from ..html import NOTHING, Markup, bullets, callout, card, data_uri, join, percent, table, tag

OPACITY = 65
GOOD = {
    "infidelity": "Squared error of the map for random squares; lower is better",
    "change not explained by the map": "The same as a share; 100% is an empty map",
    "max-sensitivity": "Change of the map when the image hardly changes; lower is better",
    "deletion AUC": "Below a random order is good",
    "insertion AUC": "Above a random order is good",
    "same map with random weights": "A map that stays the same does not show the model",
}
"""What each check of `Trust.rows` means, for people."""


def method_title(name: str) -> str:
    """ "integrated_gradients" as people write it."""
    special = {"gradcam": "Grad-CAM", "smoothgrad": "SmoothGrad", "gradient_shap": "GradientSHAP"}
    return special.get(name) or name.replace("_", " ").replace(" x ", " × ").capitalize()


def title_of(explanation: Explanation) -> str:
    layer = explanation.parameters.get("layer")
    title = method_title(explanation.method)
    return f"{title}, {layer.replace('.', ' ')}" if layer else title


def maps_html(found: Comparison, calibrated: bool = False) -> Markup:
    """Each map over the image. The image lies below, the full overlay above with an opacity that the slider sets:
    an overlay is linear in its opacity, so this is what `overlay_pixels(alpha)` computes.

    Args:
        calibrated: whether the probability may be called one; else it is a score.
    """
    first = found.explanations[0]
    below = data_uri(first.overlay_pixels(0.0))
    return tag(
        '<section class="mm-card mm-maps" style="--mm-opacity:{share}"><div class="mm-maps-head"><div>'
        "<h2>What speaks for {label}</h2>"
        "<p>{kind} {probability}. What was explained is the logit, {logit:.2f}.</p></div>"
        '<label class="mm-slider"><span>Overlay</span><input type="range" min="0" max="100" value="{percent}" '
        'data-mm-opacity aria-label="Strength of the overlay"><output>{percent} %</output></label></div>'
        '{warnings}<div class="mm-map-grid">{cells}</div>{legend}</section>',
        share=OPACITY / 100,
        label=first.label,
        kind="Calibrated probability" if calibrated else "Score, not calibrated:",
        probability=percent(first.probability),
        logit=first.logit,
        percent=OPACITY,
        warnings=join(callout("warn", text) for text in _warnings(found)),
        cells=join(_map(explanation, below) for explanation in found.explanations),
        legend=_legend(found),
    )


def _warnings(found: Comparison) -> list[str]:
    """What changes the worth of the maps: what was noted of the file and of each map, and how they are drawn."""
    image = found.explanations[0].image
    notes = [*image.warnings, *(note for explanation in found.explanations for note in explanation.notes)]
    said = [in_app(note) for note in notes if note.startswith(WARNING)]
    if (span := faint_range(image)) is not None:
        said.append(
            "the maps are drawn over the image with more contrast than the model sees: nearly all its pixels are from "
            f"{100 * span[0]:.0f}% to {100 * span[1]:.0f}% bright"
        )
    return [text[:1].upper() + text[1:] for text in dict.fromkeys(said)]


def _map(explanation: Explanation, below: str) -> Markup:
    about = methods()[explanation.method].summary
    more = NOTHING
    if notes := [in_app(note) for note in explanation.notes if not note.startswith(WARNING)]:
        more = tag("<details><summary>Notes</summary>{}</details>", bullets(notes))
    return tag(
        '<figure class="mm-map"><div class="mm-stack"><img src="{below}" alt=""><img class="mm-over" src="{above}" '
        'alt="{title}: the image, coloured where the map is strong"></div>'
        "<figcaption><strong>{title}</strong><span>{about}. {seconds:.1f}&nbsp;s</span></figcaption>{more}</figure>",
        below=below,
        above=data_uri(explanation.overlay_pixels(1.0)),
        title=title_of(explanation),
        about=about[:1].upper() + about[1:],
        seconds=explanation.seconds,
        more=more,
    )


def _legend(found: Comparison) -> Markup:
    signed = any(e.signed for e in found.explanations)
    unsigned = any(not e.signed for e in found.explanations)
    parts = []
    if signed:
        parts.append(Markup('<span><i class="mm-ramp-signed"></i>against the class, nothing, for the class</span>'))
    if unsigned:
        parts.append(Markup('<span><i class="mm-ramp-plain"></i>no influence to most influence, either way</span>'))
    return tag('<p class="mm-legend">{}</p>', join(parts))


def trust_html(found: Comparison, checking: int | None = None) -> Markup:
    """The agreement of the maps, and the checks that are done.

    Args:
        checking: of so many methods, where checks are still running.
    """
    agreement = _agreement(found)
    if not found.trust:
        text = "Checks were left out. A map that looks right can still be wrong: tick “Check the maps” and run again."
        title = "Agreement of the maps" if agreement else "Can this map be trusted?"
        return card(agreement + callout("info", "Not checked", text), title)
    names = list(dict.fromkeys(name for trust in found.trust for name, _, _ in trust.rows()))
    results = [{name: (value, good) for name, value, good in trust.rows()} for trust in found.trust]
    rows = [
        [
            tag("<strong>{}</strong><small>{}</small>", name[:1].upper() + name[1:], GOOD.get(name, "")),
            *(tag("{}<small>{}</small>", values[name][0], _compared(name, values[name][1])) for values in results),
        ]
        for name in names
    ]
    wait = NOTHING
    if checking and len(found.trust) < checking:
        wait = tag('<p class="mm-wait" role="status">Checking {} of {}…</p>', len(found.trust) + 1, checking)
    header = ["Check", *(title_of(e) for e in found.explanations[: len(found.trust)])]
    checks = table(header, rows, "Checks of each map", css="mm-trust")
    curves = join(_curves(e, t) for e, t in zip(found.explanations, found.trust, strict=False))
    lead = (
        "Parts of the image are blurred away, strongest evidence first, or brought back in that order. A map that says "
        "what the model uses makes the logit fall fast and rise fast; the grey lines are random orders."
    )
    removal = card(
        tag('<div class="mm-chart-grid mm-narrow">{}</div>', curves), "Removing and restoring the evidence", lead
    )
    return card(checks + wait + agreement, "Can these maps be trusted?") + removal


def _compared(name: str, good: str) -> str:
    """What stands below a result: the random orders, or the verdict."""
    if name.endswith("AUC"):
        return "Random: " + good.rpartition(", ")[2]
    return good.partition(": ")[2] if name.startswith("same map") else ""


def _agreement(found: Comparison) -> Markup:
    if len(found.explanations) < 2:
        return NOTHING
    titles = [title_of(e) for e in found.explanations]
    rows = [
        [tag("<strong>{}</strong>", name), *(f"{value:.2f}" for value in row)]
        for name, row in zip(titles, found.agreement, strict=True)
    ]
    caption = "Rank correlation between the maps: 1 is the same order of pixels. Where two disagree, one is wrong."
    return tag('<div class="mm-agreement">{}</div>', table(["", *titles], rows, caption))


def _curves(explanation: Explanation, trust: Trust) -> Markup:
    curves = trust.curves
    if curves is None:
        return NOTHING
    x = [100 * f for f in curves.fractions]
    lines = [
        Line("random orders", x, list(row), "faint") for row in (*curves.random_deletion, *curves.random_insertion)
    ]
    lines += [Line("removed", x, list(curves.deletion), "a"), Line("restored", x, list(curves.insertion), "b")]
    return chart(lines, title_of(explanation), "share of the image, %", "relative logit", (0, 100), width=NARROW)
