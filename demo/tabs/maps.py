"""What the Explain tab shows, as HTML: maps over the image, checks of them, deletion and insertion curves."""

from __future__ import annotations

from medmamba.explain import Comparison, Explanation, Trust, methods

from ..charts import NARROW, Line, chart
from ..html import callout, card, data_uri, esc, table

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


def maps_html(found: Comparison) -> str:
    """Each map over the image. The image lies below, the full overlay above with an opacity that the slider sets:
    an overlay is linear in its opacity, so this is what `overlay_pixels(alpha)` computes."""
    first = found.explanations[0]
    below = data_uri(first.overlay_pixels(0.0))
    cells = "".join(_map(explanation, below) for explanation in found.explanations)
    return (
        f'<section class="mm-card mm-maps" style="--mm-opacity:{OPACITY / 100}"><div class="mm-maps-head"><div>'
        f"<h2>What speaks for {esc(first.label)}</h2>"
        f"<p>{first.probability:.1%} probable. What was explained is the logit, {first.logit:.2f}.</p></div>"
        f'<label class="mm-slider"><span>Overlay</span><input type="range" min="0" max="100" value="{OPACITY}" '
        f'data-mm-opacity aria-label="Strength of the overlay"><output>{OPACITY} %</output></label></div>'
        f'<div class="mm-map-grid">{cells}</div>{_legend(found)}</section>'
    )


def _map(explanation: Explanation, below: str) -> str:
    notes = "".join(f"<li>{esc(note)}</li>" for note in explanation.notes)
    about = methods()[explanation.method].summary
    more = f"<details><summary>Notes</summary><ul>{notes}</ul></details>" if notes else ""
    title = title_of(explanation)
    return (
        f'<figure class="mm-map"><div class="mm-stack"><img src="{below}" alt="">'
        f'<img class="mm-over" src="{data_uri(explanation.overlay_pixels(1.0))}" '
        f'alt="{esc(title)}: the image, coloured where the map is strong"></div>'
        f"<figcaption><strong>{esc(title)}</strong><span>{esc(about[:1].upper() + about[1:])}. "
        f"{explanation.seconds:.1f}&nbsp;s</span></figcaption>{more}</figure>"
    )


def _legend(found: Comparison) -> str:
    signed = any(e.signed for e in found.explanations)
    unsigned = any(not e.signed for e in found.explanations)
    parts = []
    if signed:
        parts.append('<span><i class="mm-ramp-signed"></i>against the class, nothing, for the class</span>')
    if unsigned:
        parts.append('<span><i class="mm-ramp-plain"></i>no influence to most influence, either way</span>')
    return f'<p class="mm-legend">{"".join(parts)}</p>'


def trust_html(found: Comparison, checking: int | None = None) -> str:
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
            f"<strong>{esc(name[:1].upper() + name[1:])}</strong><small>{esc(GOOD.get(name, ''))}</small>",
            *(f"{esc(values[name][0])}<small>{esc(_compared(name, values[name][1]))}</small>" for values in results),
        ]
        for name in names
    ]
    wait = ""
    if checking and len(found.trust) < checking:
        wait = f'<p class="mm-wait" role="status">Checking {len(found.trust) + 1} of {checking}…</p>'
    header = ["Check", *(title_of(e) for e in found.explanations[: len(found.trust)])]
    checks = table(header, rows, "Checks of each map", css="mm-trust")
    curves = "".join(_curves(e, t) for e, t in zip(found.explanations, found.trust, strict=False))
    lead = (
        "Parts of the image are blurred away, strongest evidence first, or brought back in that order. A map that says "
        "what the model uses makes the logit fall fast and rise fast; the grey lines are random orders."
    )
    removal = card(f'<div class="mm-chart-grid mm-narrow">{curves}</div>', "Removing and restoring the evidence", lead)
    return card(checks + wait + agreement, "Can these maps be trusted?") + removal


def _compared(name: str, good: str) -> str:
    """What stands below a result: the random orders, or the verdict."""
    if name.endswith("AUC"):
        return "Random: " + good.rpartition(", ")[2]
    return good.partition(": ")[2] if name.startswith("same map") else ""


def _agreement(found: Comparison) -> str:
    if len(found.explanations) < 2:
        return ""
    titles = [title_of(e) for e in found.explanations]
    rows = [
        [f"<strong>{esc(a)}</strong>", *(f"{v:.2f}" for v in row)]
        for a, row in zip(titles, found.agreement, strict=True)
    ]
    caption = "Rank correlation between the maps: 1 is the same order of pixels. Where two disagree, one is wrong."
    return f'<div class="mm-agreement">{table(["", *titles], rows, caption)}</div>'


def _curves(explanation: Explanation, trust: Trust) -> str:
    curves = trust.curves
    if curves is None:
        return ""
    x = [100 * f for f in curves.fractions]
    lines = [
        Line("random orders", x, list(row), "faint") for row in (*curves.random_deletion, *curves.random_insertion)
    ]
    lines += [Line("removed", x, list(curves.deletion), "a"), Line("restored", x, list(curves.insertion), "b")]
    return chart(lines, title_of(explanation), "share of the image, %", "relative logit", (0, 100), width=NARROW)
