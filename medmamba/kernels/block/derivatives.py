"""First derivatives alone, and an error where second ones are asked for."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd.function import once_differentiable

Pass = TypeVar("Pass", bound=Callable[..., Any])


def differentiable_once(run: Pass) -> Pass:
    """Makes a backward pass that kernels compute refuse to be differentiated, more often than `once_differentiable`.

    That of PyTorch refuses only where a gradient that arrives needs one itself. But the gradients that leave depend on
    the input and the weights as well: of the sum of a layer's output, with gradient one, they would pass for constants,
    and a Hessian for zero.
    """
    once = once_differentiable(run)

    @functools.wraps(run)
    def passed(ctx, *gradients):
        if torch.is_grad_enabled() and not any(g.requires_grad for g in gradients):
            gradients = tuple(g.detach().requires_grad_() for g in gradients)
        return once(ctx, *gradients)

    return cast(Pass, passed)
