"""Backward passes of differentiable functions under autocast."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Backward = TypeVar("Backward", bound=Callable[..., Any])


def in_its_types(backward: Backward) -> Backward:
    """Makes a backward pass multiply in the types of the forward pass, whatever autocast is active around it.

    PyTorch applies autocast to backward passes that are called under it; kernels would read the products as numbers of
    another type.
    """

    @functools.wraps(backward)
    def run(ctx, dout):
        if not torch.is_autocast_enabled(kind := dout.device.type):
            return backward(ctx, dout)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, dout)

    return cast(Backward, run)
