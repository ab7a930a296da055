"""Which attribution method to trust: method x faithfulness x time over test images, and the tables of docs/explain.md.

    python benchmarks/explain.py run --model medmamba/bloodmnist --data FOLDER --images 100 --json FILE
    python benchmarks/explain.py speed --json FILE
    python benchmarks/explain.py docs FILE...

`run` explains the predicted class of test images, drawn evenly from the class folders of FOLDER, and goes on where it
stopped when FILE exists. `docs` writes the tables of these files into docs/explain.md.
"""

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import medmamba
from medmamba.explain import assess, explain
from medmamba.explain.comparison import parse_method
from medmamba.images import expand_inputs, load_image

DOCS = Path(__file__).resolve().parents[1] / "docs" / "explain.md"
MARKERS = "<!-- tables: python benchmarks/explain.py docs -->", "<!-- end of tables -->"
METHODS = (
    "integrated_gradients",
    "gradient_shap",
    "input_x_gradient",
    "saliency",
    "smoothgrad",
    "gradcam:stage4",
    "gradcam:stage3",
    "gradcam:stage3.conv",
    "gradcam:stage3.scan",
    "gradcam:stage2",
    "occlusion",
    "feature_ablation",
)
COLUMNS = (
    "| method | unexplained | deletion gain | insertion gain | better than random | max-sensitivity | "
    "same with random weights | passed | seconds |\n|---|---|---|---|---|---|---|---|---|"
)
LEGEND = (
    "Medians over images. Unexplained: share of the change of the logit under random removals that the map does not "
    "predict. Gains: area between the curve of the map and the mean of 5 random orders, in units of the logit "
    "difference between the image and the image with everything removed; positive is better than random. Better than "
    "random: share of images on which deletion / insertion beat every random order. Passed: share of images whose map "
    "changed when the weights were replaced by random ones."
)


def noise_map(model: Any, x: torch.Tensor, target: int) -> torch.Tensor:
    """Control: knows nothing. `explain` has fixed the seed, so it is the same for every image."""
    return torch.randn(x.shape[2:], device=x.device)


def edge_map(model: Any, x: torch.Tensor, target: int) -> torch.Tensor:
    """Control: knows the image and not the model."""
    grey = x.mean(1)[0]
    return (grey - grey.roll(1, 0)).abs() + (grey - grey.roll(1, 1)).abs()


CONTROLS: dict[str, Callable] = {"noise (control)": noise_map, "edges (control)": edge_map}


def run(args: argparse.Namespace) -> None:
    model = medmamba.MedMamba.from_pretrained(args.model).to(args.device)
    images = sample(args.data, args.images, args.seed)
    settings = {
        "model": args.name or args.model,
        "images": len(images),
        "seed": args.seed,
        "sensitivity_images": args.sensitivity_images,
        "removal": args.removal,
        "methods": args.methods or [*METHODS, *CONTROLS],
    }
    path = Path(args.json)
    results: dict[str, Any] = {"settings": settings, "machine": machine(args.device), "images": {}}
    if path.exists():
        results = json.loads(path.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{path} holds another run, {results['settings']}; choose another --json")
    for i, image_path in enumerate(images):
        key = f"{image_path.parent.name}/{image_path.name}"
        if key in results["images"]:
            continue
        began = time.perf_counter()
        results["images"][key] = one_image(model, image_path, settings, i, args.batch_size)
        path.write_text(json.dumps(results, indent=1))
        print(f"{i + 1}/{len(images)} {key}: {time.perf_counter() - began:.1f} s", flush=True)
    print(table(results))


def sample(folder: str, n: int, seed: int) -> list[Path]:
    """n images, as evenly from the class folders as their sizes allow."""
    by_class: dict[str, list[Path]] = {}
    for path in expand_inputs(folder):
        by_class.setdefault(path.parent.name, []).append(path)
    generator = random.Random(seed)
    for paths in by_class.values():
        generator.shuffle(paths)
    order = [paths[i] for i in range(max(map(len, by_class.values()))) for paths in by_class.values() if i < len(paths)]
    return order[:n]


def one_image(model: Any, path: Path, settings: dict[str, Any], index: int, batch_size: int) -> dict[str, Any]:
    """Figures by method."""
    image = load_image(path)
    record: dict[str, Any] = {"methods": {}}
    target, known = None, None
    metrics = ["infidelity", "removal", "randomisation"]
    if index < settings["sensitivity_images"]:
        metrics.append("sensitivity")
    for name in settings["methods"]:
        method, options = (CONTROLS[name], {}) if name in CONTROLS else parse_method(name)
        e = explain(model, image, method, target, seed=settings["seed"], batch_size=batch_size, **options)
        target = e.target
        truth = path.parent.name.replace("_", " ").casefold()
        record |= {"label": e.label, "correct": e.label.casefold() == truth, "probability": e.probability}
        trust = assess(
            model, e, metrics, removal=settings["removal"], known=known, seed=settings["seed"], batch_size=batch_size
        )
        curves, check = trust.curves, trust.randomisation
        assert curves is not None and check is not None
        known = curves
        random_deletion = [medmamba.explain.faithfulness.area(c, curves.fractions) for c in curves.random_deletion]
        random_insertion = [medmamba.explain.faithfulness.area(c, curves.fractions) for c in curves.random_insertion]
        record["methods"][name] = {
            "seconds": e.seconds,
            "unexplained": trust.unexplained,
            "deletion_gain": statistics.mean(random_deletion) - curves.deletion_auc,
            "insertion_gain": curves.insertion_auc - statistics.mean(random_insertion),
            "deletion_wins": curves.deletion_auc < min(random_deletion),
            "insertion_wins": curves.insertion_auc > max(random_insertion),
            "sensitivity": trust.sensitivity,
            "randomisation": check.steps[-1],
            "similarity": check.similarity,
            "passed": check.passed,
            "completeness_error": e.diagnostics.get("completeness_error"),
            "steps": e.diagnostics.get("steps"),
            "converged": e.diagnostics.get("converged"),
        }
    return record


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [COLUMNS]
    images = list(results["images"].values())
    for name in results["settings"]["methods"]:
        rows = [image["methods"][name] for image in images]

        def median(key: str, rows: list[dict] = rows) -> float:
            values = [row[key] for row in rows if row[key] is not None]
            return statistics.median(values) if values else math.nan

        def share(key: str, rows: list[dict] = rows) -> str:
            return f"{sum(row[key] for row in rows) / len(rows):.0%}"

        sensitivity = median("sensitivity")
        lines.append(
            f"| {name} | {median('unexplained'):.2f} | {median('deletion_gain'):+.3f} | "
            f"{median('insertion_gain'):+.3f} | {share('deletion_wins')} / {share('insertion_wins')} | "
            f"{'-' if math.isnan(sensitivity) else format(sensitivity, '.2f')} | {median('similarity'):.2f} | "
            f"{share('passed')} | {median('seconds'):.2f} |"
        )
    return "\n".join(lines)


def section(results: dict[str, Any]) -> str:
    """One run as Markdown: what was measured, on what, the table, and how integrated gradients converged."""
    s, images = results["settings"], list(results["images"].values())
    correct = sum(image["correct"] for image in images)
    text = (
        f"### {s['model']}\n\n{len(images)} test images, the predicted class of each explained (right for {correct}). "
        f"Removed parts are replaced by: {s['removal']}. Max-sensitivity on the first {s['sensitivity_images']}. "
        f"{results['machine']}.\n\n{table(results)}\n"
    )
    runs = [image["methods"].get("integrated_gradients") for image in images]
    if runs := [r for r in runs if r is not None]:
        worst = max(r["completeness_error"] for r in runs)
        steps = sorted(r["steps"] for r in runs)
        text += (
            f"\nIntegrated gradients converged on {sum(r['converged'] for r in runs)} of {len(runs)} images, with "
            f"{steps[len(steps) // 2]} steps in the median and {steps[-1]} at most; the largest completeness error is "
            f"{worst:.2%} of the logit difference.\n"
        )
    return text


def speed(args: argparse.Namespace) -> None:
    """Integrated gradients with 50 steps and Grad-CAM of `tiny` at 224 pixels, each the best of a few runs."""
    torch.manual_seed(0)
    model = medmamba.create_model("tiny", num_classes=8).eval().to(args.device)
    image = torch.rand(224, 224, 3).numpy()
    x = torch.randn(1, 3, 224, 224, device=args.device)

    def forward() -> None:
        with torch.no_grad():
            model(x).cpu()

    def best(function: Callable, n: int = 2) -> float:
        times = []
        for _ in range(n):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    def gradients() -> None:
        explain(model, image, "integrated_gradients", 0, n_steps=50, max_steps=50, batch_size=args.batch_size)

    rows = {"one forward pass": best(forward, 10), "integrated_gradients, 50 steps": best(gradients)}
    for layer in ("stage4", "stage3", "stage3.scan", "stage1"):
        rows[f"gradcam ({layer})"] = best(lambda layer=layer: explain(model, image, "gradcam", layer=layer), 4)
    results = {"speed": rows, "machine": machine(args.device)}
    Path(args.json).write_text(json.dumps(results, indent=1))
    print(speed_section(results))


def speed_section(results: dict[str, Any]) -> str:
    rows = results["speed"]
    forward = rows["one forward pass"]
    lines = ["| `tiny`, 224 pixels | seconds | forward passes |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.3f} | {seconds / forward:.1f} |" for name, seconds in rows.items()]
    return f"### Speed\n\n{results['machine']}.\n\n" + "\n".join(lines) + "\n"


def machine(device: str) -> str:
    """Device, scan backend and torch version."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if where.type == "cpu" else ""
    backend = medmamba.kernels.resolve_backend(where, torch.float32)
    return f"{name}{threads}, torch {torch.__version__}, scan backend {backend}"


def docs(args: argparse.Namespace) -> None:
    loaded = [json.loads(Path(path).read_text()) for path in args.files]
    sections = [section(r) for r in loaded if "settings" in r]
    if sections:
        sections.insert(0, LEGEND + "\n")
    sections += [speed_section(r) for r in loaded if "speed" in r]
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKERS[0])
    _, found, after = rest.partition(MARKERS[1])
    if not found:
        raise SystemExit(f"{DOCS} has lost its markers {MARKERS}")
    body = "\n".join(sections)
    DOCS.write_text(f"{before}{MARKERS[0]}\n\n{body}\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--model", required=True)
    command.add_argument("--name", help="what the table calls the model (--model)")
    command.add_argument("--data", required=True, metavar="FOLDER", help="test images in one folder per class")
    command.add_argument("--images", type=int, default=100)
    command.add_argument("--sensitivity-images", type=int, default=25, help="repeats explanations, so costs the most")
    command.add_argument("--methods", nargs="+")
    command.add_argument("--removal", default="blur")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(function=run)
    fast = commands.add_parser("speed")
    fast.set_defaults(function=speed)
    for c in (command, fast):
        c.add_argument("--device", default="cpu")
        c.add_argument("--batch-size", type=int, default=8)
        c.add_argument("--json", required=True, metavar="FILE")
    write = commands.add_parser("docs")
    write.add_argument("files", nargs="+", metavar="FILE")
    write.set_defaults(function=docs)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
