"""The Models tab: the sixteen datasets of the paper, published and measured results, and available weights."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import gradio as gr

from medmamba.data import registry
from medmamba.data.registry import DatasetEntry

from ..context import Context, Known
from ..html import NOTHING, Markup, card, interval_text, join, licence_name, table, tag
from ..theme import Html
from .classify import ClassifyTab, pick_js
from .results import results_html

HEADER = ["Dataset", "Images", "Licence", "Accuracy, paper", "Accuracy, here", "AUC, paper", "AUC, here", "Weights"]
VARIANTS = ("tiny", "small", "base")
LOADING = Markup('<p class="mm-hint" role="status">The results are being collected …</p>')
NONE = Markup('<span class="mm-none">–</span>')


def build(context: Context, classify: ClassifyTab, tab: gr.Tab, tabs: gr.Tabs) -> None:
    """Builds the tab and its events, without network access. Call inside `gr.Tab`."""
    page = Html(LOADING, js_on_load=pick_js("mm-use", "click"), elem_id="mm-zoo")

    @cache
    def content() -> Markup:
        known = list(context.known.values())
        return models_html(known) + classes_html(known) + warnings_html(known)

    def use(event: gr.EventData, request: gr.Request) -> tuple[Any, Any]:
        session = context.sessions.of(request)
        title = str(event.index)
        if title not in context.titles(session):  # not sent by the page
            return gr.skip(), gr.skip()
        return gr.update(choices=context.choices(session), value=title), gr.Tabs(selected="classify")

    private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    # Not part of the page that everybody loads: it is a third of it.
    tab.select(content, None, page, **private)
    page.click(use, None, [classify.model, tabs], **private).then(
        classify.rerun, [classify.model, *classify.view], classify.outputs, concurrency_id="classify", **private
    )


def models_html(known: list[Known]) -> Markup:
    """Renders the table of datasets, those with weights first, and its legend."""
    by_dataset = {name: [k for k in known if k.facts.entry and k.facts.entry.name == name] for name in registry.names()}
    names = [name for name in registry.names() if registry.get(name).in_paper or by_dataset[name]]
    rows = [_row(registry.get(name), by_dataset[name]) for name in sorted(names, key=lambda n: not by_dataset[n])]
    lead = [
        "“Paper” columns are as published, for the variants T (tiny), S (small) and B (base); they were not verified "
        "here."
    ]
    measured = [k for k in known if k.facts.entry and k.facts.split]
    if measured:
        levels = {k.facts.evaluations[k.facts.split].level for k in measured if k.facts.split}
        intervals = f", with {levels.pop():.0%} bootstrap intervals" if len(levels) == 1 else ""
        lead.append(
            f"“Here” columns were measured on the test split of each model{intervals}; N is nano, a variant for CPUs."
        )
    if any(_other_split(model) for model in measured):
        lead.append("* Measured on a different split than the published result: compare with care.")
    if any(model.facts.split != "test" for model in measured):
        lead.append("† Measured on the split used for model selection, as there is no test split: optimistic.")
    text = " ".join(lead)
    return card(table(HEADER, rows, "Datasets and results", css="mm-zoo"), "The sixteen datasets of the paper", text)


def classes_html(known: list[Known]) -> Markup:
    """Renders the results of each model per class, collapsed."""
    parts = []
    for model in known:
        if (split := model.facts.split) is None:
            continue
        evaluation = model.facts.evaluations[split]
        lowest = min(
            (row for row in evaluation.per_class if not math.isnan(row.scores["sensitivity"].value)),
            key=lambda row: row.scores["sensitivity"].value,
            default=None,
        )
        worst = f"lowest sensitivity: {lowest.name}, {lowest.scores['sensitivity'].value:.3f}" if lowest else ""
        parts.append(
            tag(
                '<details class="mm-model-results"><summary><strong>{}</strong><span>{}</span></summary>{}</details>',
                model.title,
                worst,
                results_html(evaluation, split, model.folder),
            )
        )
    lead = "Averages hide the class that matters: these are the results of each class, with the confusion matrix."
    return card(join(parts), "Results per class", lead) if parts else NOTHING


def warnings_html(known: list[Known]) -> Markup:
    """Renders how well each model detects images of other datasets as out of distribution."""
    measured = {k.title: k.unusual.measured for k in known if k.unusual and k.unusual.measured}
    if not measured:
        return NOTHING
    same = join(
        tag("<li><strong>{}</strong>: {}</li>", title, rates(record["same_kind"]))
        for title, record in measured.items()
        if record.get("same_kind")
    )
    others = sorted({name for record in measured.values() for name in record["auroc"]})
    rows = []
    for title, record in measured.items():
        cells = [
            tag("<strong>{:.0%}</strong><small>{}</small>", row["called_unusual"], _refused(row))
            if (row := record["auroc"].get(name))
            else NONE
            for name in others
        ]
        marked, images = record["own"]["called_unusual"], record["own"]["n"]
        refused = f", {record['own']['called_far']:.1%} refused" if "called_far" in record["own"] else ""
        own = tag("<strong>{:.0%}</strong><small>of {:,} flagged{}</small>", marked, images, refused)
        rows.append([tag("<strong>{}</strong>", title), own, *cells])
    lead = (
        "How well each model recognises images unlike its training data (out-of-distribution detection): the share of "
        "images of each other dataset that it flags, and the share so far off that it refuses to answer. "
        "Thresholds were set on validation images of the model’s own dataset only."
    )
    body = table(["Model", "Own test images", *others], rows, "Share of images flagged", css="mm-zoo")
    if same:
        body += tag("<p>{}</p><ul>{}</ul>", SAME_KIND, same)
    return card(body, "Out-of-distribution warning", lead)


SAME_KIND = "Other collections of the kind of image that a model knows, which it need not flag:"


def rates(rows: dict[str, dict[str, float]]) -> str:
    """Says how many images of each collection are flagged and refused."""
    return "; ".join(
        f"{name}, {row['called_unusual']:.0%} flagged"
        + (f", {row['called_far']:.0%} refused" if "called_far" in row else "")
        for name, row in rows.items()
    )


def _refused(row: dict[str, float]) -> str:
    return f"{row['called_far']:.0%} refused" if "called_far" in row else "flagged"


def _row(entry: DatasetEntry, models: list[Known]) -> list[object]:
    images = f"{entry.n_images:,}" if entry.n_images else "unknown"
    licence = tag("{}", licence_name(entry.licence.id))
    if entry.licence.non_commercial:
        licence += Markup("<small>non-commercial</small>")
    if not entry.source.public:
        licence += Markup("<small>images not public</small>")
    weights = join(
        tag('<button type="button" class="mm-tag mm-have" data-mm-use="{title}">{title}</button>', title=k.title)
        for k in models
    )
    return [
        tag("<strong>{}</strong><small>{}</small>", entry.title, entry.modality),
        tag("{}<small>{} classes</small>", images, entry.num_classes),
        licence,
        _published(entry, "accuracy"),
        _measured(models, "accuracy"),
        _published(entry, "auc"),
        _measured(models, "auroc"),
        weights or Markup('<span class="mm-none">not yet</span>'),
    ]


def _published(entry: DatasetEntry, score: str) -> Markup:
    values = [(name[0].upper(), getattr(entry.published[name], score)) for name in VARIANTS if name in entry.published]
    shown = [tag("<span><i>{}</i> {:.3f}</span>", letter, value) for letter, value in values if value is not None]
    return tag('<span class="mm-tsb">{}</span>', join(shown)) if shown else NONE


def _measured(models: list[Known], score: str) -> Markup:
    shown = []
    for model in models:
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
    """Returns footnote marks, which the legend explains."""
    return ("*" if _other_split(model) else "") + ("" if model.facts.split == "test" else "†")


def _other_split(model: Known) -> bool:
    facts = model.facts
    sizes = facts.config.training.get("split_sizes")
    return bool(facts.entry and facts.entry.splits and sizes and dict(facts.entry.splits) != sizes)
