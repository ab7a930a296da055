"""The tables of docs/explain.md, from the files that benchmarks/explain.py writes."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explain_controls import CONTROLS

from medmamba.explain.randomisation import JUDGED, SIMILAR

DOCS = Path(__file__).resolve().parents[1] / "docs" / "explain.md"
MEASURED = Path(__file__).resolve().parents[1] / "medmamba" / "explain" / "measured.json"
MARKERS = "<!-- tables: python benchmarks/explain.py docs -->", "<!-- end of tables -->"
SIGN = {"faithfulness": "unexplained", "randomisation": "similarity", "sensitivity": "sensitivity"}
"""The figure by which one sees that a check was made."""

LEGEND = """\
Medians over test images. The number of images is given in the header of each column; they were sampled by the same
rule, balanced over the classes as far as possible. The predicted class is explained.

- **Deletion, insertion**: improvement of the area under the curve over the mean of {random_orders} random orders, in
  units of the logit difference between the image and the image with everything removed; in brackets, the share of the
  images for which it was better than every random order. For a random map, the improvement is 0 and the share
  {chance:.0%}.
- **Unexplained**: share of the change of the logit under random removals that the map, scaled to fit best, does not
  predict; an empty map leaves 100%.
- **Max-sensitivity**: relative change of the map when the image changes imperceptibly.
- **Random weights**: similarity of the map to those of {random_models} models with random weights (the smallest); in
  brackets, the share of images for which it stayed below the threshold of {limit}.
- **Seconds**: median time of one explanation on the machine named.

Removed parts are replaced by the blurred image ({removal}). Controls are not methods: noise is random, edges depend on
the image and not on the model, disguised edges hide this from rank correlations, and the guided gradient resembles
guided backpropagation.
"""


def has(record: dict[str, Any], check: str) -> bool:
    """Whether a check of an image has been made."""
    return any(SIGN[check] in row for row in record["methods"].values())


def count(result: dict[str, Any], check: str) -> int:
    """Of how many images."""
    return sum(has(record, check) for record in result["images"].values())


def median(rows: Sequence[dict], name: str, form: str) -> str:
    values = [row[name] for row in rows if name in row]
    return format(statistics.median(values), form) if values else "-"


def share(rows: Sequence[dict], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{sum(values) / len(values):.0%}" if values else "-"


def table(result: dict[str, Any]) -> str:
    """Markdown: method x faithfulness x time."""
    n = {check: count(result, check) for check in SIGN}
    faithful, timed = f"n = {n['faithfulness']}", len(result["seconds"])
    lines = [
        f"| method | deletion, {faithful} | insertion, {faithful} | unexplained, {faithful} | "
        f"max-sensitivity, n = {n['sensitivity']} | random weights, n = {n['randomisation']} | seconds, n = {timed} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in result["settings"]["methods"]:
        rows = [r["methods"][name] for r in result["images"].values() if name in r["methods"]]
        times = [{"seconds": row[name]} for row in result["seconds"] if name in row]
        lines.append(
            f"| {name} | {median(rows, 'deletion_gain', '+.2f')} ({share(rows, 'deletion_wins')}) | "
            f"{median(rows, 'insertion_gain', '+.2f')} ({share(rows, 'insertion_wins')}) | "
            f"{median(rows, 'unexplained', '.0%')} | {median(rows, 'sensitivity', '.2f')} | "
            f"{median(rows, 'similarity', '.2f')} ({share(rows, 'passed')}) | {median(times, 'seconds', '.3f')} |"
        )
    return "\n".join(lines)


def section(result: dict[str, Any]) -> str:
    """One dataset: what was measured, on what, the table, and how integrated gradients converged."""
    images = [r for r in result["images"].values() if has(r, "faithfulness")]
    right = sum(r["correct"] for r in images)
    title = f"{result['dataset']}, {result['model'].split()[0]}"
    text = f"### {title}\n\n{result['model']}; {len(images)} test images, {right} of them classified correctly. "
    text += f"{result['machine']}.\n\n{table(result)}\n"
    runs = [r["methods"].get("integrated_gradients", {}) for r in images]
    if runs := [r for r in runs if "steps" in r]:
        worst = max(r["completeness_error"] for r in runs)
        steps = sorted(r["steps"] for r in runs)
        text += (
            f"\nIntegrated gradients added up within 1% on {sum(r['converged'] for r in runs)} of {len(runs)} images, "
            f"with {steps[len(steps) // 2]} points in the median and {steps[-1]} at most; the largest error is "
            f"{worst:.1%} of the logit difference.\n"
        )
    return text


def check_section(results: Sequence[dict[str, Any]]) -> str:
    """Whether the check with random weights separates: each measure, over all images."""
    measures = [*JUDGED, "ssim", "similarity"]
    titles = ["ranks", "ranks of magnitudes", "strongest tenth", "SSIM (not used)", "similarity (largest of three)"]
    images = sum(count(r, "randomisation") for r in results)
    lines = [
        f"### The check with random weights\n\nMedian and, in brackets, 95th percentile over {images} images and "
        f"{len(results)} models, each of the least similar random model. The limit is {SIMILAR}.\n",
        f"| map | {' | '.join(titles)} | images that failed |\n|{'---|' * (len(titles) + 2)}",
    ]
    names = list(dict.fromkeys(name for r in results for name in r["settings"]["methods"]))
    for name in sorted(names, key=lambda name: name in CONTROLS):
        rows = [i["methods"][name] for r in results for i in r["images"].values() if name in i["methods"]]
        rows = [row for row in rows if "similarity" in row]
        if not rows:
            continue
        cells = []
        for measure in measures:
            values = sorted(row[measure] for row in rows)
            cells.append(f"{statistics.median(values):.2f} ({values[int(0.95 * (len(values) - 1))]:.2f})")
        failed = sum(not row["passed"] for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} | {failed} of {len(rows)} |")
    return "\n".join(lines) + "\n"


def speed_section(results: Sequence[dict[str, Any]]) -> str:
    """Times of `tiny`, a pair of columns per machine."""
    lines = ["### Speed\n\n`tiny` at 224 pixels, 8 classes; integrated gradients with 50 points. Median; in brackets"]
    lines[0] += " minimum and maximum; and the equivalent number of forward passes of one image.\n"
    lines += [f"- {chr(65 + i)}: {r['machine']}; {r['rounds'] - 1} rounds." for i, r in enumerate(results)]
    lines.append("\n| | " + " | ".join(f"{chr(65 + i)}: seconds | passes" for i in range(len(results))) + " |")
    lines.append("|---|" + "---|---|" * len(results))
    for name in dict.fromkeys(name for r in results for name in r["speed"]):
        cells = []
        for r in results:
            t, forward = r["speed"][name], r["speed"]["one forward pass"]
            cells.append(f"{t['median']:.3f} ({t['min']:.3f} to {t['max']:.3f})")
            cells.append(f"{t['median'] / forward['median']:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measured(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `medmamba.explain.reliabilities` reads: of each method, the shares that the tables show."""
    found: dict[str, Any] = {}
    for result in results:
        for name in (name for name in result["settings"]["methods"] if name not in CONTROLS):
            rows = [r["methods"][name] for r in result["images"].values() if name in r["methods"]]
            entry = found.setdefault(name, {"shares": {}, "passed": []})
            wins = [[row[kind] for row in rows if kind in row] for kind in ("deletion_wins", "insertion_wins")]
            entry["shares"][result["dataset"]] = [round(sum(values) / len(values), 2) for values in wins]
            entry["passed"] += [row["passed"] for row in rows if "passed" in row]
    for entry in found.values():
        entry["passed"] = round(sum(entry["passed"]) / len(entry["passed"]), 2)
    source = "docs/explain.md, by benchmarks/explain.py"
    return {"source": source, "images": min(count(r, "faithfulness") for r in results), "methods": found}


def write(files: Sequence[dict[str, Any]]) -> None:
    """Puts the tables between the markers of docs/explain.md."""
    results = [f for f in files if "images" in f]
    speeds = [f for f in files if "speed" in f]
    sections = []
    if results:
        checks = results[0]["settings"]["checks"]
        legend = LEGEND.format(chance=1 / (1 + checks["random_orders"]), limit=SIMILAR, **checks)
        MEASURED.write_text(json.dumps(measured(results), indent=1) + "\n", encoding="utf-8")
        sections = [legend, *map(section, results), check_section(results)]
    if speeds:
        sections.append(speed_section(speeds))
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKERS[0])
    _, found, after = rest.partition(MARKERS[1])
    if not found:
        raise SystemExit(f"{DOCS} has lost its markers {MARKERS}")
    DOCS.write_text(f"{before}{MARKERS[0]}\n\n" + "\n".join(sections) + f"\n{MARKERS[1]}{after}", encoding="utf-8")
