"""Selects the scan backend: the argument, then MEDMAMBA_SCAN, then the fastest one available.

A backend is a module of `backends` whose BACKEND implements `backends.base.Backend`. It is imported at first use.
"""

import importlib
import os
import warnings

import torch
from torch.autograd import forward_ad

from .backends.base import Backend
from .define import assume_constant_result

BACKENDS = {
    "native": "medmamba.kernels.backends.cpu",
    "cuda": "medmamba.kernels.backends.cuda",
    "triton": "medmamba.kernels.backends.triton",
    "mamba_ssm": "medmamba.kernels.backends.mamba_ssm",
    "torch": "medmamba.kernels.backends.eager",
}
# By device, fastest first; anything else runs in plain PyTorch.
PREFERENCE = {"cpu": ("native",), "cuda": ("cuda", "triton", "mamba_ssm")}


class BackendError(RuntimeError):
    """The requested scan backend does not exist or cannot run here."""


def load_backend(name: str) -> Backend:
    """Returns the backend of that name, available or not.

    Raises:
        BackendError: unknown name.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown scan backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name]).BACKEND


def available_backends() -> dict[str, str | None]:
    """Returns, by backend name, None if it can run on this machine, else the reason and its remedy."""
    return {name: load_backend(name).why_not() for name in BACKENDS}


def transformed() -> bool:
    """Returns whether forward-mode differentiation or a transform of `torch.func` is active.

    Kernels have no forward-mode derivatives, which PyTorch would silently take for zero, so plain PyTorch runs instead.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@assume_constant_result
def states_chunk(name: str) -> int:
    """Returns the tokens between the states that a backend saves for its backward pass; 0 if it saves none."""
    return load_backend(name).chunk


# Under torch.compile, evaluated once while tracing.
@assume_constant_result
def resolve_backend(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """Returns the name of the backend that runs a scan of this dtype on this device.

    Args:
        requested: a name in `BACKENDS`, "auto", or None for the environment variable MEDMAMBA_SCAN (default "auto").

    Raises:
        BackendError: the requested backend is unknown, unavailable, or does not run this dtype on this device.
    """
    name = requested or os.environ.get("MEDMAMBA_SCAN") or "auto"
    if name != "auto":
        backend = load_backend(name)
        if (reason := backend.why_not()) or (reason := backend.why_not_on(device, dtype)):
            raise BackendError(f"scan backend {name!r} cannot run here: {reason}")
        return name
    reasons = []
    for name in PREFERENCE.get(device.type, ()):
        backend = load_backend(name)
        reason = backend.why_not()
        if reason is None:
            if backend.supports(device, dtype):
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
