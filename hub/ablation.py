"""python -m hub.ablation: what each step brought, from hub/results/ablation/tiny, as the tables of docs/weights.md.

    python -m hub.ablation            writes the tables
    python -m hub.ablation --check    fails if they are out of date

Each JSON file is one run: dataset, variant, seed, and its scores on val and test by the views of test-time
augmentation. The runs of today's recipes ("zoo-joint") are those of hub/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from medmamba.data import registry
from medmamba.inference.tta import VIEWS
from medmamba.utils.files import write_text

from .results import HUB, load_runs

FOLDER, DOCUMENT = HUB / "results" / "ablation" / "tiny", HUB.parent / "docs" / "weights.md"
MARKERS = "<!-- ablation: python -m hub.ablation -->", "<!-- end of ablation -->"
EARLIER = "from zoo-joint"  # the variant of runs in hub/results
VARIANTS = (
    EARLIER,
    "from tiny-medical",
    "distilled",
    "distilled, without class weights",
    "distilled from the teacher alone",
    "teacher",
)


def records() -> list[dict[str, Any]]:
    """Returns all runs, those of the earlier recipes first."""
    found: list[dict[str, Any]] = []
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    datasets = {record["dataset"] for record in stored}
    for run in load_runs():
        data = run.data
        if data["dataset"] in datasets and data["architecture"] == "tiny" and str(data.get("init")).startswith("zoo-"):
            scores = {
                split: {"none": {name: data[split][name]["value"] for name in ("accuracy", "auroc")}}
                for split in ("val", "test")
            }
            found.append({"dataset": data["dataset"], "variant": EARLIER, "seed": run.seed} | scores)
    return found + stored


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table: a row per dataset, variant and choice of views, means over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["dataset"], run["variant"]].append(run)
    lines = ["| dataset | start, method | views | seeds | val accuracy / AUROC | test accuracy | test AUROC |"]
    lines += ["| --- " * 7 + "|"]
    for dataset in registry.names():
        for variant in VARIANTS:
            found = groups.get((dataset, variant), [])
            for views in VIEWS:
                scored = [run for run in found if views in run["test"]]
                if scored:
                    val = [_mean([run["val"][views][name] for run in scored]) for name in ("accuracy", "auroc")]
                    test = [_spread([run["test"][views][name] for run in scored]) for name in ("accuracy", "auroc")]
                    what = "EfficientNet-Lite2, fine-tuned" if variant == "teacher" else variant
                    cells = [registry.get(dataset).title, what, views, str(len(scored)), " / ".join(val), *test]
                    lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def _spread(values: Sequence[float]) -> str:
    return _mean(values) + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hub.ablation", description="The tables of docs/weights.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    check = parser.parse_args(argv).check
    before = DOCUMENT.read_text(encoding="utf-8")
    head, first, rest = before.partition(MARKERS[0])
    _, last, tail = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"{DOCUMENT} lacks the markers {MARKERS}")
    text = "\n".join([head + first, "", *table(records()), "", last + tail])
    if check:
        return int(text != before)
    write_text(DOCUMENT, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
