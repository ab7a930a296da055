"""Speed and memory on an NVIDIA GPU, beside timm's models and the mamba_ssm scan measured in the same run.

    python benchmarks/gpu.py [--models tiny small base] [--parts inference training latency pixels] [--json FILE]
    python benchmarks/gpu.py --smoke          its code on the CPU with the nano model; the figures mean nothing

Every figure is the median of many runs. A ratio compares like with like: eager with eager, compiled with compiled.
bfloat16 is autocast over float32 weights. "published style" is our model with mamba_ssm's scan over sequences unfolded
in float32; it needs selective_scan_cuda (requirements-cuda.txt). The peers need timm (pip install timm torchvision).
What is missing is left out, which the output says. The share of the roofline is that of H100_IMAGES below, on an H100.
The JSON file is written after every figure, so a run that is cut off keeps what it has.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import medmamba
from medmamba.kernels import available_backends, mamba_ssm_backend

PEERS = ("resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224")
PUBLISHED = "published style"
# Images per second at 224x224 that an H100 could reach at best: tensor cores at half their peak, six fused kernels per
# block at full memory bandwidth and the scan at its balanced rate, one after the other; training about 3.4 times that.
H100_IMAGES = {"tiny": (20500, 6000), "small": (16400, 4800), "base": (9500, 2800)}


class Bench:
    """What is measured on, how long, and the rows collected."""

    def __init__(self, smoke: bool, rounds: int, json_file: str | None):
        self.device = torch.device("cpu" if smoke else "cuda")
        self.smoke, self.rounds, self.json_file = smoke, rounds, json_file
        self.about: dict = {}
        self.rows: list[dict] = []

    def milliseconds(self, function: Callable[[], object]) -> float:
        """Median duration of one call, by events on the stream, so that the launch overhead counts where it shows."""
        for _ in range(1 if self.smoke else 5):
            function()
        if self.smoke:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        times = []
        for _ in range(self.rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    @contextlib.contextmanager
    def peak_memory(self) -> Iterator[dict]:
        """Fills in "memory_gib", the most that tensors took, once the block is left."""
        result: dict = {}
        if not self.smoke:
            torch.cuda.reset_peak_memory_stats()
        yield result
        result["memory_gib"] = 0.0 if self.smoke else torch.cuda.max_memory_allocated() / 2**30

    def images(self, batch: int, size: int) -> torch.Tensor:
        return torch.randn(batch, 3, size, size, device=self.device)

    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def compiled(self, model: nn.Module, **options) -> nn.Module:
        torch.compiler.reset()
        return torch.compile(model, backend="aot_eager") if self.smoke else torch.compile(model, **options)  # type: ignore

    def add(self, **row) -> None:
        row["dtype"] = str(row["dtype"]).removeprefix("torch.")
        self.rows.append(row)
        figures = [f"{row['part']:<9} {row['model']:<29} {row['mode']:<15} {row['batch']:>4} {row['size']:>4}"]
        figures.append(f"{row['dtype']:<8} {row['ms']:>9.2f} ms {row['images_per_s']:>8.0f} img/s")
        figures.append(f"{row['memory_gib']:>6.2f} GiB" if "memory_gib" in row else "")
        print("  ".join(figures), flush=True)
        self.save()

    def save(self) -> None:
        if self.json_file:
            with open(self.json_file, "w", encoding="utf-8") as file:
                json.dump({"machine": self.about, "rows": self.rows}, file, indent=1)

    def free(self) -> None:
        gc.collect()
        if not self.smoke:
            torch.cuda.empty_cache()


def build(name: str, bench: Bench, train: bool) -> nn.Module:
    """One of our variants, optionally as "<variant>, published style", or one of timm's models."""
    if name in PEERS:
        import timm

        return timm.create_model(name, num_classes=8).to(bench.device).train(train)
    variant, _, style = name.partition(", ")
    model = medmamba.create_model(variant, num_classes=8).to(bench.device).train(train)
    if style:
        model.set_scan_backend("mamba_ssm")
        return model
    return model if train else model.fuse()


def inference(bench: Bench, name: str, batch: int, dtype: torch.dtype, size: int, modes: dict) -> None:
    model, images = build(name, bench, train=False), bench.images(batch, size)
    for mode, options in modes.items():
        network = model if options is None else bench.compiled(model, **options)
        with torch.inference_mode(), bench.autocast(dtype), bench.peak_memory() as peak:
            ms = bench.milliseconds(lambda: network(images))  # noqa: B023
        bench.add(
            part="inference", model=name, mode=mode, batch=batch, size=size, dtype=dtype, ms=ms,
            images_per_s=1e3 * batch / ms, **peak,
        )  # fmt: skip


def training(bench: Bench, name: str, batch: int, dtype: torch.dtype, size: int, mode: str, options, part: str) -> None:
    """Forward, backward and AdamW; the peak memory is that of the whole step."""
    model, images = build(name, bench, train=True), bench.images(batch, size)
    target = torch.randint(0, 8, (batch,), device=bench.device)
    optimiser = torch.optim.AdamW(model.parameters(), fused=not bench.smoke)
    network = model if options is None else bench.compiled(model, **options)

    def step() -> None:
        with bench.autocast(dtype):
            loss = F.cross_entropy(network(images), target)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    try:
        with bench.peak_memory() as peak:
            ms = bench.milliseconds(step)
    except torch.OutOfMemoryError:
        print(f"{part:<9} {name:<29} {mode:<15} {batch:>4} {size:>4}  out of memory")
        return
    bench.add(
        part=part,
        model=name,
        mode=mode,
        batch=batch,
        size=size,
        dtype=dtype,
        ms=ms,
        images_per_s=1e3 * batch / ms,
        **peak,
    )


def latency(bench: Bench, name: str, dtype: torch.dtype, size: int) -> None:
    """One image without launch overhead: compiled with CUDA graphs, and the eager model captured in one by hand."""
    inference(bench, name, 1, dtype, size, {"reduce-overhead": {"mode": "reduce-overhead"}})
    if bench.smoke:
        return
    model, images = build(name, bench, train=False), bench.images(1, size)
    with torch.inference_mode(), bench.autocast(dtype):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
    ms = bench.milliseconds(graph.replay)
    bench.add(
        part="inference", model=name, mode="CUDA graph", batch=1, size=size, dtype=dtype, ms=ms, images_per_s=1e3 / ms
    )


def ratios(rows: list[dict], device: str) -> None:
    """Adds to each row of ours its ratio to every other model in the same setting, and its share of the roofline."""
    setting = ("part", "mode", "batch", "size", "dtype")
    for row in rows:
        if row["model"] not in H100_IMAGES and row["model"] != "nano":
            continue
        others = [r for r in rows if all(r[k] == row[k] for k in setting) and r["model"] != row["model"]]
        row["ratio"] = {r["model"]: row["images_per_s"] / r["images_per_s"] for r in others if r["model"] in PEERS}
        for other in others:
            if other["model"] == f"{row['model']}, {PUBLISHED}":
                row["ratio"][PUBLISHED] = row["images_per_s"] / other["images_per_s"]
        if "H100" in device and row["part"] != "pixels" and row["model"] in H100_IMAGES:
            row["roofline"] = row["images_per_s"] / H100_IMAGES[row["model"]][row["part"] == "training"]


def print_table(rows: list[dict]) -> None:
    names = [*(p.split("_patch")[0] for p in PEERS), PUBLISHED]
    print(
        "\n| | model | mode | batch | pixels | precision | img/s | ms | GiB | "
        + " | ".join(f"x {n}" for n in names)
        + " | roofline |"
    )
    print("|" + "---|" * (len(names) + 10))
    for row in rows:
        ratio = row.get("ratio", {})
        cells = [row["part"], row["model"], row["mode"], row["batch"], row["size"], row["dtype"]]
        cells += [f"{row['images_per_s']:.0f}", f"{row['ms']:.2f}", f"{row.get('memory_gib', 0):.2f}"]
        cells += [f"{ratio[n]:.2f}" if n in ratio else "" for n in (*PEERS, PUBLISHED)]
        cells.append(f"{row['roofline']:.0%}" if "roofline" in row else "")
        print("| " + " | ".join(map(str, cells)) + " |")


def machine(bench: Bench) -> dict:
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "medmamba": medmamba.__version__}
    for package in ("triton", "timm"):
        with contextlib.suppress(Exception):
            versions[package] = __import__(package).__version__
    if bench.smoke:
        return {"device": "CPU (smoke test)", **versions}
    properties = torch.cuda.get_device_properties(0)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "device": properties.name, "capability": capability, "processors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30, **versions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--parts", nargs="+", default=["inference", "training", "latency", "pixels"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 128], help="of inference; training takes 64")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="run the code on the CPU, small")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("this measures a GPU and PyTorch finds none; --smoke runs the code on the CPU with the nano model")
    if args.smoke:
        args.models, args.batches, args.rounds, args.dtypes = ["nano"], [2], 1, ["bfloat16"]
    torch.manual_seed(0)
    bench = Bench(args.smoke, args.rounds, args.json)
    about = bench.about = machine(bench)
    print(", ".join(f"{k} {v}" for k, v in about.items()))

    others: list[str] = []
    if not args.no_peers:
        if "timm" in about:
            others += PEERS if not args.smoke else []
        else:
            print("no peers: timm cannot be imported here")
    reason = mamba_ssm_backend.unavailable()
    if reason is None:
        others += [f"{m}, {PUBLISHED}" for m in args.models]
    else:
        print(f"no published style: {reason}")
    about["scans"] = {name: why or "available" for name, why in available_backends().items()}

    size, train_batch = (64, 2) if args.smoke else (224, 64)
    modes: dict = {"eager": None} if args.no_compile else {"eager": None, "compiled": {}}
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for name in [*args.models, *others]:
            # mamba_ssm's scan runs eagerly only, as in the published code.
            usable = {"eager": None} if PUBLISHED in name else modes
            if "inference" in args.parts:
                for batch in args.batches:
                    inference(bench, name, batch, dtype, size, usable)
                    bench.free()
            if "training" in args.parts:
                for mode, options in usable.items():
                    training(bench, name, train_batch, dtype, size, mode, options, "training")
                    bench.free()
            if "latency" in args.parts and PUBLISHED not in name:
                latency(bench, name, dtype, size)
                bench.free()
    if "pixels" in args.parts:
        sizes, batch = ((64, 96), 1) if args.smoke else ((224, 448, 896), 8)
        for side in sizes:
            training(bench, args.models[0], batch, torch.bfloat16, side, "eager", None, "pixels")
            bench.free()
    ratios(bench.rows, about["device"])
    print_table(bench.rows)
    bench.save()


if __name__ == "__main__":
    main()
