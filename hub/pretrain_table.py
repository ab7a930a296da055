"""The comparison of pretraining objectives in docs/backbones.md, on validation images alone; `hub.pretrain table`."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmamba.cards import backbone
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

HUB = Path(__file__).parent
KEPT, DOCUMENT = HUB / "results" / "pretraining" / "val", HUB.parent / "docs" / "backbones.md"
MARKERS = "<!-- objectives: python -m hub.pretrain table -->", "<!-- end of objectives -->"
WAYS, METRICS = {way: backbone.WAYS[way] for way in ("probe", "ten", "full")}, backbone.METRICS
RUNS = "backbones"  # folder of the records of the backbones, beside their scores
NAMES = {
    "teacher_weight": "teacher",
    "label_weight": "labels",
    "contrast_weight": "contrast",
    "masked_weight": "masked",
}


def keep(results: Iterable[Path], runs: Iterable[Path]) -> None:
    """Copies scores of `hub.transfer measure --split val`, and what is known of the backbones, to KEPT.

    Raises:
        ValueError: scores on test images, which must not choose between objectives.
    """
    for folder in results:
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if record.get("split") != "val":
                raise ValueError(f"{file} was scored on test images; objectives are compared on val alone")
            record["start"] = Path(record["start"]).name
            _write(KEPT / file.name, record)
    for folder in runs:
        record = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in record.items() if key not in ("pool", "log")}
        kept["loss"] = [record["log"][0]["loss"], record["log"][-1]["loss"]]
        _write(KEPT / RUNS / f"{folder.name}.json", kept)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text(record, indent=1) + "\n")


def tables(records: Sequence[dict[str, Any]], runs: dict[str, dict[str, Any]]) -> str:
    """Returns one Markdown table per variant and dataset: a row per initialisation, a column per protocol.

    Args:
        records: scores, with start, set, way, seed and variant.
        runs: records of the backbones by name; other starts, such as "scratch", have none.

    Runs that differ in nothing but the seed share a row.
    """
    if not records:
        return "No results are kept yet."
    texts = []
    for variant, name in sorted({(record["variant"], record["set"]) for record in records}, key=_order):
        found = [record for record in records if (record["variant"], record["set"]) == (variant, name)]
        count = found[0]["images"]["val"]
        lines = [["initial weights", "pretrained for", *(WAYS[way] for way in WAYS)], ["---"] * (2 + len(WAYS))]
        groups = dict.fromkeys(_group(record["start"]) for record in found)
        for start in sorted(groups, key=lambda start: (_place(start, runs), start)):
            mine = [record for record in found if _group(record["start"]) == start]
            cells = [_cell([record for record in mine if record["way"] == way]) for way in WAYS]
            lines.append([f"`{start}`", _objectives(runs.get(mine[0]["start"])), *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        texts.append(f"**{name}, {variant}**, {count} validation images:\n\n{table}")
    return "\n\n".join(texts)


def _group(start: str) -> str:
    """Returns the name that runs share which differ in the seed alone."""
    return re.sub(r"-seed\d+$", "", start)


def _order(key: tuple[str, str]) -> tuple[bool, str, bool, str]:
    variant, name = key
    return variant != "nano", variant, name != "dermamnist", name


def _place(start: str, runs: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """Sorts: without pretraining, then one objective, then several."""
    run = next((run for name, run in sorted(runs.items()) if _group(name) == start), None)
    if run is None:
        return (0 if start == "scratch" else 2), 0
    return 1, 10 * bool(run["non_commercial"]) + sum(bool(run[key]) for key in NAMES)


def _objectives(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    used = [f"{name} {run[key]:g}" for key, name in NAMES.items() if run[key]]
    return ", ".join(used) + (", with non-commercial images" if run["non_commercial"] else "")


def _cell(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return ""
    scores = []
    for metric in list(METRICS)[1:]:  # balanced accuracy, AUROC
        values = [record[metric] for record in records]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        scores.append(f"{statistics.mean(values):.3f}{spread}")
    return " / ".join(scores)


def load() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns the kept scores, and the kept records of backbones by name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))]
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((KEPT / RUNS).glob("*.json"))}
    return records, runs


def write(check: bool = False) -> int:
    """Writes the tables into docs/backbones.md.

    Args:
        check: write nothing; return 1 if they are out of date.
    """
    return update(DOCUMENT, MARKERS, tables(*load()), "python -m hub.pretrain table", check)


def update(document: Path, markers: Sequence[str], body: str, command: str, check: bool) -> int:
    """Writes what a command makes between the markers of a document.

    Args:
        check: write nothing; return 1, and name the command, if the document is out of date.
    """
    text = document.read_text(encoding="utf-8")
    before, first, rest = text.partition(markers[0])
    _, last, after = rest.partition(markers[1])
    if not (first and last):
        raise SystemExit(f"{document} has lost its markers {markers}")
    new = f"{before}{first}\n\n{body}\n\n{last}{after}"
    if not check:
        write_text(document, new)
    elif new != text:
        print(f"{document} is out of date: {command}", file=sys.stderr)
        return 1
    return 0
