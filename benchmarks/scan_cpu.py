"""Speed of the native scan on this CPU: all four-direction scans of a MedMamba at 224x224 pixels.

    python benchmarks/scan_cpu.py [--model tiny] [--batch 1] [--threads 2] [--rounds 100] [--plain] [--json FILE]

Everything takes turns and each figure is the best of its rounds, so that what else runs on the machine weighs little.
"forward" is inference, "training" the forward that saves states for the backward. An element is one state of one
channel at one token in one direction. --plain adds the plain PyTorch loop.
"""

import argparse
import platform
import time

import torch

from medmamba.kernels.backends import cpu as native
from medmamba.kernels.backends import eager as torch_backend
from medmamba.utils.text import json_text

# Blocks per stage and channels of the first stage; each stage has twice the channels and half the side of the last.
MODELS = {"tiny": ((2, 2, 4, 2), 96), "small": ((2, 2, 8, 2), 96), "base": ((2, 2, 12, 2), 128)}
N = 16


def inputs(batch: int, side: int, channels: int) -> tuple[torch.Tensor, ...]:
    rank = -(-channels // 2 // 16)
    A = -torch.arange(1.0, N + 1).expand(4, channels, N).contiguous()
    return (
        torch.randn(batch, side, side, channels),
        torch.randn(batch, side, side, 4, rank + 2 * N),
        torch.randn(4, channels, rank) / rank**0.5,
        torch.randn(4, channels) - 3,
        A,
        torch.ones(4, channels),
    )


def calls(backend, tensors: tuple[torch.Tensor, ...]) -> dict:
    x = tensors[0]
    chunks = -(-x.shape[1] * x.shape[2] // backend.chunk) if backend.chunk else 0
    states = torch.empty((x.shape[0], 4, chunks, N, x.shape[3]) if chunks else (0,))
    none, dy = torch.empty(0), torch.randn_like(x)
    return {
        "forward": lambda: backend.scan_2d(*tensors, none),
        "training": lambda: backend.scan_2d(*tensors, states),
        "backward": lambda: backend.scan_2d_backward(dy, *tensors, states),
    }


def best_times(functions: dict, rounds: int) -> dict:
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def native_variant(index: int):
    """The native backend, held to one of the instruction sets that its library has."""

    class Variant:
        chunk = native.BACKEND.chunk

        @staticmethod
        def hold(function, *arguments):
            chosen, native.best_variant = native.best_variant, lambda: index
            try:
                return function(*arguments)
            finally:
                native.best_variant = chosen

        @classmethod
        def scan_2d(cls, *arguments):
            return cls.hold(native.BACKEND.scan_2d, *arguments)

        @classmethod
        def scan_2d_backward(cls, *arguments):
            return cls.hold(native.BACKEND.scan_2d_backward, *arguments)

    return Variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="also the plain PyTorch loop, in one round")
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)

    names = native.VARIANTS[{"AMD64": "x86_64"}.get(platform.machine(), platform.machine())]
    backends = {names[i]: native_variant(i) for i in range(native.best_variant() + 1)}
    blocks, width = MODELS[options.model]
    total: dict[str, dict[str, float]] = {}
    stages = []
    print(f"{options.model}, batch {options.batch}, {options.threads} threads; milliseconds, best of {options.rounds}")
    columns = ("forward", "training", "backward")
    print(f"{'map':>8} {'channels':>8} {'':14} " + " ".join(f"{c:>9}" for c in columns) + "  ratio  G elem/s")
    for stage, count in enumerate(blocks):
        side, channels = 56 >> stage, width << stage
        tensors = inputs(options.batch, side, channels)
        functions = {(b, c): f for b, module in backends.items() for c, f in calls(module, tensors).items()}
        times = best_times(functions, options.rounds)
        if options.plain:
            plain = best_times({("plain torch", c): f for c, f in calls(torch_backend.BACKEND, tensors).items()}, 1)
            times |= plain
        for backend in dict.fromkeys(b for b, _ in times):
            row = {c: times[backend, c] * 1e3 for c in columns}
            for c, t in row.items():
                total.setdefault(backend, dict.fromkeys(row, 0.0))[c] += count * t
            stages.append({"side": side, "channels": channels, "backend": backend, **row})
            rate = options.batch * 4 * side * side * channels * N / row["forward"] / 1e6
            print_row(f"{side}x{side}", str(channels), backend, row, f"{rate:9.2f}")
    for backend, row in total.items():
        print_row("all", f"x{sum(blocks)}", backend, row, "")
    if options.json:
        with open(options.json, "w") as file:
            file.write(json_text({"options": vars(options), "stages": stages, "total": total}, indent=1))


def print_row(size: str, channels: str, backend: str, row: dict[str, float], rate: str) -> None:
    figures = " ".join(f"{row[c]:9.3f}" for c in ("forward", "training", "backward"))
    print(f"{size:>8} {channels:>8} {backend:14} {figures} {row['backward'] / row['training']:6.2f} {rate}")


if __name__ == "__main__":
    main()
