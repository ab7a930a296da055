"""Data parallelism for steps that run as CUDA graphs, in place of DistributedDataParallel.

Its backward hooks would have to be captured too. Here each process replays its graph, and one all-reduce over all
gradients follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class GradientMean:
    """Averages gradients over all processes, which must have them in the same memory format.

    Args:
        accelerator: gives the number of processes.
        parameters: those whose `grad` is averaged; parameters without one are skipped.
    """

    def __init__(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter]):
        self._processes, self._parameters = accelerator.num_processes, parameters
        self._flat: dict[torch.dtype, tuple[Tensor, list[Tensor]]] = {}

    @torch.no_grad()
    def average(self) -> None:
        """Replaces each gradient by its mean over all processes."""
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
        """Returns one flat tensor for all gradients, and views of it in their shapes and strides."""
        found = self._flat.get(dtype)
        if found is None or [(v.shape, v.stride()) for v in found[1]] != [(g.shape, g.stride()) for g in gradients]:
            flat = torch.empty(sum(g.numel() for g in gradients), dtype=dtype, device=gradients[0].device)
            parts = flat.split([g.numel() for g in gradients])
            views = [part.as_strided(g.shape, g.stride()) for part, g in zip(parts, gradients, strict=True)]
            found = self._flat[dtype] = flat, views
        return found


class StatisticsMean:
    """Sets batch norm statistics after a step to the mean of the updates by each part of the batch.

    One process takes its parts in turn, several processes take theirs at once: this way both end with the same
    statistics, and a batch in two parts counts as one update instead of two.

    Args:
        model: whose buffers are averaged.
        accelerator: gives the number of processes.
        parts: accumulated parts per process.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, parts: int):
        self._processes, self._parts = accelerator.num_processes, parts
        # Tables and names instead of tensors: wrapping a model for several processes may replace its buffers.
        self._places = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        self._before: list[Tensor] = []
        self._sum: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Saves the statistics; call before a step."""
        if self._parts > 1:
            self._before = [buffer.clone() for buffer in self._buffers()]
            self._sum = [torch.zeros_like(buffer) for buffer in self._averaged()]

    @torch.no_grad()
    def part_done(self, turn: int) -> None:
        """Adds up the statistics; call after each part `turn` of a step, counted from 0."""
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
        """Averages over processes; call in all of them after a step."""
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


def broadcast_state(model: nn.Module, accelerator: Accelerator, buffers_only: bool = False) -> None:
    """Broadcasts parameters and buffers from rank 0."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for tensor in [*model.buffers(), *([] if buffers_only else model.parameters())]:
            tensor.copy_(broadcast(tensor.detach()))


def sync_batch_norm(model: nn.Module, accelerator: Accelerator, part: int) -> bool:
    """Converts to SyncBatchNorm when the per-GPU batch is below 32 images; returns whether it did (never on CPUs)."""
    if accelerator.num_processes == 1 or accelerator.device.type != "cuda" or part >= 32:
        return False
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return True
