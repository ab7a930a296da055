"""Which implementation of the scan runs: the argument, then MEDMAMBA_SCAN, then the fastest one that can.

A backend is a module of this package with the functions of `torch_backend.py`. It is imported when it is first asked
for, so that a missing optional package costs nothing and says so only to those who ask for it.
"""

import importlib
import os
import warnings
from types import ModuleType

import torch
from torch.autograd import forward_ad

BACKENDS = {
    "native": "medmamba.kernels.backends.cpu",
    "cuda": "medmamba.kernels.backends.cuda",
    "triton": "medmamba.kernels.backends.triton",
    "mamba_ssm": "medmamba.kernels.backends.mamba_ssm",
    "torch": "medmamba.kernels.backends.eager",
}
# Fastest first. Everything else runs the plain definition.
PREFERENCE = {"cpu": ("native",), "cuda": ("cuda", "triton", "mamba_ssm")}


class BackendError(RuntimeError):
    """A scan backend was asked for that does not exist or cannot run here."""


def load_backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise BackendError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def available_backends() -> dict[str, str | None]:
    """Backend name to None where it can run on this machine, else to the reason and its cure."""
    return {name: load_backend(name).unavailable() for name in BACKENDS}


def transformed() -> bool:
    """Whether derivatives may be asked for that kernels do not give: in forward mode (`torch.func.jvp`,
    `torch.autograd.forward_ad`), which PyTorch would take for zero, or by another transform of `torch.func`. Then the
    plain definitions run, which PyTorch derives."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result
def states_chunk(name: str) -> int:
    """Tokens between the states that a backend's forward saves for its backward; 0: it saves none."""
    return load_backend(name).CHUNK


# Under torch.compile the choice is made once, while tracing.
@torch.compiler.assume_constant_result
def resolve_backend(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """The backend that will run a scan of this dtype on this device.

    Args:
        requested: a name in `BACKENDS`, "auto", or None for the environment variable MEDMAMBA_SCAN (default "auto").

    Raises:
        BackendError: the requested backend is unknown, unavailable, or does not run this dtype on this device.
    """
    name = requested or os.environ.get("MEDMAMBA_SCAN") or "auto"
    if name != "auto":
        backend = load_backend(name)
        if (reason := backend.unavailable()) or (reason := backend.unsupported(device, dtype)):
            raise BackendError(f"scan backend {name!r} cannot run here: {reason}")
        return name
    reasons = []
    for name in PREFERENCE.get(device.type, ()):
        backend = load_backend(name)
        reason = backend.unavailable()
        if reason is None:
            if backend.unsupported(device, dtype) is None:
                return name
        else:
            reasons.append(f"{name}: {reason}")
    if reasons:
        warnings.warn(
            "the selective scan runs in plain PyTorch, which is correct but many times slower, because no fast "
            f"backend is available for {device.type}: " + "; ".join(reasons),
            stacklevel=2,
        )
    return "torch"
