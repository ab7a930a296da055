"""Models: the sixteen datasets of the paper, published figures beside ours, and which weights are here."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr

from medmamba.data import registry
from medmamba.data.registry import DatasetEntry

from ..context import Context, Known
from ..html import NOTHING, Markup, card, interval_text, join, licence_name, table, tag
from ..theme import Html
from .classify import ClassifyTab, pick_js

HEADER = ["Dataset", "Images", "Licence", "Accuracy, paper", "Accuracy, ours", "AUC, paper", "AUC, ours", "Weights"]
VARIANTS = ("tiny", "small", "base")
NONE = Markup('<span class="mm-none">–</span>')


def build(context: Context, classify: ClassifyTab, tabs: gr.Tabs) -> None:
    """Lays the tab out and connects it; to be called inside `gr.Tab`. Nothing is asked of a network."""
    known = list(context.known.values())
    page = Html(models_html(known) + warnings_html(known), js_on_load=pick_js("mm-use", "click"), elem_id="mm-zoo")

    def use(event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
        session = context.sessions.of(request)
        title = str(event.index)
        if title not in context.titles(session):  # not what the page sends
            return gr.skip(), gr.skip()
        return gr.update(choices=context.choices(session), value=title), gr.Tabs(selected="classify")

    private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    page.click(use, None, [classify.model, tabs], **private).then(
        classify.rerun, [classify.model, *classify.view], classify.outputs, concurrency_id="classify", **private
    )


def models_html(known: list[Known]) -> Markup:
    """The table, those with weights first, and what must be known to read it."""
    ours = {name: [k for k in known if k.facts.entry and k.facts.entry.name == name] for name in registry.names()}
    rows = [_row(registry.get(name), ours[name]) for name in sorted(registry.names(), key=lambda n: not ours[n])]
    lead = [
        "Published figures are as the paper’s authors printed them, for its variants T, S and B; nobody here has "
        "verified them."
    ]
    measured = [k for k in known if k.facts.entry and k.facts.split]
    if measured:
        levels = {k.facts.evaluations[k.facts.split].level for k in measured if k.facts.split}
        intervals = f", with {levels.pop():.0%} bootstrap intervals" if len(levels) == 1 else ""
        lead.append(f"Ours are from the test split of each model{intervals}; N is nano, the variant for CPUs.")
    if any(_other_split(model) for model in measured):
        lead.append("* Measured on another split than the published figure: compare with care.")
    if any(model.facts.split != "test" for model in measured):
        lead.append("† Measured on the split that the weights were chosen by, as there is no test split: too good.")
    text = " ".join(lead)
    return card(table(HEADER, rows, "Datasets and figures", css="mm-zoo"), "The sixteen datasets of the paper", text)


def warnings_html(known: list[Known]) -> Markup:
    """How well each model tells images of other datasets from its own test images."""
    measured = {k.title: k.unusual.measured for k in known if k.unusual and k.unusual.measured}
    if not measured:
        return NOTHING
    others = sorted({name for record in measured.values() for name in record["auroc"]})
    rows = []
    for title, record in measured.items():
        cells = [
            tag("<strong>{:.3f}</strong><small>{:.0%} marked</small>", row["auroc"], row["called_unusual"])
            if (row := record["auroc"].get(name))
            else NONE
            for name in others
        ]
        marked, images = record["own"]["called_unusual"], record["own"]["n"]
        own = tag("<strong>{:.0%}</strong><small>of {:,} marked</small>", marked, images)
        rows.append([tag("<strong>{}</strong>", title), own, *cells])
    lead = (
        "How well each model’s warning tells images of another dataset from its own test images: AUROC, where 1 is "
        "always and 0.5 is chance, and the share that is marked as unusual. The threshold was set on validation images "
        "of the model’s own dataset; the others had no part in it."
    )
    return card(
        table(["Model", "Own test images", *others], rows, "AUROC of the warning", css="mm-zoo"), "Unusual images", lead
    )


def _row(entry: DatasetEntry, ours: list[Known]) -> list[object]:
    images = f"{entry.n_images:,}" if entry.n_images else "unknown"
    licence = tag("{}", licence_name(entry.licence.id))
    if entry.licence.non_commercial:
        licence += Markup("<small>non-commercial</small>")
    if not entry.source.public:
        licence += Markup("<small>images not public</small>")
    weights = join(
        tag('<button type="button" class="mm-tag mm-have" data-mm-use="{title}">{title}</button>', title=k.title)
        for k in ours
    )
    return [
        tag("<strong>{}</strong><small>{}</small>", entry.title, entry.modality),
        tag("{}<small>{} classes</small>", images, entry.num_classes),
        licence,
        _published(entry, "accuracy"),
        _ours(ours, "accuracy"),
        _published(entry, "auc"),
        _ours(ours, "auroc"),
        weights or Markup('<span class="mm-none">not yet</span>'),
    ]


def _published(entry: DatasetEntry, score: str) -> Markup:
    values = [(name[0].upper(), getattr(entry.published[name], score)) for name in VARIANTS if name in entry.published]
    shown = [tag("<span><i>{}</i> {:.3f}</span>", letter, value) for letter, value in values if value is not None]
    return tag('<span class="mm-tsb">{}</span>', join(shown)) if shown else NONE


def _ours(ours: list[Known], score: str) -> Markup:
    shown = []
    for model in ours:
        facts = model.facts
        estimate = facts.evaluations[facts.split].overall.get(score) if facts.split else None
        if estimate is None or math.isnan(estimate.value):
            continue
        shown.append(
            tag(
                "<span><i>{}</i> <strong>{:.3f}{}</strong>{}</span>",
                facts.config.architecture[:1].upper(),
                estimate.value,
                _marks(model),
                tag("<small>{}</small>", between) if (between := interval_text(estimate)) else NOTHING,
            )
        )
    return tag('<span class="mm-tsb">{}</span>', join(shown)) if shown else NONE


def _marks(model: Known) -> str:
    """Signs at a figure that the text above the table explains."""
    return ("*" if _other_split(model) else "") + ("" if model.facts.split == "test" else "†")


def _other_split(model: Known) -> bool:
    facts = model.facts
    sizes = facts.config.training.get("split_sizes")
    return bool(facts.entry and facts.entry.splits and sizes and dict(facts.entry.splits) != sizes)
