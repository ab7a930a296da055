"""Several processes as one: what DistributedDataParallel does, for steps that run as CUDA graphs.

Its hooks in the backward pass would have to be captured with it. Without them each process replays its graph, then one
sum over all gradients follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class GradientMean:
    """Averages the gradients of `parameters` over all processes; each must have one in the same memory format."""

    def __init__(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter]):
        self._processes, self._parameters = accelerator.num_processes, parameters
        self._flat: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}

    @torch.no_grad()
    def average(self) -> None:
        if self._processes == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for dtype, gradients in by_type.items():
            flat, views = self._buffer(dtype, gradients)
            torch._foreach_copy_(views, gradients)
            torch.distributed.all_reduce(flat)
            flat /= self._processes
            torch._foreach_copy_(gradients, views)

    def _buffer(self, dtype: torch.dtype, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One tensor for all gradients, and its parts, in the shapes and strides of the gradients."""
        found = self._flat.get(dtype)
        if found is None or [(v.shape, v.stride()) for v in found[1]] != [(g.shape, g.stride()) for g in gradients]:
            flat = torch.empty(sum(g.numel() for g in gradients), dtype=dtype, device=gradients[0].device)
            parts = flat.split([g.numel() for g in gradients])
            views = [part.as_strided(g.shape, g.stride()) for part, g in zip(parts, gradients, strict=True)]
            found = self._flat[dtype] = flat, views
        return found


class StatisticsMean:
    """Batch norm statistics after a step: the mean of what each part of the batch alone would have made of them.

    The parts of one process come one after the other, those of several processes at once; with this, both leave the
    same statistics, and a batch in two parts counts as one step and not as two.

    Args:
        parts: that each process takes one after the other.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, parts: int):
        self._processes, self._parts = accelerator.num_processes, parts
        # Where the tensors are, since wrapping a model for several processes may give it others.
        self._places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        self._before: list[Tensor] = []
        self._sum: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """To be called before a step."""
        if self._parts > 1:
            self._before = [buffer.clone() for buffer in self._buffers()]
            self._sum = [torch.zeros_like(buffer) for buffer in self._averaged()]

    @torch.no_grad()
    def part_done(self, turn: int) -> None:
        """To be called after each part of a step, counted from 0."""
        if self._parts == 1:
            return
        averaged = self._averaged()
        torch._foreach_add_(self._sum, averaged)
        if turn < self._parts - 1:
            for buffer, value in zip(self._buffers(), self._before, strict=True):
                buffer.copy_(value)
        else:
            torch._foreach_div_(self._sum, self._parts)
            torch._foreach_copy_(averaged, self._sum)

    @torch.no_grad()
    def end(self) -> None:
        """To be called after a step, by all processes."""
        if self._processes == 1 or not (averaged := self._averaged()):
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in averaged])
        torch.distributed.all_reduce(flat)
        flat /= self._processes
        parts = flat.split([buffer.numel() for buffer in averaged])
        torch._foreach_copy_(averaged, [part.view_as(buffer) for part, buffer in zip(parts, averaged, strict=True)])

    def _buffers(self) -> list[Tensor]:
        return [tensor for table, name in self._places if (tensor := table[name]) is not None]

    def _averaged(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers() if buffer.is_floating_point()]


def agree(model: nn.Module, accelerator: Accelerator, buffers_only: bool = False) -> None:
    """Parameters and buffers of the first process become everybody's."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for tensor in [*model.buffers(), *([] if buffers_only else model.parameters())]:
            tensor.copy_(broadcast(tensor.detach()))


def sync_batch_norm(model: nn.Module, accelerator: Accelerator, part: int) -> bool:
    """On several GPUs with few images each, batch norm over all of them (CPUs have no such layer); whether so."""
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda" or part >= 32:
        return False
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return True
