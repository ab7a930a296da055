"""The tables of docs/backbones.md, from the results that `python -m hub.transfer measure` wrote."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmamba.cards import TRANSFER_NAME, write_card
from medmamba.cards.backbone import METRICS, WAYS, transfer_tables
from medmamba.pretrained import read_config
from medmamba.training.recipe import load_recipe
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

from .pretrain_pool import SOURCES

HUB = Path(__file__).parent
KEPT, MODELS, DOCUMENT = HUB / "results" / "transfer", HUB / "models", HUB.parent / "docs" / "backbones.md"
MARKERS = "<!-- transfer: python -m hub.transfer table -->", "<!-- end of transfer -->"
WEIGHTED = {
    "balance": "loss"
}  # the settings of the way "full-weights": those of `finetune` when the first were measured
POOL = tuple(name for name, source in SOURCES.items() if source.free)  # whose training images made the backbones


def keep(folders: Iterable[Path]) -> list[Path]:
    """Copies the results in `folders` to hub/results/transfer/VARIANT, with starts by name instead of by path.

    Raises:
        ValueError: results on other images than those of test, or of settings other than `finetune` or WEIGHTED has.
    """
    written = []
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if "split" in record:
                raise ValueError(f"{file} was scored on {record['split']}, and these tables are of test images")
            settings = record.pop("settings", None)
            balance = record.get("balance", load_recipe("finetune").balance)  # the results of a probe do not name it
            if settings not in (None, WEIGHTED) or balance not in (load_recipe("finetune").balance, "loss"):
                raise ValueError(f"{file} is of another recipe than `finetune`: {json_text(settings or balance)}")
            if record["way"] == "full" and "loss" in (balance, (settings or {}).get("balance")):
                record["way"] = "full-weights"
            record["start"] = Path(record["start"]).name
            name = "{start}-{set}-{way}-{seed}.json".format(**record)
            target = KEPT / record["variant"] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, json_text(record, indent=1) + "\n")
            written.append(target)
    return written


def load() -> list[dict[str, Any]]:
    """Returns all kept results."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(KEPT.glob("*/*.json"))]


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per variant, dataset, way and start: mean and sample standard deviation over the seeds.

    Datasets that were not in the pool come first, then those of whose training images the backbones were made.
    """
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["variant"], record["set"], record["way"], record["start"])
        groups.setdefault(key, []).append(record)

    def order(key: tuple[str, str, str, str]) -> tuple[Any, ...]:
        variant, name, way, start = key
        last = (start != "scratch", start.endswith("-medical"))
        return variant != "tiny", variant, name in POOL, name, list(WAYS).index(way), last

    rows = []
    for key in sorted(groups, key=order):
        found = groups[key]
        images = {json.dumps([record["images"], record["size"]]) for record in found}
        if len(images) > 1:
            raise ValueError(f"results of {key} are of different images: {sorted(images)}")
        counts = found[0]["images"]
        row: dict[str, Any] = dict(zip(("variant", "set", "way", "start"), key, strict=True))
        row |= {"in_pool": key[1] in POOL, "seeds": len(found), "train": counts["train"], "test": counts["test"]}
        row["size"] = found[0]["size"]
        for metric in METRICS:
            values = [record[metric] for record in found]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[metric] = {"mean": statistics.mean(values), "std": spread}
        rows.append(row)
    return rows


def page(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """Returns the text of docs/backbones.md with the tables of `rows` between the markers."""
    before, first, rest = text.partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"{DOCUMENT} has lost its markers {MARKERS}")
    return f"{before}{first}\n\n{transfer_tables(rows, 3)}\n\n{last}{after}"


def write(check: bool = False) -> int:
    """Writes docs/backbones.md, and transfer.json and the card of each backbone in hub/models.

    Args:
        check: write nothing; return 1 if one of them is out of date.
    """
    rows = summary(load())
    texts = {DOCUMENT: page(DOCUMENT.read_text(encoding="utf-8"), rows)}
    folders = sorted(path.parent for path in MODELS.glob("*/pretrain.json"))
    for folder in folders:
        mine = [row for row in rows if row["variant"] == read_config(folder).architecture]
        texts[folder / TRANSFER_NAME] = json_text({"rows": mine}, indent=1) + "\n"
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            print(f"{path} is out of date: python -m hub.transfer table", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        write_text(path, texts[path])
    for folder in folders:
        write_card(folder)
    return 0
