"""A training batch as a CUDA graph: one launch for forward, loss and backward instead of about 1700.

A batch of a small model runs on a GPU in less time than Python takes to launch its kernels; a graph removes that cost.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.cuda import graph_capture

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Tensor, Tensor], Tensor]  # images and targets to the differentiable loss of the batch

GRAPHS = ("auto", "off")
_AHEAD = 4  # steps that may be asked for before they are computed, which bounds the memory of batches on their way
_WARM_UP = 3  # eager passes before capture, in which libraries choose algorithms and Triton compiles


class GraphedStep:
    """Forward and backward pass for batches of one shape, with gradients in `parameter.grad` at fixed addresses.

    For one thread: the next call overwrites the returned loss and the gradients. Other threads may use the GPU, and
    other graphs, at the same time.

    Random numbers of the network (stochastic depth, dropout) follow `torch.manual_seed` as without a graph: each replay
    reads the seed and offset of PyTorch's generator. Each replay updates batch norm statistics; changes made by the
    capture itself are undone.

    Args:
        model: the network, in train mode.
        loss: returns the loss of a batch.
        images: example batch (B, C, H, W).
        targets: example targets (B, K).
        parts: batches per optimiser step. With one, a replay overwrites the gradients; with several, replays accumulate
            them and `begin` sets them to zero.

    Raises:
        RuntimeError: something in the network cannot be captured; the model is unchanged.
    """

    def __init__(self, model: nn.Module, loss: Loss, images: Tensor, targets: Tensor, parts: int = 1):
        self._images, self._targets = images.clone(memory_format=torch.preserve_format), targets.clone()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._adds = parts > 1
        self._asked: deque[torch.cuda.Event] = deque()
        self.graph = torch.cuda.CUDAGraph()
        buffers = list(model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        generator = torch.cuda.default_generators[self._images.get_device()]
        state = generator.clone_state()
        try:
            self._loss = self._capture(loss)
        except BaseException:
            generator.graphsafe_set_state(state)  # a failed capture leaves the generator waiting for the graph
            self._drop_gradients()
            raise
        finally:
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)

    def _capture(self, loss: Loss) -> Tensor:
        device = self._images.device

        def eager() -> None:
            self._drop_gradients()
            loss(self._images, self._targets).backward()

        graph_capture.warm_up(device, eager, _WARM_UP)
        self._drop_gradients()  # so that backward allocates them in the graph's memory pool
        if self._adds:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)

        def step() -> Tensor:
            found = loss(self._images, self._targets)
            found.backward()
            return found.detach()

        return graph_capture.record(self.graph, device, step)

    def begin(self) -> None:
        """Zeroes accumulated gradients; call before the first batch of an optimiser step."""
        if self._adds:
            torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of this batch; the next call overwrites it."""
        with torch.cuda.device_of(self._images):
            self._images.copy_(images)
            self._targets.copy_(targets)
            self.graph.replay()
            done = torch.cuda.Event(blocking=True)
            done.record()
        self._asked.append(done)
        if len(self._asked) > _AHEAD:
            self._asked.popleft().synchronize()
        return self._loss

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def graphs_possible(accelerator: Accelerator) -> bool:
    """Returns whether steps can be graphed: not on a CPU, nor with fp16, whose loss scale depends on earlier steps."""
    return accelerator.device.type == "cuda" and accelerator.scaler is None


def capture(model: nn.Module, loss: Loss, images: Tensor, targets: Tensor, parts: int = 1) -> GraphedStep | None:
    """Returns a graphed step, or None with a warning if the network cannot be captured."""
    try:
        return GraphedStep(model, loss, images, targets, parts)
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"training continues without a CUDA graph, which is slower for small batches: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
