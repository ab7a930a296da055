"""One training batch as a CUDA graph: forward, loss and backward are started by one call instead of some 1700.

A batch of a small model keeps a GPU busy for less time than Python needs to start its kernels; a graph removes that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels import cuda_graphs

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Tensor, Tensor], Tensor]  # images and targets to the loss of the batch, with its graph

GRAPHS = ("auto", "off")
_WARM_UP = 3  # eager passes before: libraries choose algorithms and Triton compiles in these


class GraphedStep:
    """Forward and backward for batches of one shape; gradients are left in `parameter.grad`, at a fixed place.

    For one thread: what a call returns, and the gradients, are overwritten by the next call. Other threads may use the
    GPU, and other graphs, meanwhile.

    What the network draws itself (stochastic depth, dropout) follows `torch.manual_seed` as without a graph: the graph
    reads seed and offset of PyTorch's generator at each replay. Batch norm statistics are updated at each replay;
    those that the capture itself would have changed are put back.

    Args:
        parts: batches per optimiser step. With one, a replay overwrites the gradients; with several it adds to them,
            and `begin` sets them to zero.

    Raises:
        RuntimeError: something in the network cannot be captured; the model is as it was.
    """

    def __init__(self, model: nn.Module, loss: Loss, images: Tensor, targets: Tensor, parts: int = 1):
        self._images, self._targets = images.clone(memory_format=torch.preserve_format), targets.clone()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._adds = parts > 1
        self.graph = torch.cuda.CUDAGraph()
        buffers = list(model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        generator = torch.cuda.default_generators[self._images.get_device()]
        state = generator.clone_state()
        try:
            self._loss = self._capture(loss)
        except BaseException:
            generator.graphsafe_set_state(state)  # a capture that failed leaves it waiting for the graph
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

        cuda_graphs.warm_up(device, eager, _WARM_UP)
        self._drop_gradients()  # so that the backward pass allocates them in the memory of the graph
        if self._adds:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)

        def step() -> Tensor:
            found = loss(self._images, self._targets)
            found.backward()
            return found.detach()

        return cuda_graphs.record(self.graph, device, step)

    def begin(self) -> None:
        """To be called before the first batch of an optimiser step."""
        if self._adds:
            torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of this batch; the next call overwrites it."""
        with torch.cuda.device_of(self._images):
            self._images.copy_(images)
            self._targets.copy_(targets)
            self.graph.replay()
        return self._loss

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def graphs_possible(accelerator: Accelerator) -> bool:
    """Whether steps can be graphs at all: not on a CPU, nor where the loss is scaled by what the last step found."""
    return accelerator.device.type == "cuda" and accelerator.scaler is None


def capture(model: nn.Module, loss: Loss, images: Tensor, targets: Tensor, parts: int = 1) -> GraphedStep | None:
    """A graphed step, or None with a warning where the network cannot be captured."""
    try:
        return GraphedStep(model, loss, images, targets, parts)
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"training goes on without a CUDA graph, slower for small batches: {reason}", RuntimeWarning, stacklevel=2
        )
        return None
