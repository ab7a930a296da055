"""python -m hub.datasets: writes docs/datasets.md, the sixteen datasets of the paper, from the registry."""

import sys
from pathlib import Path

from medmamba.data import registry
from medmamba.data.registry import DatasetEntry, PublishedMetrics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "datasets.md"
HEAD = """# The sixteen datasets of the paper

Written by `python -m hub.datasets` from [`medmamba/data/registry.json`](../medmamba/data/registry.json), which
training, evaluation, conversion, model cards and the web app read too: `medmamba.data.registry.get("kvasir")`.
"""
FIGURES = """## Published figures

Accuracy / AUC as others printed them; nothing here was measured by this project. T, S and B are the published MedMamba
variants. S and B are given where somebody quotes the paper's own figures for them; an empty cell is not known.
"""


def page() -> str:
    entries = [registry.get(name) for name in registry.names()]
    sets = [["Dataset", "Images of", "Classes", "Images", "Split: train, val, test", "Licence of the images"]]
    sets += [[_link(e), e.modality, str(e.num_classes), _count(e.n_images), _split(e), _licence(e)] for e in entries]
    figures = [["Dataset", "T", "S", "B", "Best other model quoted"]]
    for e in entries:
        best = e.best_elsewhere
        other = f"{best.model} {_pair(best)} ({best.quoted_from})" if best else ""
        figures.append([e.title, *(_pair(e.published.get(v)) for v in ("tiny", "small", "base")), other])
    sources = sorted({row.quoted_from for e in entries for row in e.published.values()})
    quoted = f"T, S and B are quoted from: {'; '.join(sources)}."
    classes = "\n".join(f"- **{e.title}** (`{e.name}`): {_classes(e)}" for e in entries)
    order = "## Classes\n\nIn the order of the labels, from 0."
    return "\n".join([HEAD, _table(sets), FIGURES, _table(figures), quoted, "", order, "", classes, ""])


def _table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _link(entry: DatasetEntry) -> str:
    return f"[{entry.title}]({entry.source.url})" if entry.source.public else f"{entry.title} (not public)"


def _classes(entry: DatasetEntry) -> str:
    return "; ".join(f"{index} {label}" for index, label in entry.id2label.items())


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _split(entry: DatasetEntry) -> str:
    if entry.splits is None:
        return "not published"
    kind = {"official": "", "random": " (random)"}.get(entry.split_rule.kind, f" ({entry.split_rule.kind})")
    return ", ".join(_count(size) for size in entry.splits.values()) + kind


def _licence(entry: DatasetEntry) -> str:
    licence = entry.licence
    name = f"[{licence.id}]({licence.url})" if licence.id and licence.url else licence.id or "not stated"
    return f"{name}, no commercial use" if licence.non_commercial else name


def _pair(row: PublishedMetrics | None) -> str:
    return " / ".join(f"{v:.3f}" for v in (row.accuracy, row.auc) if v is not None) if row else ""


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
