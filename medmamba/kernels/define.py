"""Defines PyTorch operators without importing its compiler.

`torch.library.custom_op` and `torch.compiler.assume_constant_result` do the same, but import `torch._dynamo`, at the
latest when an operator first runs. That takes as long as importing PyTorch itself, and predictions need no compiler.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """Marks a function whose result torch.compile may take for a constant, and returns it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def operator(name: str) -> Callable[[_Function], _Function]:
    """Returns a decorator that defines an operator which mutates none of its arguments.

    Args:
        name: such as "medmamba::scan_2d". The schema comes from the annotations of the decorated function, which runs
            on every device. `torch.library.register_fake` and `register_autograd` complete the operator.
    """

    def define(function: _Function) -> _Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        not_compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            # The compiler, where it has been imported, must not look into a kernel.
            if "torch._dynamo" not in sys.modules:
                return function(*args)
            if not not_compiled:
                not_compiled.append(torch.compiler.disable(function))
            return not_compiled[0](*args)

        torch.library.impl(name, "default", run)
        return function

    return define
