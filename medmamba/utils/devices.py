"""Selects device and precision through accelerate, without changing the caller's own accelerate state."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SWAPPING = threading.RLock()


def pick_device(name: str) -> torch.device:
    """Returns the torch device of that name; "auto" selects a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"cannot use device {name!r}: {str(error).splitlines()[0]}; `medmamba doctor` shows what there is"
        ) from error
    return device


def pick_devices(names: str) -> list[torch.device]:
    """Returns the devices of a comma-separated list of names; "all" selects every NVIDIA GPU, else as `pick_device`.

    Raises:
        ValueError: there is no such device.
    """
    if names == "all" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [pick_device("auto" if name == "all" else name.strip()) for name in names.split(",")]


def make_accelerator(device: str = "auto", precision: str = "auto") -> Accelerator:
    """Returns an `Accelerator` with its own state, which also works under `accelerate launch` and `torchrun`.

    accelerate keeps one state per process, which all its objects share and which refuses another precision. This one is
    made aside: an `Accelerator` that the caller has, or makes later, keeps its precision, device and gradient
    accumulation. Its methods and `is_main_process` read the shared state: use `owning` around `prepare`, `autocast` of
    this module, and `process_index`, or call them only where there are several processes.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "mps".
        precision: "fp32", "bf16" or "fp16" (matrix products and convolutions; the scan stays float32), or "auto":
            bf16 on GPUs that have it, else fp32.

    Raises:
        ImportError: accelerate is missing.
        ValueError: no such device or precision here.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
    except ImportError as error:
        raise ImportError('this needs accelerate: pip install "medmamba[train]"') from error
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}; got {precision!r}")
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {device!r}; pick a GPU by CUDA_VISIBLE_DEVICES=1")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise ValueError(f"no device {device!r} here; `medmamba doctor` shows what there is")
    if precision == "auto":
        on_gpu = device != "cpu" and there["cuda"]
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # No weight is used twice in a forward pass, and casts that are kept do not go together with CUDA graphs.
    cast = AutocastKwargs(cache_enabled=False)
    with _swapped({}):
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=PRECISIONS[precision],
            kwargs_handlers=[ddp, cast],
            gradient_accumulation_steps=1,
        )


@contextlib.contextmanager
def owning(accelerator: Accelerator) -> Iterator[None]:
    """Puts the state of `accelerator` in the place that accelerate looks at, for the time of the block.

    `prepare` needs it. Other threads that use accelerate meanwhile see that state, so keep the block short.
    """
    with _swapped({"AcceleratorState": accelerator.state, "GradientState": accelerator.gradient_state}):
        yield


def autocast(accelerator: Accelerator, enabled: bool = True) -> contextlib.AbstractContextManager:
    """Returns what `accelerator.autocast()` does, by its own precision and not by that of the process."""
    dtype = _DTYPES.get(accelerator.mixed_precision)
    if dtype is None or not enabled:
        return contextlib.nullcontext()
    return torch.autocast(accelerator.device.type, dtype, cache_enabled=False)


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Waits for the other processes, where there are any; accelerate's own would make a state where there is none."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()


@contextlib.contextmanager
def _swapped(objects: dict[str, Any]) -> Iterator[None]:
    """Gives accelerate's state classes other dictionaries: those of `objects`, by name of the class, else empty ones.

    The state of the processes themselves is left where it is once they are connected: it is the same for all.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with _SWAPPING:
        classes = [AcceleratorState, GradientState]
        if not torch.distributed.is_initialized():
            classes.append(PartialState)
        before = [(kind, kind._shared_state) for kind in classes]
        try:
            for kind in classes:
                own = objects.get(kind.__name__)
                kind._shared_state = {} if own is None else own.__dict__
            if PartialState in classes and (state := objects.get("AcceleratorState")) is not None:
                known = PartialState._known_attrs
                PartialState._shared_state = {name: v for name, v in state.__dict__.items() if name in known}
            yield
        finally:
            for kind, shared in before:
                if kind is PartialState and torch.distributed.is_initialized():
                    continue  # connected just now
                kind._shared_state = shared
