"""Passes of differentiable functions under autocast."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Pass = TypeVar("Pass", bound=Callable[..., Any])


def in_its_types(run: Pass) -> Pass:
    """Makes a pass of a differentiable function multiply in the types of its tensors, whatever autocast is active.

    PyTorch applies autocast to backward passes that are called under it; kernels would read the products as numbers of
    another type. The pass takes the context and then a tensor. Its state is switched directly, as leaving
    `torch.autocast` may clear the cache of weights that others use.
    """

    @functools.wraps(run)
    def passed(ctx, on, *arguments):
        if not torch.is_autocast_enabled(kind := on.device.type):
            return run(ctx, on, *arguments)
        torch.set_autocast_enabled(kind, False)
        try:
            return run(ctx, on, *arguments)
        finally:
            torch.set_autocast_enabled(kind, True)

    return cast(Pass, passed)
