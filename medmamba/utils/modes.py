"""Views of a model: modules of their own in eval mode, whose weights are those of the model.

`model.eval()` before a forward pass and `model.train(was_training)` after it change a model that other threads use, and
give every module the mode of the outermost. A view has its own flags and shares what is large, so inference leaves the
model as it is, whatever mode each of its modules is in and whoever trains it meanwhile.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_TABLES = ("_parameters", "_buffers")
_CONTAINERS = (dict, set, list)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's OptimizedModule
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def eval_view(model: M) -> M:
    """Returns the model in eval mode, as modules of their own that share parameters and buffers with the original.

    Modes, attributes, hooks and submodules set on the view do not reach the original. Parameters and buffers are the
    same objects: what trains the original is seen by the view. Hooks registered on the original run, forward hooks with
    the original module as their first argument. Building a view takes about as long as `model.eval()`.

    Args:
        model: any module; a wrapper (see `unwrap`) is taken off.
    """
    inner = unwrap(model)
    view = _view(inner, {})
    # What a fused model derives from its weights it leaves with the original, so that the next view finds it.
    view.__dict__["_viewed"] = _Original(inner)
    return view  # type: ignore[return-value]


def frozen_view(model: M, dtype: torch.dtype | None = None, device: torch.device | None = None) -> M:
    """Returns an `eval_view` whose tensors need no gradient, and which may be moved, hooked and differentiated.

    Its buffers are copies: a caller's method that puts it in train mode moves its batch statistics, not the model's.

    Args:
        model: any module; a wrapper (see `unwrap`) is taken off.
        dtype: of floating-point tensors; those of another type are converted, so not shared. None: as they are.
        device: tensors elsewhere are copied there. None: where they are.
    """
    view = _view(unwrap(model), {})
    view.__dict__.pop("_viewed", None)
    tensors: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode cannot take part in autograd
        for module in view.modules():
            state = module.__dict__
            for name, value in state.items():
                if isinstance(value, _CONTAINERS):
                    state[name] = value.copy()
            for name in _TABLES:
                table = state[name]
                for key, tensor in table.items():
                    if tensor is not None:
                        table[key] = _frozen(tensor, dtype, device, tensors)
    view._apply(lambda tensor: tensor, recurse=False)  # a fused model forgets what it has derived from its weights
    return view  # type: ignore[return-value]


def _view(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    known = memo.get(id(module))
    if known is not None:
        return known
    if isinstance(module, torch.jit.ScriptModule):  # its flag is beyond Python's reach
        return copy.deepcopy(module).eval() if module.training else module
    memo[id(module)] = new = object.__new__(type(module))
    # Assigned to the dictionary, since `nn.Module.__setattr__` costs more than all the rest.
    state = new.__dict__
    state.update(module.__dict__)
    state["training"] = False
    if children := state["_modules"]:
        state["_modules"] = {k: None if m is None else _view(m, memo) for k, m in children.items()}
    if state["_parameters"]:
        state["_parameters"] = state["_parameters"].copy()
    if state["_buffers"]:
        state["_buffers"] = state["_buffers"].copy()
    if hooks := state["_forward_hooks"]:
        # A hook that looks its module up must find it. Hooks before the forward pass get the view: those of
        # torch.nn.utils set the weight that is then used.
        state["_forward_hooks"] = OrderedDict((k, _Hook(hook, module)) for k, hook in hooks.items())
    if state.get("_compiled_call_impl") is not None:  # of `module.compile()`: bound to the original
        state["_compiled_call_impl"] = None
    if "forward" in state:
        _rebind_forward(module, new)
    return new


class _Original:
    """A weak reference to the model of a view, which a copy of the view does not have."""

    def __init__(self, model: nn.Module | None):
        self.reference = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        return self.reference()

    def __deepcopy__(self, memo: dict) -> _Original:
        return _Original(None)


class _Hook:
    """A forward hook that is given the module it was registered on; a copy of the view has the same."""

    def __init__(self, hook: Callable, module: nn.Module):
        self.hook, self.module = hook, module

    def __call__(self, _view: nn.Module, *args: Any) -> Any:
        return self.hook(self.module, *args)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self


def _rebind_forward(module: nn.Module, new: nn.Module) -> None:
    """Rebinds a `forward` set on the instance, which would otherwise run in the modes of the original."""
    state = new.__dict__
    forward = state["forward"]
    if "_original_forward" in state:  # accelerate's, which adds autocast
        del state["forward"]
    elif isinstance(forward, MethodType) and forward.__self__ is module:
        state["forward"] = MethodType(forward.__func__, new)
    elif isinstance(forward, functools.partial) and forward.args[:1] == (module,):
        state["forward"] = functools.partial(forward.func, new, *forward.args[1:], **forward.keywords)


def _frozen(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None, known: dict[int, Tensor]) -> Tensor:
    """Returns a parameter without gradient on the same memory where it can be shared, or a copy of a buffer."""
    if (found := known.get(id(tensor))) is not None:
        return found
    own = tensor
    if device is not None or (dtype is not None and tensor.dtype != dtype):
        own = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    if isinstance(tensor, nn.Parameter):
        frozen: Tensor = nn.Parameter(own.detach().clone() if own.is_inference() else own.detach(), requires_grad=False)
    else:
        frozen = own.detach().clone()
    known[id(tensor)] = frozen
    return frozen
