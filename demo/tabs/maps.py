"""HTML of the Explain tab: attribution maps, reliability checks, deletion and insertion curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medmamba.explain import Comparison, Explanation, Trust, methods
from medmamba.explain.render import faint_range

from ..advice import WARNING, in_app
from ..charts import NARROW, Line, chart
from ..html import NOTHING, Markup, bullets, callout, card, data_uri, join, percent, table, tag
from ..service import reduced, with_image

OPACITY = 65
GOOD = {
    "infidelity": "Squared error of the predicted effect of random perturbations; lower is better",
    "change not explained by the map": "Infidelity relative to an empty map (100%); lower is better",
    "max-sensitivity": "Largest change of the map under tiny perturbations of the image; lower is better",
    "deletion AUC": "Should be below that of random orders",
    "insertion AUC": "Should be above that of random orders",
    "same map with random weights": "If the map stays similar, it does not depend on what the model learned",
}
"""Short explanations of the checks in `Trust.rows`."""


def method_title(name: str) -> str:
    """Returns the displayed name of a method, such as "Grad-CAM"."""
    special = {"gradcam": "Grad-CAM", "smoothgrad": "SmoothGrad", "gradient_shap": "GradientSHAP"}
    return special.get(name) or name.replace("_", " ").replace(" x ", " × ").capitalize()


def title_of(explanation: Explanation) -> str:
    """Returns the displayed name of a method and its layer."""
    layer = explanation.parameters.get("layer")
    title = method_title(explanation.method)
    return f"{title}, {layer.replace('.', ' ')}" if layer else title


SHOWN = 512
"""Longest side, in pixels, of a map on the page; the viewer shows the full resolution."""


def maps_html(found: Comparison, calibrated: bool = False, missing: Sequence[str] = ()) -> Markup:
    """Renders each map over the image.

    The opacity slider blends the full overlay with the image in the browser; since overlays are linear in opacity, this
    equals `overlay_pixels(alpha)`.

    Args:
        calibrated: whether the score is shown as a probability.
        missing: methods whose maps are still being computed.
    """
    found = with_image(found, reduced(found.explanations[0].image, SHOWN))
    first = found.explanations[0]
    below = data_uri(first.overlay_pixels(0.0))
    return tag(
        '<section class="mm-card mm-maps" style="--mm-opacity:{share}"><div class="mm-maps-head"><div>'
        "<h2>Pixel attributions for {label}</h2>"
        "<p>{kind} {probability}. Explained quantity: the logit, {logit:.2f}.</p></div>"
        '<label class="mm-slider"><span>Overlay</span><input type="range" min="0" max="100" value="{percent}" '
        'data-mm-opacity aria-label="Overlay opacity"><output>{percent} %</output></label></div>'
        '{warnings}<div class="mm-map-grid">{cells}</div>{legend}</section>',
        share=OPACITY / 100,
        label=first.label,
        kind="Calibrated probability" if calibrated else "Score (not calibrated):",
        probability=percent(first.probability),
        logit=first.logit,
        percent=OPACITY,
        warnings=join(callout("warn", text) for text in _warnings(found)),
        cells=join(_map(explanation, below, i) for i, explanation in enumerate(found.explanations)) + waiting(missing),
        legend=_legend(found),
    )


def waiting(names: Sequence[str]) -> Markup:
    """Renders placeholders for maps that are still to come."""
    return join(
        tag(
            '<figure class="mm-map mm-skeleton"><div class="mm-stack"></div><figcaption><strong>{}</strong>'
            "<span>{}</span></figcaption></figure>",
            method_title(name),
            "computing" if i == 0 else "waiting",
        )
        for i, name in enumerate(names)
    )


def _warnings(found: Comparison) -> list[str]:
    """Collects the warnings on the file, the maps and their rendering."""
    image = found.explanations[0].image
    notes = [*image.warnings, *(note for explanation in found.explanations for note in explanation.notes)]
    said = [in_app(note) for note in notes if note.startswith(WARNING)]
    if (span := faint_range(image)) is not None:
        said.append(
            "the image below the maps is shown with more contrast than the model sees: nearly all its pixels are "
            f"between {100 * span[0]:.0f}% and {100 * span[1]:.0f}% brightness"
        )
    return [text[:1].upper() + text[1:] for text in dict.fromkeys(said)]


def _map(explanation: Explanation, below: str, index: int) -> Markup:
    about = methods()[explanation.method].summary
    more = NOTHING
    shown = (note for note in explanation.notes if not note.startswith(WARNING) and note != explanation.location)
    if notes := [in_app(note) for note in shown]:
        more = tag("<details><summary>Notes</summary>{}</details>", bullets(notes))
    return tag(
        '<figure class="mm-map"><button type="button" class="mm-stack" data-mm-view="map:{index}" '
        'aria-label="Enlarge {title} beside the image"><img src="{below}" alt=""><img class="mm-over" src="{above}" '
        'alt="{title}: the image, coloured by attribution"></button>'
        "<figcaption><strong>{title}</strong><span>{reading}</span>"
        '<span class="mm-how">{about}. {seconds:.1f}&nbsp;s</span></figcaption>{where}{more}</figure>',
        index=index,
        below=below,
        reading=explanation.reading,
        above=data_uri(explanation.overlay_pixels(1.0)),
        title=title_of(explanation),
        about=about[:1].upper() + about[1:],
        seconds=explanation.seconds,
        where=tag('<p class="mm-where">{}.</p>', explanation.location) if explanation.location else NOTHING,
        more=more,
    )


def _legend(found: Comparison) -> Markup:
    signed = any(e.signed for e in found.explanations)
    unsigned = any(not e.signed for e in found.explanations)
    parts = []
    if signed:
        parts.append(
            Markup(
                '<span><i class="mm-ramp-signed"></i>evidence against the class, neutral, evidence for the class</span>'
            )
        )
    if unsigned:
        parts.append(
            Markup('<span><i class="mm-ramp-plain"></i>no influence to strongest influence, of either sign</span>')
        )
    return tag('<p class="mm-legend">{}</p>', join(parts))


def trust_html(found: Comparison, checking: int | None = None) -> Markup:
    """Renders the agreement between maps and the finished checks.

    Args:
        checking: total number of methods while checks are running.
    """
    agreement = _agreement(found)
    if not found.trust:
        text = "A plausible map can still be wrong: select “Check the maps” and run again."
        title = "Agreement between maps" if agreement else "Reliability"
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
        "Regions of the image are blurred, or restored from a blurred image, in order of attribution. For a faithful "
        "map the logit falls fast on deletion and rises fast on insertion; grey lines are random orders."
    )
    removal = tag('<p>{}</p><div class="mm-chart-grid mm-narrow">{}</div>', lead, curves) if curves else NOTHING
    details = tag('<details class="mm-more"><summary>Results of each check</summary>{}</details>', checks + agreement)
    if removal:
        details += tag('<details class="mm-more"><summary>Deletion and insertion curves</summary>{}</details>', removal)
    return card(_verdicts(found) + wait + details, "Can these maps be trusted?", VERDICT_LEAD)


VERDICT_LEAD = (
    "A map is better than chance if blurring the regions it marks lowers the score faster, and restoring them raises "
    "it faster, than doing so in each of several random orders."
)
_VERDICTS = {
    "yes": (
        "good",
        "Better than chance: yes",
        "What it marks matters to the model; that need not be the disease.",
    ),
    "no": ("error", "Better than chance: no", "Do not use this map."),
    "unclear": (
        "warn",
        "Better than chance: unclear",
        "It does not beat every random order in both tests.",
    ),
}


def _verdicts(found: Comparison) -> Markup:
    """Renders one line per map: whether it is better than chance."""
    lines = []
    for explanation, trust in zip(found.explanations, found.trust, strict=False):
        if (verdict := trust.better_than_chance) is None:
            continue
        kind, title, text = _VERDICTS[verdict]
        if trust.randomisation is not None and not trust.randomisation.passed:
            text = "It hardly changes when the model’s weights are replaced by random ones: it shows the image."
        lines.append(callout(kind, f"{title_of(explanation)}. {title}", text))
    return tag('<div class="mm-verdicts">{}</div>', join(lines))


def _compared(name: str, good: str) -> str:
    """Returns the note below a result: the value for random orders, or the verdict."""
    if name.endswith("AUC"):
        return "Random: " + good.rpartition(", ")[2]
    return good.partition(": ")[2] if name.startswith("same map") else ""


def _agreement(found: Comparison) -> Markup:
    if len(found.explanations) < 2:
        return NOTHING
    titles = [title_of(e) for e in found.explanations]
    head = join(tag('<th scope="col">{}</th>', name) for name in titles)
    rows = join(
        tag('<tr><th scope="row">{}</th>{}</tr>', name, join(_correlation(value) for value in row))
        for name, row in zip(titles, found.agreement, strict=True)
    )
    return tag(
        '<div class="mm-agreement"><div class="mm-scroll" tabindex="0" role="region" aria-label="Agreement between '
        'maps"><table class="mm-confusion mm-heat"><caption>Rank correlation between maps: 1 means the same order of '
        "pixels, 0 none, below 0 the reverse.</caption><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table>"
        "</div><p>Methods ask different questions, so maps may differ and both be right; trust what several maps that "
        "are better than chance agree on.</p></div>",
        head,
        rows,
    )


def _correlation(value: float) -> Markup:
    """Renders a cell of the heat map; a constant map has no correlation."""
    if math.isnan(value):
        return Markup('<td style="--share:0" title="one of the maps is constant">–</td>')
    side = "mm-negative" if value < 0 else ""
    return tag('<td class="{}" style="--share:{:.3f}">{:.2f}</td>', side, abs(value), value)


def _curves(explanation: Explanation, trust: Trust) -> Markup:
    curves = trust.curves
    if curves is None:
        return NOTHING
    x = [100 * f for f in curves.fractions]
    lines = [
        Line("random orders", x, list(row), "faint") for row in (*curves.random_deletion, *curves.random_insertion)
    ]
    lines += [Line("deletion", x, list(curves.deletion), "a"), Line("insertion", x, list(curves.insertion), "b")]
    return chart(lines, title_of(explanation), "part of the image, %", "relative logit", (0, 100), width=NARROW)
