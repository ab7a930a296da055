"""Speed on a CPU, as ratios to timm's convnext_tiny and swin_tiny measured in the same run.

    python benchmarks/cpu.py [--json FILE]

The models take turns, so that a busy moment of the machine hits all of them; each figure is the best of its rounds,
which is what the machine can do, beside the median. timm goes into the benchmark environment
(pip install timm torchvision), not into the package; without it the peers are left out.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.backends import cpu

import medmamba
from medmamba.kernels import resolve_backend
from medmamba.utils.text import json_text

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
OURS = ("nano", "tiny")


def candidates(peers: bool) -> dict[str, torch.nn.Module]:
    """Models in eval mode, ours as `from_pretrained(...).fuse()` gives them."""
    models = {}
    for name in OURS:
        models[name] = medmamba.create_model(name, num_classes=8).eval().fuse()
    if peers:
        import timm

        for name in PEERS:
            models[name] = timm.create_model(name, num_classes=8).eval()
    return models


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def inference(models: dict, batch: int, rounds: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds per image of every round, per model."""
    image = torch.randn(batch, 3, 224, 224)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, model in models.items():
                whole = "bfloat16" in name
                x = image.bfloat16() if whole else image
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and not whole):
                    t = seconds(lambda m=model, x=x: m(x)) / batch
                if i >= 2:
                    times[name].append(t)
    return times


def training_step(name: str, rounds: int) -> dict[str, float]:
    """Forward, backward and AdamW at batch 1, and the peak memory of the process that does only that."""
    model = medmamba.create_model(name, num_classes=8).train()
    optimiser = torch.optim.AdamW(model.parameters())
    image, target = torch.randn(1, 3, 224, 224), torch.tensor([3])
    # Batch norm cannot train on the single pixel of batch 1; at 224 the last map is 7x7.

    def step():
        torch.nn.functional.cross_entropy(model(image), target).backward()
        optimiser.step()
        optimiser.zero_grad()

    times = [seconds(step) for _ in range(rounds + 2)][2:]
    return {"best_s": min(times), "median_s": statistics.median(times), "peak_mib": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--training-step", metavar="NAME", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.training_step:
        print(json_text(training_step(args.training_step, args.rounds)))
        return
    try:
        import timm

        peers = timm.__version__
    except (ImportError, RuntimeError) as error:
        peers = ""
        print(f"no peers: timm cannot be imported here ({str(error).splitlines()[0]})")
    results: dict = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "timm": peers,
        "scan": resolve_backend(torch.device("cpu"), torch.float32),
        "rows": [],
    }
    models = candidates(bool(peers))
    print(f"{results['machine']}, torch {results['torch']}, timm {peers}, scan {results['scan']}")
    print(
        f"{'model':<30} {'batch':>5} {'dtype':>9} {'best ms':>8} {'median':>8} {'img/s':>7}  ratio {', '.join(PEERS)}"
    )
    for name in OURS:  # weights in bfloat16 too, which spares autocast converting them at every call
        models[f"{name}, fuse(bfloat16)"] = medmamba.create_model(name, num_classes=8).eval().fuse(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            chosen = {n: m for n, m in models.items() if dtype == torch.bfloat16 or "bfloat16" not in n}
            times = inference(chosen, batch, args.rounds, dtype)
            for name, rounds in times.items():
                best = min(rounds)
                ratios = [min(times[p]) / best for p in PEERS if p in times]
                row = {
                    "model": name,
                    "batch": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "best_ms": 1e3 * best,
                    "median_ms": 1e3 * statistics.median(rounds),
                    "images_per_s": 1 / best,
                    "ratios": dict(zip(PEERS, ratios, strict=False)),
                }
                results["rows"].append(row)
                print(
                    f"{name:<30} {batch:>5} {row['dtype']:>9} {row['best_ms']:>8.1f} {row['median_ms']:>8.1f} "
                    f"{row['images_per_s']:>7.1f}  {', '.join(f'{r:.2f}x' for r in ratios)}",
                    flush=True,
                )
    for name in OURS:
        command = [sys.executable, __file__, "--training-step", name, "--rounds", str(args.rounds)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(output.strip().splitlines()[-1])
        results[f"training_step_{name}"] = row
        print(
            f"{name} training step, batch 1: {row['best_s']:.3f} s (median {row['median_s']:.3f}), "
            f"peak {row['peak_mib']:.0f} MiB"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(json_text(results, indent=2))


if __name__ == "__main__":
    main()
