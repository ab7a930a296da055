"""Where the time of a GPU goes: its kernels, by what they do. Used by gpu.py."""

import re
from collections.abc import Callable
from typing import Any

import torch

# The first that fits. Names are of PyTorch 2.8 to 2.11, cuDNN and cuBLAS; what none fits is "other".
KINDS = (
    ("scan", r"^scan_(forward|backward)|^sum_(parts|table)|selective_scan"),
    (
        "operations around the scan: norms, gates, depthwise, mixing",
        r"^conv_(forward|backward|input)$|^[a-z_]*(gate|norm|mix|silu)[a-z_]*$",
    ),
    ("batch norms of the convolution branch", r"^(batch_[a-z_]*|add_partials|relu_gradient)$"),
    ("optimiser", r"multi_tensor_apply|adam|foreach|lp_norm"),
    ("convolutions and matrix products", r"gemm|nvjet|cutlass|xmma|convolve|conv2d|cudnn|wgrad|dgrad|splitK|cublas"),
    ("norms of PyTorch", r"layer_norm|LayerNorm|GammaBeta|batch_norm|batchnorm|Welford"),
    ("fused by torch.compile", r"^triton_"),
    ("PyTorch reductions", r"reduce_kernel"),
    ("copies and conversions", r"copy|Memcpy|CatArray|Memset|FillFunctor"),
    ("other elementwise kernels", r"elementwise"),
)


def kind_of(kernel: str) -> str:
    return next((title for title, pattern in KINDS if re.search(pattern, kernel)), "other")


def profile(run: Callable[[], object], rounds: int = 5) -> dict[str, Any]:
    """Milliseconds on the GPU and kernels of one `run`, in all and by kind, and the ten kernels that take most."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    run()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    kinds: dict[str, list[float]] = {}
    kernels = []
    for event in found.key_averages():
        total = event.self_device_time_total / 1e3 / rounds
        if total <= 0 or event.key.startswith(("Optimizer.", "ProfilerStep", "Activity Buffer")):
            continue
        row = kinds.setdefault(kind_of(event.key), [0.0, 0.0])
        row[0] += total
        row[1] += event.count / rounds
        kernels.append((total, event.count / rounds, event.key[:160]))
    return {
        "ms": sum(row[0] for row in kinds.values()),
        "kernels": sum(row[1] for row in kinds.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1][0])),
        "longest": sorted(kernels, reverse=True)[:25],
    }
