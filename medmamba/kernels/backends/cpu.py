"""Backend "native": a C library for CPUs, built ahead of time for each platform and called through ctypes.

The library (sources in csrc/, built by csrc/build.py) depends on neither Python nor PyTorch, so one file per platform
serves all versions of both, and users need no compiler. It runs `torch.get_num_threads()` threads; for a given number
of threads, results are reproducible.
"""

import ctypes
import functools
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

from .base import Backend, Gradients1d, Gradients2d

CHUNK = 64  # tokens between saved states; medmamba_chunk() of the library

LIBRARIES = Path(__file__).parents[1] / "lib"
VARIANTS = {"x86_64": ("x86_64", "x86_64_v3", "x86_64_v4"), "arm64": ("neon",), "aarch64": ("neon",)}
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Scan2d(ctypes.Structure):
    """Mirrors `Scan2d` of csrc/scan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "W", "C", "R", "N", "threads", "x_type", "proj_type")),
        *((name, ctypes.c_void_p) for name in ("x", "proj", "dt_weight", "dt_bias", "A", "D", "states", "y")),
        *((name, ctypes.c_void_p) for name in ("dy", "dx", "dproj", "ddt_weight", "ddt_bias", "dA", "dD")),
    ]


class Scan1d(ctypes.Structure):
    """Mirrors `Scan1d` of csrc/scan.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "C", "L", "G", "N", "threads", "softplus")),
        *((name, ctypes.c_int64) for name in ("u_type", "delta_type", "proj_type")),
        *((name, ctypes.c_void_p) for name in ("u", "delta", "A", "Bs", "Cs", "D", "delta_bias", "y", "last_state")),
        *((name, ctypes.c_void_p) for name in ("dy", "du", "ddelta", "dBs", "dCs", "dA", "dD", "ddelta_bias")),
    ]


def library_name(system: str = sys.platform, machine: str = platform.machine()) -> str:
    """Returns the name of the file in `lib/` for a platform, whether it exists or not."""
    machine = {"AMD64": "x86_64"}.get(machine, machine)
    if system == "darwin":
        return f"macos-{machine}.dylib"
    return f"windows-{machine}.dll" if system == "win32" else f"{system}-{machine}.so"


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads the library.

    Raises:
        OSError: there is none for this platform, or it does not load.
    """
    path = LIBRARIES / library_name()
    if not path.exists():
        raise OSError(
            f"there is no prebuilt library for this platform ({path.name}); csrc/build.py says how to add one"
        )
    library = ctypes.CDLL(str(path))
    library.medmamba_source.restype = ctypes.c_char_p
    if library.medmamba_chunk() != CHUNK:
        raise OSError(f"{path} belongs to another version of this package; reinstall it")
    return library


def best_variant() -> int:
    """Returns the index into `VARIANTS` of the widest instruction set that the processor supports."""
    return load_library().medmamba_best_variant()


def call_library(function: str, arguments: ctypes.Structure) -> None:
    """Calls a function of the library for the widest instruction set of this processor.

    Raises:
        MemoryError: it ran out of memory.
    """
    if getattr(load_library(), f"medmamba_{function}")(best_variant(), ctypes.byref(arguments)):
        raise MemoryError(f"{function} ran out of memory")


def _data(tensor: Tensor) -> Tensor:
    """Returns the tensor contiguous and in a dtype that the library reads."""
    return (tensor if tensor.dtype in ELEMENT_TYPES else tensor.float()).contiguous()


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float().contiguous() for t in tensors)


def _pointers(**tensors: Tensor) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _scan_2d(x: Tensor, proj: Tensor, dt_weight: Tensor, A: Tensor, **tensors: Tensor) -> Scan2d:
    B, H, W, C = x.shape
    return Scan2d(
        *(B, H, W, C, dt_weight.shape[2], A.shape[2], torch.get_num_threads()),
        *(ELEMENT_TYPES[x.dtype], ELEMENT_TYPES[proj.dtype]),
        **_pointers(x=x, proj=proj, dt_weight=dt_weight, A=A, **tensors),
    )


def _scan_1d(u: Tensor, delta: Tensor, A: Tensor, Bs: Tensor, Cs: Tensor, softplus: bool, **tensors: Tensor) -> Scan1d:
    B, C, L = u.shape
    return Scan1d(
        *(B, C, L, Bs.shape[1], A.shape[1], torch.get_num_threads(), softplus),
        *(ELEMENT_TYPES[t.dtype] for t in (u, delta, Bs)),
        **_pointers(u=u, delta=delta, A=A, Bs=Bs, Cs=Cs, **tensors),
    )


def _projections(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns B and C in one dtype, as the library requires."""
    return (_data(B), _data(C)) if B.dtype == C.dtype else (B.float().contiguous(), C.float().contiguous())


class CpuBackend(Backend):
    """Calls the C library."""

    name = "native"
    chunk = CHUNK

    def why_not(self) -> str | None:
        try:
            load_library()
        except OSError as error:
            return str(error)
        return None

    def why_not_on(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in ELEMENT_TYPES:
            return f"it runs float32, bfloat16 and float16, not {dtype}; backend 'torch' runs every float type"
        return None

    def scan_2d(
        self, x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, states: Tensor
    ) -> Tensor:
        x, proj = x.contiguous(), _data(proj)
        dt_weight, dt_bias, A, D = _floats(dt_weight, dt_bias, A, D)
        y = torch.empty_like(x)
        call_library("scan_2d_forward", _scan_2d(x, proj, dt_weight, A, dt_bias=dt_bias, D=D, states=states, y=y))
        return y

    def scan_2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        proj: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        states: Tensor,
    ) -> Gradients2d:
        dtypes = [t.dtype for t in (x, proj, dt_weight, dt_bias, A, D)]
        x, dy, proj = x.contiguous(), dy.to(x.dtype).contiguous(), _data(proj)
        dt_weight, dt_bias, A, D = _floats(dt_weight, dt_bias, A, D)
        grads = [_like(t) for t in (x, proj, dt_weight, dt_bias, A, D)]
        outputs = dict(zip(("dx", "dproj", "ddt_weight", "ddt_bias", "dA", "dD"), grads, strict=True))
        call_library(
            "scan_2d_backward", _scan_2d(x, proj, dt_weight, A, dt_bias=dt_bias, D=D, states=states, dy=dy, **outputs)
        )
        return tuple(g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))  # type: ignore[return-value]

    def scan_1d(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, softplus: bool
    ) -> tuple[Tensor, Tensor]:
        u, delta, (B, C) = u.contiguous(), _data(delta), _projections(B, C)
        A, D, delta_bias = _floats(A, D, delta_bias)
        y, last_state = torch.empty_like(u), u.new_empty((*u.shape[:2], A.shape[1]), dtype=torch.float32)
        arguments = _scan_1d(u, delta, A, B, C, softplus, D=D, delta_bias=delta_bias, y=y, last_state=last_state)
        call_library("scan_1d_forward", arguments)
        return y, last_state

    def scan_1d_backward(
        self,
        dy: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        softplus: bool,
    ) -> Gradients1d:
        dtypes = [t.dtype for t in (u, delta, A, B, C, D, delta_bias)]
        u, dy, delta, (B, C) = u.contiguous(), dy.to(u.dtype).contiguous(), _data(delta), _projections(B, C)
        A, D, delta_bias = _floats(A, D, delta_bias)
        grads = [_like(t) for t in (u, delta, A, B, C, D, delta_bias)]
        outputs = dict(zip(("du", "ddelta", "dA", "dBs", "dCs", "dD", "ddelta_bias"), grads, strict=True))
        call_library(
            "scan_1d_backward", _scan_1d(u, delta, A, B, C, softplus, D=D, delta_bias=delta_bias, dy=dy, **outputs)
        )
        return tuple(g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))  # type: ignore[return-value]


BACKEND = CpuBackend()
