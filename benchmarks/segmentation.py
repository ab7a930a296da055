"""Frames per second of segmentation at 352x352, beside U-Net with ResNet-34 of segmentation_models_pytorch.

    python benchmarks/segmentation.py [--model FOLDER] [--device cuda] [--batch 1 16] [--compile] [--json FILE]

Each network runs in every mode that may suit it: float32, bfloat16 by autocast, or with weights in bfloat16 (on a GPU
float16 too, and each as a CUDA graph), channels last, batch norms folded into convolutions, on a GPU with the
algorithms that cuDNN finds fastest. With --compile the peer also runs through torch.compile, in a CUDA graph; this
network has kernels of its own instead. Networks and modes take turns, so that a busy moment of the machine hits all of
them; the figure of a network is the best round of its best mode. The peer has the decoder that is smp's default; its
weights are random, which do not change its speed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import medmamba
from medmamba.kernels import resolve_backend
from medmamba.segmentation.encoder import require_smp
from medmamba.segmentation.model import fold_norms
from medmamba.utils.text import json_text

SIDE = 352
PEER = "smp U-Net resnet34"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ours(model: medmamba.MedMambaSegmenter, dtype: torch.dtype | None) -> nn.Module:
    """Our network for inference."""
    return model.eval().fuse(dtype)


def peer(dtype: torch.dtype | None) -> nn.Module:
    """U-Net with ResNet-34 for inference."""
    net = require_smp().Unet("resnet34", encoder_weights=None, in_channels=3, classes=1).eval()
    fold_norms(net)
    return net.to(memory_format=torch.channels_last, dtype=dtype)


def modes(
    model: medmamba.MedMambaSegmenter, device: str, batch: int, graphs: bool, compiled: bool
) -> dict[tuple[str, str], Callable]:
    """Returns what to time, by network and mode."""
    images = torch.randn(batch, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
    found: dict[tuple[str, str], Callable] = {}
    makers: dict[str, Callable] = {model.config.architecture: lambda dtype: ours(model, dtype), PEER: peer}
    for name, make in makers.items():
        whole = make(None).to(device)
        found[name, "float32"] = call(whole, images)
        found[name, "autocast bfloat16"] = call(whole, images, torch.bfloat16)
        for kind, dtype in HALVES.items():
            if kind == "bfloat16" or device == "cuda":
                net = make(dtype).to(device)
                found[name, kind] = call(net, images.to(dtype))
                if graphs:
                    found[name, f"{kind}, graph"] = graphed(net, images.to(dtype))
                if graphs and compiled and name == PEER and kind == "float16":
                    net = torch.compile(net, dynamic=False)  # type: ignore[assignment]
                    found[name, f"{kind}, compiled, graph"] = graphed(net, images.to(dtype))
    return found


def call(net: nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Returns a function that runs a network once."""

    def once() -> Tensor:
        with torch.autocast(images.device.type, autocast) if autocast else nullcontext():
            return net(images)

    return once


def graphed(net: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Returns a function that copies its input and runs a network once, as a CUDA graph."""
    from medmamba.kernels.cuda import graph_capture

    inside, graph = images.clone(memory_format=torch.preserve_format), torch.cuda.CUDAGraph()
    graph_capture.warm_up(images.device, lambda: net(inside))
    out = graph_capture.record(graph, images.device, lambda: net(inside))

    def once() -> Tensor:
        inside.copy_(images)
        graph.replay()
        return out

    once.keeps = net  # type: ignore[attr-defined]  # whose weights the graph reads
    return once


def measure(found: dict[tuple[str, str], Callable], device: str, rounds: int, least: float) -> dict:
    """Returns seconds per batch of every round. A round takes at least `least` seconds; the modes take turns."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[tuple[str, str], list[float]] = {key: [] for key in found}
    counts = {}
    with torch.inference_mode():
        for key, once in found.items():
            for _ in range(3):
                once()
            wait()
            start = time.perf_counter()
            once()
            wait()
            counts[key] = max(round(least / (time.perf_counter() - start)), 1)
        for _ in range(rounds):
            for key, once in found.items():
                start = time.perf_counter()
                for _ in range(counts[key]):
                    once()
                wait()
                times[key].append((time.perf_counter() - start) / counts[key])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a segmentation model; default: a new one of --variant")
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, help="of the CPU; default: as torch chooses")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="on a GPU the peer through torch.compile too")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    model: medmamba.MedMambaSegmenter = (
        medmamba.MedMambaSegmenter.from_pretrained(args.model)
        if args.model
        else medmamba.create_segmenter(args.variant, size=SIDE)
    )
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    scan = resolve_backend(torch.device(args.device), torch.float32)
    machine = f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, scan {scan}"
    print(f"{machine}, {SIDE}x{SIDE} pixels, best of {args.rounds} rounds\n")
    print("| network | batch | mode | ms | median ms | images/s |\n| --- | ---: | --- | ---: | ---: | ---: |")
    rows, lines = [], []
    for batch in args.batch:
        times = measure(
            modes(model.eval(), args.device, batch, args.device == "cuda", args.compile),
            args.device,
            args.rounds,
            0.3 if args.device == "cpu" else 0.05,
        )
        best: dict[str, float] = {}
        for (name, mode), rounds in times.items():
            ms, median = 1e3 * min(rounds), 1e3 * statistics.median(rounds)
            rate = batch * 1e3 / ms
            best[name] = max(best.get(name, 0.0), rate)
            rows.append(
                {"network": name, "batch": batch, "mode": mode, "ms": ms, "median_ms": median, "images_per_s": rate}
            )
            print(f"| {name} | {batch} | {mode} | {ms:.2f} | {median:.2f} | {rate:.1f} |", flush=True)
        own = best[model.config.architecture]
        lines.append(
            f"batch {batch}, best mode of each: {own:.1f} and {best[PEER]:.1f} images/s, {own / best[PEER]:.2f} times"
        )
    print("\n" + "\n".join(lines))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            stream.write(json_text({"machine": machine, "side": SIDE, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
