"""Models: the sixteen datasets of the paper, published figures beside ours, and which weights are here."""

from __future__ import annotations

import math
from pathlib import Path

import gradio as gr

import medmamba
from medmamba import registry
from medmamba.card import CardError, ModelFacts, read_facts
from medmamba.config import ConfigError
from medmamba.licences import LicenceError
from medmamba.registry import DatasetEntry

from ..context import Context
from ..html import card, esc, table
from ..store import display_name
from ..theme import Html

HEADER = ["Dataset", "Images", "Licence", "Paper, accuracy", "Paper, AUC", "Ours, accuracy", "Ours, AUROC", "Weights"]
VARIANTS = ("tiny", "small", "base")


def build(context: Context) -> None:
    """Lays the tab out; to be called inside `gr.Tab`. Nothing is asked of a network."""
    with gr.Column():
        Html(models_html(local_facts(context.store.names)))


def local_facts(names: tuple[str, ...]) -> list[tuple[str, ModelFacts]]:
    """(title, facts) of the models that are on this machine already."""
    bundled, found = medmamba.bundled_models(), []
    for name in names:
        folder = bundled.get(name, Path(name))
        try:
            found.append((display_name(name), read_facts(folder)))
        except (OSError, ConfigError, CardError, LicenceError):  # not here, or without a stated licence
            continue
    return found


def models_html(ours: list[tuple[str, ModelFacts]]) -> str:
    """The table, and what must be known to read it."""
    by_dataset = {facts.entry.name: (title, facts) for title, facts in ours if facts.entry}
    rows = [_row(registry.get(name), by_dataset.get(name)) for name in registry.names()]
    differs = any(_other_split(facts) for _, facts in by_dataset.values())
    star = " * Measured on another split than the published figures: compare with care." if differs else ""
    lead = (
        "The paper’s figures are for the variants T, S and B, as its authors printed them; nobody here has verified "
        "them. Ours come from the test split of each model, with a 95 % bootstrap interval." + star
    )
    return card(table(HEADER, rows, "Datasets and figures", css="mm-zoo"), "The sixteen datasets of the paper", lead)


def _row(entry: DatasetEntry, ours: tuple[str, ModelFacts] | None) -> list[str]:
    images = f"{entry.n_images:,}" if entry.n_images else "unknown"
    licence = esc(entry.licence.id or "not stated")
    if entry.licence.non_commercial:
        licence += "<small>non-commercial</small>"
    if not entry.source.public:
        licence += "<small>images not public</small>"
    return [
        f"<strong>{esc(entry.title)}</strong><small>{esc(entry.modality)}</small>",
        f"{images}<small>{entry.num_classes} classes</small>",
        licence,
        _published(entry, "accuracy"),
        _published(entry, "auc"),
        _ours(ours, "accuracy"),
        _ours(ours, "auroc"),
        f'<span class="mm-tag mm-have">{esc(ours[0])}</span>' if ours else '<span class="mm-none">not yet</span>',
    ]


def _published(entry: DatasetEntry, score: str) -> str:
    values = [(name[0].upper(), getattr(entry.published[name], score)) for name in VARIANTS if name in entry.published]
    shown = [f"<span><i>{letter}</i> {value:.3f}</span>" for letter, value in values if value is not None]
    return f'<span class="mm-tsb">{"".join(shown)}</span>' if shown else '<span class="mm-none">–</span>'


def _ours(ours: tuple[str, ModelFacts] | None, score: str) -> str:
    if ours is None or not ours[1].split:
        return '<span class="mm-none">–</span>'
    facts = ours[1]
    estimate = facts.evaluations[facts.split].overall.get(score) if facts.split else None
    if estimate is None or math.isnan(estimate.value):
        return '<span class="mm-none">–</span>'
    star = "*" if _other_split(facts) else ""
    interval = "" if math.isnan(estimate.low) else f"<small>{estimate.low:.3f} – {estimate.high:.3f}</small>"
    return f"<strong>{estimate.value:.3f}{star}</strong>{interval}"


def _other_split(facts: ModelFacts) -> bool:
    sizes = facts.config.training.get("split_sizes")
    return bool(facts.entry and facts.entry.splits and sizes and dict(facts.entry.splits) != sizes)
