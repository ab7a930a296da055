"""Registry of the kernels that replace named pieces of the network.

`model/network.py` defines each piece as a function in plain PyTorch, marked `@replaceable("name")`. A kernel registers
under that name together with a predicate of `eligibility.py`, which says for which tensors and modules it computes the
same as the plain function. In all other cases the plain function runs.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from .eligibility import kernels_run

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Piece(Protocol[R_co]):
    """A replaceable function; takes positional arguments, the feature map (B, H, W, C) first."""

    def __call__(self, *args: Any, backend: str | None = None) -> R_co:
        """Runs the kernel where it applies and the scan backend is "cuda", else the plain function.

        Args:
            backend: as in `selective_scan_2d`. Any other than "cuda" turns the kernels off.
        """


class _Kernel(NamedTuple, Generic[R]):
    fits: Callable[..., bool]
    run: Callable[..., R]


_kernels: dict[str, _Kernel] = {}


def replaces(name: str, fits: Callable[..., bool]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Registers a function as the kernel for a piece of the network.

    Args:
        name: of the piece. The function and `fits` take the arguments of the piece.
        fits: whether the kernel computes the same as the piece for these arguments.
    """

    def register(function: Callable[..., R]) -> Callable[..., R]:
        _kernels[name] = _Kernel(fits, function)
        return function

    return register


def replaceable(name: str) -> Callable[[Callable[..., R]], Piece[R]]:
    """Marks a plain PyTorch function as a piece of the network that the kernel `name` may replace.

    Raises:
        KeyError: no kernel has that name.
    """
    fits, run = _kernels[name]

    def decorate(plain: Callable[..., R]) -> Piece[R]:
        @functools.wraps(plain)
        def piece(*args: Any, backend: str | None = None) -> R:
            if kernels_run(args[0], backend) and fits(*args):
                return run(*args)
            return plain(*args)

        return piece

    return decorate
