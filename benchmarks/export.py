"""Exported models in onnxruntime against PyTorch on a CPU: time per image, ratio, size of the file.

    python benchmarks/export.py [--threads N] [--rounds N] [--batch N ...] [--json FILE]

The ways take turns, so that a busy moment of the machine hits all of them. A figure is the best of its rounds; where
the machine is busy even the best is not what it can do, so the time that processors worked (all threads together)
stands beside it.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

import medmamba
from medmamba.export import onnx_session
from medmamba.export.onnx_graph import build
from medmamba.export.onnx_precision import quantise, store_half
from medmamba.kernels import resolve_backend
from medmamba.utils.text import json_text

NAMES = ("nano", "tiny")


def sessions(name: str, model: medmamba.MedMamba, threads: int, folder: Path) -> dict[str, tuple]:
    """Label to (session, bytes of the file)."""
    found = {}
    images = [torch.rand(48, 64, 3).numpy() for _ in range(4)]  # int8 is only timed here
    makers: dict[str, Callable] = {
        "fp32": lambda proto: proto,
        "fp16": lambda proto: store_half(proto) or proto,
        "int8": lambda proto: quantise(proto, model.config, images),
    }
    for precision, change in makers.items():
        path = folder / f"{name}.{precision}.onnx"
        path.write_bytes(change(build(model)).SerializeToString())
        found[f"onnxruntime, library, {precision}"] = (onnx_session(path, threads, library=True), path.stat().st_size)
        if precision == "fp32":
            found["onnxruntime, operators"] = (onnx_session(path, threads, library=False), path.stat().st_size)
    return found


def measure(runs: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Best and median wall seconds, best processor seconds, of each."""
    wall: dict[str, list[float]] = {label: [] for label in runs}
    busy: dict[str, list[float]] = {label: [] for label in runs}
    for i in range(rounds + 1):
        for label, run in runs.items():
            start, start_busy = time.perf_counter(), time.process_time()
            run()
            if i:  # the first warms up
                wall[label].append(time.perf_counter() - start)
                busy[label].append(time.process_time() - start_busy)
    return {label: (min(wall[label]), sorted(wall[label])[rounds // 2], min(busy[label])) for label in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {
        "machine": f"{platform.machine()}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "scan": resolve_backend(torch.device("cpu"), torch.float32),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{'model':<5} {'batch':>5} {'way':<28} {'best ms':>8} {'median':>7} {'busy ms':>8} "
        f"{'of PyTorch':>10} {'MB':>6}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            torch.manual_seed(0)
            model = medmamba.create_model(name, num_classes=8).eval()
            fused = model.fuse()
            ways = sessions(name, model, args.threads, Path(folder))
            for batch in args.batch:
                image = torch.randn(batch, 3, 224, 224)

                def pytorch(fused=fused, image=image):
                    with torch.inference_mode():
                        fused(image)

                feed = {"image": image.numpy()}
                runs: dict[str, Callable] = {"PyTorch": pytorch}
                for label, (session, _) in ways.items():
                    runs[label] = lambda session=session, feed=feed: session.run(None, feed)
                results = measure(runs, args.rounds)
                for label, seconds in results.items():
                    best, median, busy = (1e3 * s / batch for s in seconds)
                    size = ways[label][1] / 1e6 if label in ways else float("nan")
                    ratio = seconds[0] / results["PyTorch"][0]
                    print(
                        f"{name:<5} {batch:>5} {label:<28} {best:>8.1f} {median:>7.1f} {busy:>8.1f} {ratio:>10.2f} "
                        f"{size:>6.1f}",
                        flush=True,
                    )
                    rows.append(dict(model=name, batch=batch, way=label, best_ms=best, median_ms=median, busy_ms=busy))
    if args.json:
        Path(args.json).write_text(json_text({**about, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
