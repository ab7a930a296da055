"""python benchmarks/gpu_report.py FILE...: the tables of docs/performance.md from what gpu.py measured, a section per
file, and the plot of the first."""

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKERS = "<!-- tables: python benchmarks/gpu_report.py -->", "<!-- end of tables -->"
TITLES = {"inference": "Inference", "latency": "One image", "training": "Training step (forward, backward, AdamW)"}
PEERS = {
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny_patch4_window7_224": "swin_tiny",
    "mambavision_t": "mambavision_t",
    "vmamba_t": "vmamba_t",
}
OURS = ("nano", "tiny", "small", "base")
PLOT = "performance-pixels.svg"


def tables(measured: dict[str, Any], plotted: bool) -> str:
    rows, about = measured["rows"], measured["machine"]
    software = ", ".join(f"{name} {about[name]}" for name in ("torch", "cuda", "timm") if name in about)
    lines = [
        f"### {about['device']}",
        "",
        f"{about['memory_gib']:.0f} GiB; medmamba {about['medmamba']}, {software}.",
        "",
    ]
    columns = [name for name in (*PEERS, "published") if any(name in row.get("ratio", {}) for row in rows)]
    for part, title in TITLES.items():
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        lines += [f"#### {title}", "", f"224×224, batch {chosen[0]['batch']}.", ""]
        head = ["model", "precision", "mode", "images/s", "ms", "peak GiB", *(f"vs {PEERS.get(c, c)}" for c in columns)]
        bounded = any("roofline" in row for row in chosen)  # it is known of one card
        head += ["of roofline"] if bounded else []
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for row in chosen:
            ratio = row.get("ratio", {})
            name = PEERS.get(row["model"], row["model"])
            cells = [f"**{name}**" if name in OURS else name, row["precision"], row["mode"]]
            cells += [f"{row['images_per_s']:.0f}", f"{row['ms']:.2f}", f"{row['memory_gib']:.2f}"]
            cells += [f"{ratio[c]:.2f}x" if c in ratio else "" for c in columns]
            if bounded:
                cells.append(f"{row['roofline']:.0%}" if "roofline" in row else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    pixels = [row for row in rows if row["part"] == "pixels"]
    if pixels:
        title = f"`{pixels[0]['model']}`, batch {pixels[0]['batch']}, CUDA graph."
        lines += ["#### Scaling with the number of pixels", "", title, ""]
        lines += [
            "| side | inference ms | ns per pixel | training ms | ns per pixel | training GiB |",
            "|" + " --- |" * 6,
        ]
        for side in dict.fromkeys(row["size"] for row in pixels):
            infer, train = (series(pixels, precision)[side] for precision in ("bfloat16", "autocast"))
            cells = [str(side), *per_pixel(infer), *per_pixel(train), f"{train['memory_gib']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if plotted:
            lines += [f"![Time against pixels: both lines have a slope of about one]({PLOT})", ""]
    for label, found in measured.get("profiles", {}).items():
        lines += [
            f"#### Profile: {label}",
            "",
            f"{found['ms']:.2f} ms of the GPU in {found['kernels']:.0f} kernels.",
            "",
        ]
        lines += ["| kernels of | ms | share | count |", "| --- | --- | --- | --- |"]
        for kind, (ms, count) in found["kinds"].items():
            lines.append(f"| {kind} | {ms:.2f} | {ms / found['ms']:.0%} | {count:.0f} |")
        lines.append("")
    return "\n".join(lines)


def series(rows: list[dict[str, Any]], precision: str) -> dict[int, dict[str, Any]]:
    return {row["size"]: row for row in rows if row["precision"] == precision}


def per_pixel(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['ms']:.2f}", f"{1e6 * row['ms'] / (row['batch'] * row['size'] ** 2):.2f}"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    pixels = [row for row in rows if row["part"] == "pixels"]
    for precision, label in (("autocast", "training step"), ("bfloat16", "inference")):
        found = series(pixels, precision)
        x = [side * side / 1e6 for side in found]
        y = [row["ms"] for row in found.values()]
        axes.plot(x, y, "o-", label=label)
        axes.plot(x, [y[0] * value / x[0] for value in x], ":", color="grey", zorder=0)
    axes.plot([], [], ":", color="grey", label="proportional to pixels")
    axes.set(xscale="log", yscale="log", xlabel="megapixels per image", ylabel=f"ms per batch of {pixels[0]['batch']}")
    axes.set_xticks(x, [f"{side}²" for side in found])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "medmamba"}):  # the same file from the same figures
        figure.savefig(file, metadata={"Date": None})


def write(files: list[dict[str, Any]], folder: Path = DOCS) -> None:
    document = folder / "performance.md"
    before, first, rest = document.read_text(encoding="utf-8").partition(MARKERS[0])
    _, last, after = rest.partition(MARKERS[1])
    if not (first and last):
        raise SystemExit(f"{document} has lost its markers {MARKERS}")
    sections = "\n".join(tables(measured, i == 0) for i, measured in enumerate(files))
    document.write_text(f"{before}{MARKERS[0]}\n\n{sections}\n{MARKERS[1]}{after}", encoding="utf-8")
    if any(row["part"] == "pixels" for row in files[0]["rows"]):
        plot(files[0]["rows"], folder / PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    write([json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().files])


if __name__ == "__main__":
    main()
