"""Speed and memory of the one-dimensional scan on an NVIDIA GPU, beside mamba_ssm's own CUDA kernel.

    python benchmarks/scan_1d_gpu.py --json FILE [--dtypes bfloat16 float32]
    python benchmarks/scan_1d_gpu.py --smoke      its code on the CPU; the figures mean nothing

The shapes are those of a Mamba language model and of VMamba's four stages, whose four directions are four groups of
channels. "forward" runs without gradients, "backward" computes those of all inputs, "memory" is the most that tensors
take in a forward and backward pass beside inputs and gradients. "mamba_ssm" calls its extension selective_scan_cuda
(requirements-cuda.txt) as its selective_scan_fn does, in the dtype of the inputs; "error" is the largest difference of
the outputs over the largest output.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from scan_gpu import milliseconds
from torch import Tensor
from torch.autograd.function import Function

import medmamba
from medmamba.utils.text import json_text

SHAPES = {  # batch, channels, length, states, groups
    "Mamba": (8, 1536, 2048, 16, 1),
    "VMamba 56x56": (64, 384, 3136, 16, 4),
    "VMamba 28x28": (64, 768, 784, 16, 4),
    "VMamba 14x14": (64, 1536, 196, 16, 4),
    "VMamba 7x7": (64, 3072, 49, 16, 4),
    "VMamba 56x56, one state": (64, 384, 3136, 1, 4),
    "VMamba 14x14, one state": (64, 1536, 196, 1, 4),
}
SMOKE = {"small": (2, 8, 40, 4, 2)}


class Peer(Function):
    """mamba_ssm's selective_scan_fn without its Python around the extension."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias):
        y, saved = importlib.import_module("selective_scan_cuda").fwd(u, delta, A, B, C, D, None, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        u, delta, A, B, C, D, bias, saved = ctx.saved_tensors
        tensors = u, delta, A, B, C, D, None, bias, dy.contiguous(), saved, None, None
        du, ddelta, dA, dB, dC, dD, dbias = importlib.import_module("selective_scan_cuda").bwd(*tensors, True, False)
        return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dbias


def ours(backend: str | None) -> Callable[..., Tensor]:
    def scan(u, delta, A, B, C, D, bias):
        return medmamba.selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)

    return scan


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    batch, channels, length, states, groups = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    A = -torch.arange(1.0, states + 1, device=device).expand(channels, states).contiguous()
    B, C = (randn(batch, groups, states, length).to(dtype) for _ in range(2))
    u, delta = (randn(batch, channels, length).to(dtype) for _ in range(2))
    return [u, delta, A, B, C, randn(channels), randn(channels) - 3]


def measure(scan: Callable[..., Tensor], tensors: list[Tensor], rounds: int) -> dict[str, float]:
    cuda = tensors[0].is_cuda
    with torch.no_grad():
        row = {"forward": milliseconds(lambda: scan(*tensors), rounds, cuda)}
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = scan(*leaves)
    dy = torch.randn_like(y)

    def backward(y: Tensor = y) -> None:
        torch.autograd.grad(y, leaves, dy, retain_graph=True)

    row["backward"] = milliseconds(backward, rounds, cuda)
    del y, backward
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(scan(*leaves), leaves, dy)
        kept = sum(g.numel() * g.element_size() for g in gradients)
        row["memory"] = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--backends", nargs="+", default=["cuda"], help="of medmamba")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("this measures a GPU and PyTorch finds none; --smoke runs the code on the CPU")
    scans = {"medmamba torch": ours("torch")} if options.smoke else {f"medmamba {b}": ours(b) for b in options.backends}
    if not options.smoke and importlib.util.find_spec("selective_scan_cuda"):
        scans["mamba_ssm"] = Peer.apply
    elif not options.smoke:
        print("without mamba_ssm: the extension selective_scan_cuda is not installed (requirements-cuda.txt)")
    device = "cpu" if options.smoke else "cuda"
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for label, shape in (SMOKE if options.smoke else SHAPES).items():
            tensors = inputs(shape, getattr(torch, dtype), device)
            outputs = {}
            for name, scan in scans.items():
                with torch.no_grad():
                    outputs[name] = scan(*tensors).float()
                row: dict[str, Any] = {"shape": label, "sizes": shape, "dtype": dtype, "scan": name}
                row |= measure(scan, tensors, options.rounds)
                first = next(iter(outputs.values()))
                row["error"] = float((outputs[name] - first).abs().max() / first.abs().max())
                rows.append(row)
                memory = f"{row['memory']:8.0f} MiB" if "memory" in row else ""
                figures = f"forward {row['forward']:8.3f} ms, backward {row['backward']:8.3f} ms"
                print(f"{label:<24} {dtype:>8} {name:<16} {figures} {memory} error {row['error']:.1e}", flush=True)
                if options.json:
                    card = "CPU" if options.smoke else torch.cuda.get_device_name()
                    with open(options.json, "w", encoding="utf-8") as file:
                        file.write(json_text({"torch": torch.__version__, "device": card, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
