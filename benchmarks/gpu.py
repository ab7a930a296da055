"""Speed and memory on an NVIDIA GPU, beside timm's models and the published design, measured in the same run.

    python benchmarks/gpu.py [--parts inference latency training pixels profile] [--models tiny small base]
        [--peers resnet50 convnext_tiny] --json FILE
    python benchmarks/gpu.py --smoke          its code on the CPU with small models; the figures mean nothing
    python benchmarks/gpu_report.py FILE      writes the tables and the plot of docs/performance.md

Every figure is the median of many runs at 224x224, timed by events. Precision: "bfloat16" has weights and activations
in bfloat16 (ours by `fuse(torch.bfloat16)`, timm's in channels_last), "autocast" is bfloat16 autocast over float32
weights, which training always is. Modes: "eager"; "graph", one CUDA graph per step; "compile",
`torch.compile(fullgraph=True, mode="reduce-overhead")`, for ours alone. Ratios compare like with like. "published" is
our model with mamba_ssm's scan over sequences unfolded in float32, as the published code has it; it needs
selective_scan_cuda (requirements-cuda.txt). The peers need timm; "mambavision_t" and "vmamba_t" also need
selective_scan_cuda or VMamba's selective_scan_cuda_oflex, and PYTHONPATH with the package `mambavision` of
NVlabs/MambaVision or the folder classification/models of MzeroMiko/VMamba. What is missing is left out, which the
output says. "profile" says where the time of the GPU goes. The JSON file is written after every figure.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_profile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import medmamba
from medmamba.kernels.backends import mamba_ssm as mamba_ssm_backend
from medmamba.kernels.cuda import graph_capture
from medmamba.training.graphed_step import GraphedStep
from medmamba.utils.text import json_text

PEERS = ("resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224", "mambavision_t", "vmamba_t")
OURS = ("nano", "tiny", "small", "base", "test")
PUBLISHED = ", published"
# Images per second at 224x224 that an H100 could reach at best: tensor cores at half their peak, six fused kernels per
# block at full memory bandwidth and the scan at its balanced rate, one after the other; training about 3.4 times that.
H100_IMAGES = {"tiny": (20500, 6000), "small": (16400, 4800), "base": (9500, 2800)}


class Bench:
    """What is measured on, how often, and the rows collected."""

    def __init__(self, smoke: bool, rounds: int, json_file: str | None):
        self.device = torch.device("cpu" if smoke else "cuda")
        self.smoke, self.rounds, self.json_file = smoke, rounds, json_file
        self.about: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.profiles: dict[str, Any] = {}

    def milliseconds(self, function: Callable[[], object]) -> float:
        for _ in range(1 if self.smoke else 8):
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

    def forget_peak(self) -> None:
        if not self.smoke:
            torch.cuda.reset_peak_memory_stats()

    def measure(self, function: Callable[[], object], **row: Any) -> None:
        """Adds a row: the median duration of one call, and the most memory that tensors took since `forget_peak`."""
        try:
            row["ms"] = self.milliseconds(function)
            if not self.smoke:
                row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            row["ms"] = float("nan")
        row["images_per_s"] = 1e3 * row["batch"] / row["ms"]
        self.rows.append(row)
        label = f"{row['part']:<9} {row['model']:<28} {row['precision']:<8} {row['mode']:<7} {row['batch']:>4}"
        memory = f"{row['memory_gib']:6.2f} GiB" if "memory_gib" in row else ""
        print(f"{label} {row['size']:>4} {row['ms']:9.3f} ms {row['images_per_s']:8.0f} img/s {memory}", flush=True)
        self.save()

    def profile(self, label: str, function: Callable[[], object]) -> None:
        if self.smoke:
            function()
            return
        found = self.profiles[label] = gpu_profile.profile(function)
        print(f"{label}: {found['ms']:.2f} ms, {found['kernels']:.0f} kernels")
        for title, (ms, count) in found["kinds"].items():
            print(f"  {ms:8.3f} ms {count:6.0f} x {title}", flush=True)
        for ms, count, name in found["longest"]:
            print(f"      {ms:8.3f} ms {count:6.0f} x {name}", flush=True)
        self.save()

    def save(self) -> None:
        if self.json_file:
            with open(self.json_file, "w", encoding="utf-8") as file:
                file.write(json_text({"machine": self.about, "rows": self.rows, "profiles": self.profiles}, indent=1))

    def images(self, batch: int, size: int) -> Tensor:
        images = torch.randn(batch, 3, size, size, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def autocast(self, precision: str) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "autocast")


def build(name: str, bench: Bench, precision: str, train: bool) -> nn.Module:
    """One of our variants, optionally as "<variant>, published", or one of timm's models, in the best form for that."""
    variant, _, published = name.partition(", ")
    if variant in OURS:
        model: Any = medmamba.create_model(variant, num_classes=8).to(bench.device).train(train)
        if published and not bench.smoke:
            model.set_scan_backend("mamba_ssm")
        if train or published:
            return model
        return model.fuse(torch.bfloat16 if precision == "bfloat16" else None)
    model = peer(name).to(bench.device).train(train)
    if name != "vmamba_t":  # its norms and scans take channels first
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.bfloat16() if precision == "bfloat16" else model


def peer(name: str) -> nn.Module:
    """Raises ImportError where it is not installed."""
    if name == "mambavision_t":
        from mambavision.models.mamba_vision import mamba_vision_T  # type: ignore[import-not-found]

        return mamba_vision_T(num_classes=8)
    if name == "vmamba_t":
        from vmamba import vmamba_tiny_s1l8  # type: ignore[import-not-found]

        return vmamba_tiny_s1l8()
    import timm

    return timm.create_model(name, num_classes=8)


def infer(bench: Bench, part: str, name: str, batch: int, precision: str, modes: list[str], size: int) -> None:
    free(bench)
    model, images = build(name, bench, precision, train=False), bench.images(batch, size)
    if precision == "bfloat16":
        images = images.bfloat16()
    common = dict(part=part, model=name, batch=batch, precision=precision, size=size)

    def run() -> Tensor:
        with torch.inference_mode(), bench.autocast(precision):
            return model(images)

    for mode in modes:
        bench.forget_peak()
        call: Callable[[], object] = run
        if mode == "graph" and not bench.smoke:
            call = captured(run).replay
        if part == "profile":
            bench.profile(f"{name}, inference, batch {batch}", call)
        else:
            bench.measure(call, mode=mode, **common)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    device, graph = torch.device("cuda", torch.cuda.current_device()), torch.cuda.CUDAGraph()
    graph_capture.warm_up(device, run)
    graph_capture.record(graph, device, run)
    return graph


def train(bench: Bench, part: str, name: str, batch: int, mode: str, size: int) -> None:
    """Forward, backward and AdamW; the memory is that of a whole step, of a graph also what its capture takes."""
    free(bench)
    bench.forget_peak()
    model = build(name, bench, "autocast", train=True)
    images, targets = bench.images(batch, size), torch.randint(0, 8, (batch,), device=bench.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not bench.smoke)
    network: nn.Module = model
    if mode == "compile":
        options = {"backend": "aot_eager"} if bench.smoke else {"mode": "reduce-overhead"}
        network = torch.compile(model, fullgraph=True, **options)  # type: ignore[assignment,call-overload]

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=mode != "graph"):
            return F.cross_entropy(network(images), targets)

    step = None
    try:
        if mode == "graph" and not bench.smoke:
            loss(images, targets).backward()
            optimiser.step()  # its averages are there when the graph is captured, as far as memory goes
            optimiser.zero_grad()
            step = GraphedStep(model, loss, images, targets)
    except torch.OutOfMemoryError:
        print(f"{part} {name} {batch} {size}: out of memory")
        return

    def run() -> None:
        if step:
            step(images, targets)
        else:
            loss(images, targets).backward()
        optimiser.step()
        if not step:
            optimiser.zero_grad()

    if part == "profile":
        bench.profile(f"{name}, training, batch {batch}, {mode}", run)
    else:
        bench.measure(run, part=part, model=name, batch=batch, precision="autocast", mode=mode, size=size)


def found_peers(names: list[str]) -> tuple[str, ...]:
    """Returns those of the peers that can be built here, and prints why the others cannot."""
    found = []
    for name in names:
        try:
            peer(name)
            found.append(name)
        except Exception as error:  # whatever goes wrong in the code of others
            print(f"without {name}: {type(error).__name__}: {error}")
    return tuple(found)


def attempt(name: str, measure: Callable[..., None], *arguments: Any) -> None:
    """Measures; a peer that cannot run in this precision or mode is left out, and the output says why."""
    try:
        measure(*arguments)
    except Exception as error:
        if name not in PEERS:
            raise
        print(f"{name} {arguments[2:]} does not run: {type(error).__name__}: {str(error)[:300]}", flush=True)


def free(bench: Bench) -> None:
    """What was measured before is gone: models hold themselves in circles, so that it takes a search."""
    torch._dynamo.reset()
    gc.collect()
    if not bench.smoke:
        torch.cuda.empty_cache()


# --- what is measured -----------------------------------------------------------------------------------------------


def everything(bench: Bench, args: argparse.Namespace, published: bool, peers: tuple[str, ...]) -> None:
    size, large, small = (64, 2, 2) if bench.smoke else (224, 128, 64)
    old = [f"{name}{PUBLISHED}" for name in args.models] if published else []
    if "inference" in args.parts:
        for name in (*args.models, *peers):
            attempt(name, infer, bench, "inference", name, large, "bfloat16", ["eager", "graph"], size)
        for name in (*old, *peers):
            modes = ["eager", "graph"] if name in PEERS else ["eager"]
            attempt(name, infer, bench, "inference", name, large, "autocast", modes, size)
        infer(bench, "inference", args.models[0], large, "float32", ["eager"], size)
    if "latency" in args.parts:
        for name in (args.models[0], *peers):
            attempt(name, infer, bench, "latency", name, 1, "bfloat16", ["eager", "graph"], size)
        for name in old[:1]:
            infer(bench, "latency", name, 1, "autocast", ["eager"], size)
    if "training" in args.parts:
        for name in (*args.models, *peers):
            for mode in ("eager", "graph") if name in (args.models[0], *peers) else ("graph",):
                attempt(name, train, bench, "training", name, small, mode, size)
        for name in old[:1]:
            train(bench, "training", name, small, "eager", size)
        if not args.no_compile:
            train(bench, "training", args.models[0], small, "compile", size)
    if "pixels" in args.parts:
        for side in (64, 96) if bench.smoke else (224, 448, 896):
            infer(bench, "pixels", args.models[0], 2 if bench.smoke else 8, "bfloat16", ["graph"], side)
            train(bench, "pixels", args.models[0], 2 if bench.smoke else 8, "graph", side)
    if "profile" in args.parts:
        infer(bench, "profile", args.models[0], large, "bfloat16", ["eager"], size)
        train(bench, "profile", args.models[0], small, "graph", size)
        if "training" in args.parts and not args.no_compile:  # else there is little compiled yet
            train(bench, "profile", args.models[0], small, "compile", size)


def ratios(rows: list[dict[str, Any]], device: str) -> None:
    """Adds to each row of ours its ratio to each other model at the same task, and its share of the roofline. Against
    peers in the same mode, or for `compile` in "graph", and the same precision; the published design is eager only."""
    for row in rows:
        if row["model"] not in OURS or row["part"] == "pixels":
            continue
        mode = {"compile": "graph"}.get(row["mode"], row["mode"])
        found = {}
        for other in rows:
            same = all(other[key] == row[key] for key in ("part", "batch", "size"))
            if same and other["model"] in PEERS and (other["mode"], other["precision"]) == (mode, row["precision"]):
                found[other["model"]] = row["images_per_s"] / other["images_per_s"]
            elif same and other["model"] == row["model"] + PUBLISHED:
                found["published"] = row["images_per_s"] / other["images_per_s"]
        row["ratio"] = found
        if "H100" in device and row["model"] in H100_IMAGES and row["part"] in ("inference", "training"):
            row["roofline"] = row["images_per_s"] / H100_IMAGES[row["model"]][row["part"] == "training"]


def print_table(rows: list[dict[str, Any]]) -> None:
    names = (*PEERS, "published")
    titles = " | ".join(f"x {name.split('_patch')[0]}" for name in names)
    print(f"\n| | model | precision | mode | batch | pixels | img/s | ms | GiB | {titles} | roofline |")
    print("|" + "---|" * (len(names) + 10))
    for row in rows:
        ratio = row.get("ratio", {})
        cells = [row[key] for key in ("part", "model", "precision", "mode", "batch", "size")]
        cells += [f"{row['images_per_s']:.0f}", f"{row['ms']:.2f}", f"{row.get('memory_gib', 0):.2f}"]
        cells += [f"{ratio[name]:.2f}" if name in ratio else "" for name in names]
        cells.append(f"{row['roofline']:.0%}" if "roofline" in row else "")
        print("| " + " | ".join(map(str, cells)) + " |")


def machine(bench: Bench) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "medmamba": medmamba.__version__}
    with contextlib.suppress(Exception):  # timm needs a torchvision that fits
        versions["timm"] = __import__("timm").__version__
    if bench.smoke:
        return {"device": "CPU (smoke test)", **versions}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "memory_gib": properties.total_memory / 2**30, **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["inference", "latency", "training", "pixels", "profile"])
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--smoke", action="store_true", help="run the code on the CPU, small")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        sys.exit("this measures a GPU and PyTorch finds none; --smoke runs the code on the CPU")
    if args.smoke:
        args.models, args.rounds = ["test"], 1
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # the fastest algorithms, for every model alike
    bench = Bench(args.smoke, args.rounds, args.json)
    bench.about = machine(bench)
    print(", ".join(f"{key} {value}" for key, value in bench.about.items()))
    peers = () if args.no_peers or args.smoke else found_peers(args.peers)
    if reason := mamba_ssm_backend.BACKEND.why_not():
        print(f"without the published design: {reason}")
    everything(bench, args, args.smoke or reason is None, peers)
    ratios(bench.rows, bench.about["device"])
    print_table(bench.rows)
    bench.save()


if __name__ == "__main__":
    main()
