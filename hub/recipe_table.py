"""python -m hub.recipe_table: changes of the recipe `finetune`, compared on validation images, in docs/training.md.

    python -m hub.transfer measure --split val --ways full --starts medmamba/tiny-medical --sets dermamnist \
        --set balance=none --data DATA --out scores/none
    python -m hub.recipe_table scores/none scores/today

Without results, writes the table from those kept in hub/results/recipe/val.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmamba.cards.backbone import METRICS
from medmamba.utils.files import write_text
from medmamba.utils.text import json_text

from .pretrain_table import update

HUB = Path(__file__).parent
KEPT, DOCUMENT = HUB / "results" / "recipe" / "val", HUB.parent / "docs" / "training.md"
MARKERS = "<!-- recipe: python -m hub.recipe_table -->", "<!-- end of recipe -->"
TODAY = "as it is"


def keep(folders: Iterable[Path]) -> None:
    """Copies results of full fine-tuning to KEPT, each under its settings.

    Raises:
        ValueError: results on test images, which must not choose a recipe.
    """
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if record.get("split") != "val":
                raise ValueError(f"{file} was scored on test images; recipes are compared on val alone")
            if record["way"] == "full":
                record["start"] = Path(record["start"]).name
                changed = "-".join(f"{key}_{value}" for key, value in record.get("settings", {}).items())
                target = KEPT / f"{file.stem}-{record['variant']}{'-' if changed else ''}{changed}.json"
                target.parent.mkdir(parents=True, exist_ok=True)
                write_text(target, json_text(record, indent=1) + "\n")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table: a row per dataset, backbone and change of the recipe; means over seeds."""
    if not records:
        return "No results are kept yet."
    lines = [["dataset", "backbone", "recipe", "seeds", *METRICS.values()]]
    lines.append(["---"] * len(lines[0]))
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        changed = ", ".join(f"`{key}={json_text(value)}`" for key, value in record.get("settings", {}).items())
        groups.setdefault((record["set"], record["start"], changed.replace('"', "")), []).append(record)
    for (name, start, changed), found in sorted(groups.items()):
        scores = []
        for metric in METRICS:
            values = [record[metric] for record in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            scores.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append([name, f"{found[0]['variant']}, `{start}`", changed or TODAY, str(len(found)), *scores])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load() -> list[dict[str, Any]]:
    """Returns all kept results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.recipe_table", description="Changes of the recipe finetune.")
    parser.add_argument("results", nargs="*", type=Path, metavar="DIR", help="of `hub.transfer measure --split val`")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    args = parser.parse_args(argv)
    keep(args.results)
    return update(DOCUMENT, MARKERS, table(load()), "python -m hub.recipe_table", args.check)


if __name__ == "__main__":
    sys.exit(main())
