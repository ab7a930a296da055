"""Answers of many threads against those of one: eager, as CUDA graphs, with gradients, in training, on two GPUs.

    python benchmarks/threads_gpu.py --out FILE                  on an NVIDIA GPU, in at most 150 s
    python benchmarks/threads_gpu.py --device cpu --out FILE     the same on a CPU, of smaller models

Eight threads, each on a CUDA stream of its own and as impatient as Python allows (a switch interval of a microsecond),
share a plain float32 `nano` and a fused bfloat16 `tiny`. Each answer is one batch of 1 to 4 images of 64 to 224 pixels,
and is compared with what one thread alone answers. "differ" counts those that differ by more than rounding (`limit`,
relative to the largest logit), "not the same bits" the others that are not equal. "apart" is how far the answers to
different images are from each other, in limits: what is confused would be seen. Compiled kernels are kept in a new
folder, so that the first calls, which compile, happen in threads too; `--kept` uses the usual one.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of the deterministic part; read when PyTorch loads

import torch
from torch import Tensor, nn

import medmamba
from medmamba.utils.text import json_text

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # of the largest logit; convolutions may run in TF32
PARTS = ("first use", "answers", "gradients", "training", "scan", "two gpus", "latency")
Run = Callable[[Tensor], Tensor]


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.gpu = args, args.device != "cpu"
        self.rows: list[dict[str, Any]] = []
        self.latency: list[dict[str, Any]] = []
        self.end = time.perf_counter() + args.seconds
        self.sizes = (64, 96, 128, 224) if self.gpu else (32, 48, 64)
        self.names = ("nano", "tiny") if self.gpu else ("test", "test")

    def models(self, device: str) -> dict[str, nn.Module]:
        """The plain and the fused one, with classifiers that tell images apart."""
        made = []
        for seed, name in enumerate(self.names):
            torch.manual_seed(seed)
            model = medmamba.create_model(name, num_classes=8).eval()
            nn.init.normal_(model.head.weight)
            made.append(model.to(device))
        return {
            f"plain {self.names[0]} float32": made[0],
            f"fused {self.names[1]} bfloat16": made[1].fuse(torch.bfloat16),
        }

    def inputs(self, device: str) -> list[Tensor]:
        found = []
        for size in self.sizes:
            for batch in (1, 2, 3, 4):
                generator = torch.Generator().manual_seed(1000 * size + batch)
                coarse = torch.randn(batch, 3, 8, 8, generator=generator)
                images = nn.functional.interpolate(coarse, size=(size, size)) * (0.5 + batch / 2)
                found.append((images + 0.3 * torch.randn(images.shape, generator=generator)).to(device))
        return found

    def row(self, what: str, pairs: list[tuple[Tensor, Tensor]], seconds: float, limit: float, apart: float) -> None:
        """Adds what came of (found, expected) pairs."""
        differ = other = 0
        worst = 0.0
        for found, expected in pairs:
            error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            error = error if error == error else float("inf")  # NaN
            worst = max(worst, error)
            differ += error > limit
            other += error <= limit and not torch.equal(found, expected)
        entry = dict(
            what=what, answers=len(pairs), differ=differ, other_bits=other, worst=worst, limit=limit, apart=apart,
            seconds=seconds,
        )  # fmt: skip
        self.rows.append(entry)
        print(
            f"{what:52} {len(pairs):>7} {differ:>7} {other:>10} {worst:>7.0e} {limit:>7.0e} {apart:>7.1f}",
            f"{seconds:>6.1f}",
            flush=True,
        )


def threads(count: int, device: str, work: Callable[[int], None]) -> float:
    """Runs work(0), work(1), ... at the same time, each on a stream of its own; the seconds that it took."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)
    cuda = device.startswith("cuda")

    def each(number: int) -> None:
        barrier.wait()
        try:
            with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else contextlib.nullcontext():
                work(number)
        except BaseException as error:
            errors.append(error)

    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    running = [threading.Thread(target=each, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if cuda:
        torch.cuda.synchronize(device)
    if errors:
        raise errors[0]
    return time.perf_counter() - start


def apart(expected: list[Tensor], limit: float) -> float:
    """The least distance between answers to different images of one size of batch, in limits."""
    found = [float("inf")]
    for i, a in enumerate(expected):
        for b in expected[i + 1 :]:
            if a.shape == b.shape:
                found.append(float((a.float() - b.float()).abs().max() / a.float().abs().max()))
    return min(found) / limit


@torch.inference_mode()
def alone(run: Run, inputs: list[Tensor]) -> list[Tensor]:
    found = [run(x).clone() for x in inputs]
    if inputs[0].is_cuda:
        torch.cuda.synchronize(inputs[0].device)
    return found


def compare(bench: Bench, what: str, device: str, run: Run, answers: int, seconds: float, first: bool = False) -> None:
    """Every thread asks for the inputs in an order of its own. `first`: one thread alone answers afterwards."""
    inputs, dtype = bench.inputs(device), torch.bfloat16 if "bfloat16" in what else torch.float32
    expected = [] if first else alone(run, inputs)
    count, end = bench.args.threads, time.perf_counter() + seconds
    found: list[list[tuple[int, Tensor]]] = [[] for _ in range(count)]

    @torch.inference_mode()
    def work(thread: int) -> None:
        for turn in range(answers // count):
            if time.perf_counter() > end:
                return
            number = (5 * turn + 7 * thread) % len(inputs)
            found[thread].append((number, run(inputs[number]).clone()))

    took = threads(count, device, work)
    expected = expected or alone(run, inputs)
    pairs = [(answer, expected[number]) for each in found for number, answer in each]
    bench.row(what, pairs, took, LIMITS[dtype], apart(expected, LIMITS[dtype]))


def shared_graphs(model: Any, inputs: list[Tensor]) -> Run:
    graphs = {tuple(x.shape): model.graphed(x) for x in inputs}
    return lambda x: graphs[tuple(x.shape)](x)


def answers(bench: Bench, device: str, label: str = "", share: float = 1.0) -> None:
    models, total = bench.models(device), int(bench.args.answers * share)
    runs: dict[str, Run] = dict(models)
    if bench.gpu:
        for name, model in models.items():
            if hasattr(model, "graphed"):
                runs[f"{name}, one graph for all threads"] = shared_graphs(model, bench.inputs(device))
    for i, (name, run) in enumerate(runs.items()):
        left = max(5.0, bench.end - time.perf_counter() - 30) * (1 if label else 0.8)
        compare(bench, label + name, device, run, -(-total // len(runs)), left / (len(runs) - i))


def gradients(bench: Bench, device: str) -> None:
    """Of the input, through one shared model."""
    model, inputs = next(iter(bench.models(device).values())), bench.inputs(device)
    model.requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(model(x)[:, 0].sum(), x)[0]

    expected = [run(x) for x in inputs]
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(bench.args.threads)]

    def work(thread: int) -> None:
        for turn in range(max(2, bench.args.answers // 800)):
            number = (3 * turn + 5 * thread) % len(inputs)
            found[thread].append((run(inputs[number]), expected[number]))

    took = threads(bench.args.threads, device, work)
    pairs = [pair for each in found for pair in each]
    bench.row("gradients of the input", pairs, took, 1e-2, apart(expected, 1e-2))


def training(bench: Bench, device: str) -> None:
    """A model for each thread, with images of its own; its weights after five steps, to the last bit.

    With deterministic algorithms: cuDNN's others add in any order, and five steps of so few images with batch norm
    multiply the last bit until one thread alone differs from itself by half.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    try:
        _training(bench, device)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


def _training(bench: Bench, device: str) -> None:
    torch.manual_seed(0)
    start = medmamba.create_model(bench.names[0], num_classes=8, drop_path_rate=0.0).to(device)

    def run(thread: int) -> Tensor:
        model = copy.deepcopy(start).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(thread)
        for _ in range(5):
            x = torch.randn(4, 3, bench.sizes[0], bench.sizes[0], generator=generator).to(device)
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(4, device=device)).backward()
            optimiser.step()
        return torch.cat(
            [(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
        ).detach()

    expected = [run(i) for i in range(bench.args.threads)]
    found: list[Any] = [None] * bench.args.threads
    took = threads(bench.args.threads, device, lambda thread: found.__setitem__(thread, run(thread)))
    bench.row(
        "weights after 5 steps, a model each",
        list(zip(found, expected, strict=True)),
        took,
        1e-12,
        apart(expected, 1e-12),
    )


def scan(bench: Bench, device: str) -> None:
    """`selective_scan` with one group of B and C, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def problem(length: int) -> list[Tensor]:
        shapes = (2, 64, length), (2, 64, length), (64, 16), (2, 16, length), (2, 16, length), (64,)
        tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
        tensors[2] = -tensors[2].exp()
        return [t.to(device) for t in tensors]

    problems = [problem(length) for length in (1, 16, 49, 196, 784, 49, 196)]

    def run(tensors: list[Tensor]) -> Tensor:
        tensors = [t.clone().requires_grad_() for t in tensors]
        y = medmamba.selective_scan(*tensors, delta_softplus=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), tensors)])

    found: list[list[tuple[int, Tensor]]] = [[] for _ in range(bench.args.threads)]

    def work(thread: int) -> None:
        for turn in range(max(2, bench.args.answers // 800)):
            number = (turn + thread) % len(problems)
            found[thread].append((number, run(problems[number])))

    took = threads(bench.args.threads, device, work)
    expected = [run(p) for p in problems]
    pairs = [(g, expected[number]) for each in found for number, g in each]
    bench.row("selective_scan, one group, forward and backward", pairs, took, 1e-4, apart(expected, 1e-4))


def two_gpus(bench: Bench) -> None:
    """Models on cuda:1 while cuda:0 is current, and then both at once, half of the threads each."""
    torch.cuda.set_device(0)
    answers(bench, "cuda:1", "cuda:1 while cuda:0 is current: ", 0.05)
    both = [(bench.models(f"cuda:{i}"), bench.inputs(f"cuda:{i}")) for i in (0, 1)]
    for name in both[0][0]:
        expected = [alone(models[name], inputs) for models, inputs in both]
        pairs: list[tuple[Tensor, Tensor]] = []

        @torch.inference_mode()
        def work(thread: int, name: str = name, expected: Any = expected, pairs: Any = pairs) -> None:
            models, inputs = both[thread % 2]
            with torch.cuda.stream(torch.cuda.Stream(f"cuda:{thread % 2}")):
                for turn in range(max(2, bench.args.answers // 800)):
                    number = (5 * turn + thread) % len(inputs)
                    pairs.append((models[name](inputs[number]), expected[thread % 2][number]))
                    if turn % 2:
                        torch.cuda.set_device(0)  # and the tensors are on 0 or 1

        took = threads(bench.args.threads, "cuda:0", work)
        torch.cuda.synchronize("cuda:1")
        limit = LIMITS[torch.bfloat16 if "bfloat16" in name else torch.float32]
        bench.row(f"both GPUs at once: {name}", pairs, took, limit, apart(expected[0], limit))


def latency(bench: Bench, device: str) -> None:
    """One image of 224x224, one thread, the GPU waited for after each; medians in microseconds."""
    image = torch.randn(1, 3, bench.sizes[-1], bench.sizes[-1], device=device)
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    runs: dict[str, Run] = {}
    for name, model in bench.models(device).items():
        runs[name] = model
        if bench.gpu and hasattr(model, "graphed"):
            runs[f"{name}, graph"] = model.graphed(image)  # type: ignore[operator]
    for name, run in runs.items():
        times = []
        with torch.inference_mode():
            for turn in range(420 if bench.gpu else 12):
                start = time.perf_counter()
                run(image)
                if bench.gpu:
                    torch.cuda.synchronize()
                if turn >= (20 if bench.gpu else 2):
                    times.append(1e6 * (time.perf_counter() - start))
        self = dict(what=name, median_us=statistics.median(times), p10_us=sorted(times)[len(times) // 10])
        bench.latency.append(self)
        print(f"latency, batch 1: {name:45} median {self['median_us']:8.1f} us, fastest tenth {self['p10_us']:8.1f} us")
    sys.setswitchinterval(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--answers", type=int, help="default 20000, on a CPU 480")
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kept", action="store_true", help="use kernels compiled before")
    args = parser.parse_args()
    args.answers = args.answers or (480 if args.device == "cpu" else 20_000)
    if not args.kept:
        folder = tempfile.TemporaryDirectory()
        os.environ["MEDMAMBA_CACHE"] = folder.name
    bench, device = Bench(args), args.device
    sys.setswitchinterval(1e-6)
    print(f"{'':52} answers  differ other bits   worst   limit   apart seconds")
    for part in args.parts:
        if part == "first use":
            for name, model in bench.models(device).items():
                compare(bench, f"first use: {name}", device, model, 4 * args.threads, 60, first=True)
        elif part == "two gpus":
            if bench.gpu and torch.cuda.device_count() > 1:
                two_gpus(bench)
            else:
                print("two gpus: there are none")
        else:
            dict(answers=answers, gradients=gradients, training=training, scan=scan, latency=latency)[part](
                bench, device
            )
        if args.out:
            name = torch.cuda.get_device_name(device) if bench.gpu else "CPU"
            about = dict(device=name, torch=torch.__version__, medmamba=medmamba.__version__, threads=args.threads)
            Path(args.out).write_text(json_text({**about, "rows": bench.rows, "latency": bench.latency}, indent=1))
    wrong, total = sum(row["differ"] for row in bench.rows), sum(row["answers"] for row in bench.rows)
    print(f"{wrong} of {total} differ beyond rounding")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
