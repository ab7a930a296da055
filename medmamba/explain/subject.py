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
from ..inference.predict import NotFiniteError, why_not_finite
from ..model import MedMamba, SSConvSSM, Stage
from ..utils import modes
from ..utils.names import AmbiguousNameError, find_name
from .randomness import PrivateRandom

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
        seed: of random numbers that do not come from PyTorch.
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
        self.seed = 0
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
            if not self.logits.isfinite().all():
                raise NotFiniteError(why_not_finite(self.model, self.logits))
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


def frozen_view(model: nn.Module) -> MedMamba:
    """Returns a copy of the modules in eval mode that shares its weights with the original and is float32.

    Hooks, gradients and modes set on it do not reach the original, not even when a method is interrupted. Weights of
    another type than float32 are converted, so not shared.

    Args:
        model: a `MedMamba`, also inside of `torch.compile` or `DataParallel`.

    Raises:
        ValueError: not a MedMamba, or one without classifier.
    """
    inner = modes.unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, MedMamba):
        raise ValueError(f"explanations need a MedMamba, got {type(inner).__name__}")
    if not inner.config.num_classes:
        raise ValueError(
            "this model has no classifier to explain: give it one with model.reset_classifier(num_classes)"
        )
    view = modes.frozen_view(inner, torch.float32)
    view.set_grad_checkpointing(False)  # would run each hooked block twice
    return view


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
    """Gradients on, autocast and TF32 off, random numbers of PyTorch from `seed`, in this thread; all is put back as it
    was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(FullPrecision())
        stack.enter_context(PrivateRandom(seed))
        yield


class SeededNumPy:
    """NumPy's global generator seeded, for functions of the caller that draw from it, and put back afterwards. The
    generator belongs to the process, so one thread at a time."""

    _lock: ClassVar = threading.RLock()

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        SeededNumPy._lock.acquire()
        self.before = np.random.get_state()  # noqa: NPY002
        np.random.seed(self.seed % 2**32)  # noqa: NPY002

    def __exit__(self, *exception: object) -> None:
        np.random.set_state(self.before)  # noqa: NPY002
        SeededNumPy._lock.release()


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
