"""What an attribution method sees: one image, one logit, and a model on which it can leave no trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..model import MedMamba, SSConvSSM, Stage
from ..utils.names import AmbiguousNameError, find_name

Progress = Callable[[float], object]
"""Called with the share done, 0 to 1, never falling. Return False (or raise) to stop."""


class ExplainCancelled(RuntimeError):
    """The progress callback returned False."""


class Subject:
    """A function from images (B, C, H, W) to the logit of one class (B,), for one image `x` (1, C, H, W).

    Attributes:
        target: class index; None until the first evaluation, which must then be of `x` and takes its highest logit.
        logits: (num_classes,) of `x`, on the CPU; None before the first evaluation.
        batch_size: the largest batch a method may evaluate, which bounds its memory.
        planned: evaluations expected in all, for the progress callback; a method sets it before it begins.
        evaluations: how many images have been evaluated so far.
    """

    def __init__(
        self,
        model: MedMamba,
        x: Tensor,
        target: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ):
        self.model = model
        self.x = x.to(model.patch_embed.proj.weight.device)
        self.target = target
        self.logits: Tensor | None = None
        self.batch_size = batch_size
        self.planned = 1
        self.evaluations = 0
        self._progress, self._reported = progress, 0.0

    @property
    def config(self) -> MedMambaConfig:
        return self.model.config

    def __call__(self, batch: Tensor) -> Tensor:
        self.report(self.evaluations / max(self.planned, 1))
        self.evaluations += len(batch)
        logits = self.model(batch)
        if self.logits is None:
            self.logits = logits[0].detach().cpu()
            if self.target is None:
                self.target = int(self.logits.argmax())
        return logits[:, self.target]

    @torch.no_grad()
    def measure(self) -> None:
        """Evaluates `x`, and with that fixes the target."""
        self(self.x)

    def report(self, fraction: float) -> None:
        """Passes the share done to the progress callback.

        Raises:
            ExplainCancelled: the callback returned False.
        """
        self._reported = max(self._reported, min(fraction, 1.0))
        if self._progress is not None and self._progress(self._reported) is False:
            raise ExplainCancelled("the explanation was cancelled by its progress callback")

    def span(self, begin: float, end: float) -> Progress:
        """A progress callback for a part of the work, from `begin` to `end` of the whole."""
        return lambda fraction: self.report(begin + fraction * (end - begin))


def sub_progress(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """A progress callback for a part of the work, from `begin` to `end` of the whole."""
    return None if progress is None else lambda fraction: progress(begin + fraction * (end - begin))


def frozen_view(model: MedMamba) -> MedMamba:
    """A copy of the modules in eval mode that shares its weights with the original and is float32.

    Hooks, gradients and modes set on it do not reach the original, not even when a method is interrupted. Weights of
    another type than float32 are converted, so not shared.

    Raises:
        ValueError: not a MedMamba, or one without classifier.
    """
    if not isinstance(model, MedMamba):
        raise ValueError(
            f"explanations need a MedMamba, got {type(model).__name__}; of a compiled model pass model._orig_mod, "
            "of a parallel one model.module"
        )
    if not model.config.num_classes:
        raise ValueError(
            "this model has no classifier to explain: give it one with model.reset_classifier(num_classes)"
        )
    view = cast(MedMamba, _copy_module(model, {}))
    view.set_grad_checkpointing(False)  # would run each hooked block twice
    view._apply(lambda tensor: tensor, recurse=False)  # a fused model forgets what it has derived from its weights
    return view


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Like `copy.deepcopy`, but in eval mode, of modules and their tables alone, with tensors by `_shared`: to go
    through a model a few times more would take as long as a forward pass.

    Args:
        memo: by id, the modules and tensors that have been copied already.
    """
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = new = module.__new__(type(module))
    for name, value in module.__dict__.items():
        new.__dict__[name] = value.copy() if isinstance(value, dict | set | list) else value
    new.training = False
    for table in (new._parameters, new._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                if id(tensor) not in memo:
                    memo[id(tensor)] = _shared(tensor)
                table[name] = memo[id(tensor)]
    new._modules.update({k: _copy_module(m, memo) for k, m in new._modules.items() if m is not None})
    return new


def _shared(tensor: Tensor) -> Tensor:
    """The same memory without gradient; converted if it is of another floating type than float32."""
    # Tensors made in inference mode cannot take part in autograd.
    shared = tensor.detach().clone() if tensor.is_inference() else tensor.detach()
    shared = shared.float() if shared.is_floating_point() else shared
    return nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared


def default_batch_size(device: torch.device) -> int:
    """Copies of an image to evaluate at once: 8, and on an NVIDIA GPU as many as its memory surely holds, 8 to 128."""
    if device.type != "cuda":
        return 8
    # Gradients of the largest variant at 224 pixels take about 0.4 GiB per image.
    return min(max(torch.cuda.get_device_properties(device).total_memory // 2**29, 8), 128)


def blocks(model: MedMamba, stage: int) -> list[SSConvSSM]:
    """The blocks of a stage, 1 to 4.

    Raises:
        ValueError: no such stage.
    """
    if not 1 <= stage <= len(model.stages):
        raise ValueError(f"no stage {stage}; this model has stages 1 to {len(model.stages)}")
    return list(cast(Stage, model.stages[stage - 1]).blocks)  # type: ignore[arg-type]


@contextmanager
def controlled(device: torch.device, seed: int) -> Iterator[None]:
    """Gradients on, autocast and TF32 off, random numbers from `seed`; all is put back as it was afterwards."""
    numpy_state = np.random.get_state()  # noqa: NPY002  captum's GradientShap draws from it
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(FullPrecision())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(np.random.set_state, numpy_state)
        # Not torch.manual_seed, which seeds the generators of every device, and fork_rng puts back only these.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
            torch.mps.manual_seed(seed)
        yield


class FullPrecision:
    """Products and convolutions of float32 on NVIDIA GPUs in float32, not TF32, as long as any thread is inside: the
    setting belongs to the process."""

    _lock: ClassVar = threading.Lock()
    _inside: ClassVar[int] = 0
    _before: ClassVar[list[tuple[Callable, Any]]] = []

    def __enter__(self) -> None:
        cls = FullPrecision
        with cls._lock:
            if not cls._inside:
                cls._before = _tf32_settings()
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
            cls._inside += 1

    def __exit__(self, *exception: object) -> None:
        cls = FullPrecision
        with cls._lock:
            cls._inside -= 1
            if not cls._inside:
                for put_back, value in cls._before:
                    put_back(value)


def _tf32_settings() -> list[tuple[Callable, Any]]:
    """All settings that decide on TF32: functions that put them back, to be called in this order, and values. The older
    ones set the newer ones too, of torch 2.9. To set the newer alone is no way out: torch then refuses the older."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Callable, Any]] = []
    with suppress(RuntimeError):  # the caller has set the newer alone
        settings.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    owners: list[tuple[Any, str]] = [(cudnn, "allow_tf32")]
    if hasattr(cublas, "fp32_precision"):
        newer = cublas, torch.backends.mkldnn.matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]
        owners += [(owner, "fp32_precision") for owner in newer]
    for owner, name in owners:
        with suppress(RuntimeError):
            settings.append((partial(setattr, owner, name), getattr(owner, name)))
    return settings


def resolve_target(target: int | str | None, config: MedMambaConfig) -> int | None:
    """A class index from an index, a label, or a number as text; None stays None.

    Labels match exactly, or else regardless of case and separators where that is unambiguous.

    Raises:
        ValueError: no such class.
    """
    if target is None:
        return None
    labels = config.labels
    if isinstance(target, str):
        try:
            found = find_name(target, labels)
        except AmbiguousNameError as error:
            raise ValueError(f"no class is called {target!r} exactly: {error}") from error
        if found is not None:
            return found
        if not target.strip().isdecimal():
            raise ValueError(f"no class is called {target!r}; the classes are {_listed(labels)}")
        target = int(target)
    if isinstance(target, bool) or not hasattr(target, "__index__"):
        raise ValueError(f"target must be a class index or label, got {target!r}; the classes are {_listed(labels)}")
    index = target.__index__()
    if not 0 <= index < len(labels):
        raise ValueError(f"target {index} is out of range; the classes are {_listed(labels)}")
    return index


def _listed(labels: list[str]) -> str:
    shown = ", ".join(f"{i} {label!r}" for i, label in enumerate(labels[:30]))
    return shown + (f" and {len(labels) - 30} more" if len(labels) > 30 else "")
