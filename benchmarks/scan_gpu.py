"""Speed of the four-direction scan alone on an NVIDIA GPU, at the shapes of a MedMamba's stages at 224x224.

    python benchmarks/scan_gpu.py --out results [--model tiny] [--batches 1 64 128] [--dtypes float32 bfloat16]
    python benchmarks/scan_gpu.py --out results --sweep [--batches 128] [--dtypes bfloat16]
    python benchmarks/scan_gpu.py --out results --smoke      its code on the CPU; the figures mean nothing

"forward" is inference, "training" the forward that saves states, "backward" all gradients. The exponentials are what
bounds a scan: N per token, channel and direction, of which a GPU computes 16 per processor and cycle; "share" is the
part of that rate reached. --sweep times every launch plan of `medmamba/kernels/triton_plan.py` that makes sense and
prints the fastest beside the one chosen now. It compiles the variants first, in as many processes as there are cores.
--padded gives proj the layout of a projection whose step size codes are padded to a multiple of 4 (for R = 3: to 4).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from medmamba.kernels import triton_backend
from medmamba.kernels.dispatch import load_backend
from medmamba.kernels.triton_plan import Plan, backward_plan, forward_plan

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
    chunks = -(-x.shape[1] * x.shape[2] // backend.CHUNK) if backend.CHUNK else 0
    shape = (x.shape[0], 4, chunks, N, x.shape[3]) if chunks else (0,)
    states, none, dy = x.new_zeros(shape, dtype=torch.float32), x.new_empty(0), torch.randn_like(x)
    return {
        "forward": lambda: backend.scan_2d_forward(*tensors, none, **plan),
        "training": lambda: backend.scan_2d_forward(*tensors, states, **plan),
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


def plans(direction: str, lines: int, length: int, channels: int, smoke: bool) -> list[Plan]:
    """Launches worth trying."""
    if smoke:
        return [Plan(16, 4), Plan(16, 2)]
    blocks = (16, 32, 64) if direction == "forward" else (16, 32)
    unrolls = (1, 2, 4, 8) if direction == "forward" else (2, 4, 8)
    limits = (None, 96, 128, 168) if direction == "forward" else (None, 168, 208)
    found = []
    for block, unroll, registers in itertools.product(blocks, unrolls, limits):
        programs = lines * -(-channels // block)
        splits = [s for s in (1, 4, 8, 16, 32, 64) if s == 1 or (programs < 1500 and length >= 32 * s)]
        found += [Plan(block, unroll, s, registers=registers) for s in splits]
    return found + [Plan(p.block, p.unroll, p.segments, True, p.registers) for p in found if p.registers is None]


def variant(plan: Plan) -> Plan:
    """What of a plan makes another binary; the rest is arguments. Two segments stand for any number of them."""
    return Plan(plan.block, plan.unroll, min(plan.segments, 2), plan.half_sums, plan.registers)


def compile_variant(job: tuple) -> str | None:
    """Runs one plan once, at batch 1, in a process of its own; the binary stays in Triton's cache."""
    direction, plan, side, channels, dtype, padded = job
    tensors = inputs(1, side, channels, getattr(torch, dtype), "cuda", padded)
    try:
        for name, function in calls(triton_backend, tensors, plan=plan).items():
            if (name == "backward") == (direction == "backward"):
                function()
        torch.cuda.synchronize()
    except Exception as error:  # too many registers or too little shared memory: a plan that cannot be
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def sweep(options: argparse.Namespace) -> list[dict]:
    rows = []
    cuda = not options.smoke
    device = torch.device("cuda" if cuda else "cpu")
    for dtype, (_, side, channels) in itertools.product(options.dtypes, stages(options.model, options.smoke)):
        for direction in ("forward", "backward"):
            wanted = {b: plans(direction, 4 * b, side * side, channels, options.smoke) for b in options.batches}
            if cuda:
                variants = dict.fromkeys(variant(p) for some in wanted.values() for p in some)
                jobs = [(direction, p, side, channels, dtype, options.padded) for p in variants]
                start = time.perf_counter()
                with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1, 16)) as pool:
                    failed = {
                        job[1]: why for job, why in zip(jobs, pool.map(compile_variant, jobs, 1), strict=True) if why
                    }
                print(
                    f"compiled {len(jobs)} variants in {time.perf_counter() - start:.0f} s, {len(failed)} failed",
                    flush=True,
                )
                wanted = {b: [p for p in some if variant(p) not in failed] for b, some in wanted.items()}
            for batch, some in wanted.items():
                tensors = inputs(batch, side, channels, getattr(torch, dtype), device.type, options.padded)
                choose = forward_plan if direction == "forward" else backward_plan
                chosen = choose(4 * batch, side * side, channels, N, device)
                timed = {}
                for plan in dict.fromkeys([chosen, *some]):
                    function = calls(triton_backend, tensors, plan=plan)[direction]
                    timed[plan] = milliseconds(function, options.rounds, cuda)
                    rows.append(
                        {"direction": direction, "side": side, "channels": channels, "batch": batch, "dtype": dtype}
                        | {"plan": vars(plan), "ms": timed[plan], "chosen": plan == chosen}
                    )
                exact = [p for p in timed if not p.half_sums]
                best = sorted(exact, key=lambda p: timed[p])[:3]
                print(
                    f"{direction} {side}x{side}x{channels}, {batch} x {dtype}: chosen {timed[chosen]:.3f} ms {chosen}"
                )
                for plan in best:
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
    (folder / name).write_text(json.dumps(about | results, indent=1))


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
    names = ["torch", "triton"] if options.smoke else ["triton", "mamba_ssm"]
    backends = {}
    for name in names:
        reason = load_backend(name).unavailable()
        if reason:
            print(f"without {name}: {reason}")
        else:
            backends[name] = load_backend(name)
    if options.sweep:
        if "triton" not in backends:
            sys.exit("the sweep needs the Triton backend; on a CPU set TRITON_INTERPRET=1")
        sweep(options)
    else:
        save(options, {"rows": table(options, backends)})


if __name__ == "__main__":
    main()
