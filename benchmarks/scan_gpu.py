"""Speed of the four-direction scan alone on an NVIDIA GPU, at the shapes of a MedMamba's stages at 224x224.

    python benchmarks/scan_gpu.py --out results [--model tiny] [--batches 1 64 128] [--dtypes float32 bfloat16]
    python benchmarks/scan_gpu.py --out results --sweep [--batches 128] [--dtypes bfloat16]
    python benchmarks/scan_gpu.py --out results --smoke      its code on the CPU; the figures mean nothing

"forward" is inference, "training" the forward that saves states, "backward" all gradients. The exponentials are what
bounds a scan: N per token, channel and direction, of which a GPU computes 16 per processor and cycle; "share" is the
part of that rate reached. --sweep times every launch plan of `medmamba/kernels/backends/cuda.py` that makes sense and
prints the fastest beside the one chosen now.
--padded gives proj the layout of a projection whose step size codes are padded to a multiple of 4 (for R = 3: to 4).
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

from medmamba.kernels.backends import cuda as cuda_backend
from medmamba.kernels.backends.cuda import BLOCKS, Plan
from medmamba.kernels.cuda.nvrtc import CudaError
from medmamba.kernels.dispatch import load_backend
from medmamba.utils.text import json_text

MODELS = {"tiny": ((2, 2, 4, 2), 96), "small": ((2, 2, 8, 2), 96), "base": ((2, 2, 12, 2), 128)}
N = 16
PASSES = ("forward", "training", "backward")


def stages(model: str, smoke: bool) -> list[tuple[int, int, int]]:
    """(blocks, side of the map, channels) of each stage."""
    if smoke:
        return [(2, 4, 8), (1, 2, 16)]
    blocks, width = MODELS[model]
    return [(count, 56 >> stage, width << stage) for stage, count in enumerate(blocks)]


def inputs(batch: int, side: int, channels: int, dtype: torch.dtype, device: str, padded: bool) -> tuple:
    rank = -(-channels // 2 // 16)
    if padded:
        rank = -(-rank // 4) * 4
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    A = -torch.arange(1.0, N + 1, device=device).expand(4, channels, N).contiguous()
    x, proj = randn(batch, side, side, channels).to(dtype), randn(batch, side, side, 4, rank + 2 * N).to(dtype)
    return x, proj, randn(4, channels, rank) / rank**0.5, randn(4, channels) - 3, A, randn(4, channels)


def calls(backend, tensors: tuple, **plan) -> dict:
    """The three passes of one backend, as functions without arguments."""
    x = tensors[0]
    chunks = -(-x.shape[1] * x.shape[2] // backend.chunk) if backend.chunk else 0
    shape = (x.shape[0], 4, chunks, N, x.shape[3]) if chunks else (0,)
    states, none, dy = x.new_zeros(shape, dtype=torch.float32), x.new_empty(0), torch.randn_like(x)
    return {
        "forward": lambda: backend.scan_2d(*tensors, none, **plan),
        "training": lambda: backend.scan_2d(*tensors, states, **plan),
        "backward": lambda: backend.scan_2d_backward(dy, *tensors, states, **plan),
    }


def milliseconds(function, rounds: int, cuda: bool) -> float:
    """The median call, each after the cache was filled with something else."""
    if not cuda:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    other = torch.empty(64 * 2**20, device="cuda")
    times = []
    for i in range(rounds + 3):
        other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def exponentials_per_ms(megahertz: float) -> float:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return processors * 16 * megahertz * 1e3


# --- the table ------------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace, backends: dict) -> list[dict]:
    rows = []
    cuda = not options.smoke
    print(
        f"{'map':>7} {'channels':>8} {'batch':>5} {'dtype':>9} {'':10} "
        + " ".join(f"{p:>9}" for p in PASSES)
        + "  share"
    )
    for dtype, batch in itertools.product(options.dtypes, options.batches):
        total: dict[str, dict[str, float]] = {name: dict.fromkeys(PASSES, 0.0) for name in backends}
        for count, side, channels in stages(options.model, options.smoke):
            device = "cuda" if cuda else "cpu"
            tensors = inputs(batch, side, channels, getattr(torch, dtype), device, options.padded)
            for name, backend in backends.items():
                row = {p: milliseconds(f, options.rounds, cuda) for p, f in calls(backend, tensors).items()}
                for p in PASSES:
                    total[name][p] += count * row[p]
                elements = batch * 4 * side * side * channels * N
                share = elements / row["forward"] / exponentials_per_ms(options.megahertz) if cuda else 0.0
                rows.append(
                    {"side": side, "channels": channels, "batch": batch, "dtype": dtype, "backend": name, **row}
                    | {"share": share}
                )
                show(f"{side}x{side}", channels, batch, dtype, name, row, f"{share:6.1%}")
        for name, row in total.items():
            per_image = 1e3 * row["forward"] / batch
            show("all", 0, batch, dtype, name, row, f"{per_image:.1f} us per image forward")
            rows.append({"side": 0, "channels": 0, "batch": batch, "dtype": dtype, "backend": name, **row})
    return rows


def show(size: str, channels: int, batch: int, dtype: str, name: str, row: dict, note: str) -> None:
    figures = " ".join(f"{row[p]:9.3f}" for p in PASSES)
    print(f"{size:>7} {channels or '':>8} {batch:>5} {dtype:>9} {name:10} {figures} {note}", flush=True)


# --- the sweep ------------------------------------------------------------------------------------------------------


def plans(direction: str, batch: int, length: int, channels: int) -> list[Plan]:
    """Launches worth trying."""
    blocks = [block for block in BLOCKS if -(-channels // block) * block <= 1.1 * max(channels, min(BLOCKS))]
    if direction == "backward":
        shapes = itertools.product(blocks, (2, 4), (1, 2, 3))
        return [Plan(block, per_thread=each, occupancy=held) for block, each, held in shapes]
    few = 4 * batch * -(-channels // 32) < 1000
    cuts = [cut for cut in (1, 4, 8, 16, 32) if cut == 1 or (few and length >= 32 * cut)]
    shapes = itertools.product(blocks, (1, 2, 4), cuts, (1, 4, 8))
    return [Plan(block, lanes, cut, resident=held) for block, lanes, cut, held in shapes]


def sweep(options: argparse.Namespace) -> list[dict]:
    rows = []
    shapes = itertools.product(options.dtypes, options.batches, stages(options.model, False))
    for dtype, batch, (_, side, channels) in shapes:
        tensors = inputs(batch, side, channels, getattr(torch, dtype), "cuda", options.padded)
        device = torch.cuda.current_device()
        for direction in ("forward", "backward"):
            if direction == "forward":
                chosen = cuda_backend.forward_plan(batch, side * side, channels, device)
            else:
                chosen = cuda_backend.backward_plan(channels, tensors[2].shape[2], tensors[0].element_size(), device)
            timed: dict[Plan, float] = {}
            for plan in dict.fromkeys([chosen, *plans(direction, batch, side * side, channels)]):
                function = calls(cuda_backend.BACKEND, tensors, plan=plan)[direction]
                try:
                    timed[plan] = milliseconds(function, options.rounds, True)
                except CudaError as error:  # too many registers or too little shared memory: a plan that cannot be
                    print(f"    {tuple(plan)}: {str(error).splitlines()[0]}")
                    continue
                rows.append(
                    {"direction": direction, "side": side, "channels": channels, "batch": batch, "dtype": dtype}
                    | {"plan": plan._asdict(), "ms": timed[plan], "chosen": plan == chosen}
                )
            print(f"{direction} {side}x{side}x{channels}, {batch} x {dtype}: chosen {timed[chosen]:.3f} ms {chosen}")
            for plan in sorted(timed, key=lambda plan: timed[plan])[:3]:
                print(f"    {timed[plan]:.3f} ms {plan}", flush=True)
            save(options, {"sweep": rows})
    return rows


def save(options: argparse.Namespace, results: dict) -> None:
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = "scan_sweep.json" if options.sweep else "scan.json"
    about = {"torch": torch.__version__, "options": vars(options)}
    if not options.smoke:
        about["device"] = torch.cuda.get_device_name()
    (folder / name).write_text(json_text(about | results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--megahertz", type=float, default=1700, help="clock for the share; an H100 runs at 1700 to 1980"
    )
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.dtypes, options.rounds = [1], ["float32"], 1
    elif not torch.cuda.is_available():
        sys.exit("this measures a GPU and PyTorch finds none; --smoke runs the code on the CPU")
    names = ["torch"] if options.smoke else ["cuda", "triton", "mamba_ssm"]
    backends = {}
    for name in names:
        reason = load_backend(name).why_not()
        if reason:
            print(f"without {name}: {reason}")
        else:
            backends[name] = load_backend(name)
    if options.sweep:
        if "cuda" not in backends:
            sys.exit("the sweep needs the backend cuda")
        sweep(options)
    else:
        save(options, {"rows": table(options, backends)})


if __name__ == "__main__":
    main()
