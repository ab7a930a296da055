"""A network replayed from a CUDA graph: for many batches of one shape, without Python's launches.

Launching the layers of a network takes the caller's thread several milliseconds a batch, in which it can neither hand
images to the GPU nor pass answers on. A replay is a single call. The kernels, and so the answers, are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.cuda import graph_capture

WORTH = 8  # batches of one shape after which as many again are expected


class Replayed:
    """The forward pass of a network on images of one shape.

    The features and maps that it leaves in `seen` and `maps` are overwritten by the next call, the logits as well.

    Args:
        network: in evaluation mode, on an NVIDIA GPU; not changed later.
        example: images (B, in_chans, H, W) of the shape and dtype to come.
        seen, maps: lists to which the network appends one entry per call, or none.

    Raises:
        RuntimeError: it cannot be captured, such as for want of memory.
    """

    def __init__(self, network: Any, example: Tensor, seen: list[Tensor], maps: list[list[Tensor]]) -> None:
        self._network, self._images = network, example.clone()  # the graph reads the weights of the network
        self.config = network.config
        self._graph = torch.cuda.CUDAGraph()
        graph_capture.warm_up(example.device, lambda: network(self._images))
        seen.clear()
        maps.clear()
        self._logits = graph_capture.record(self._graph, example.device, lambda: network(self._images))
        self._seen, self._maps = (seen, [*seen]), (maps, [*maps])
        seen.clear()
        maps.clear()

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits (B, K) of images of the shape of the example."""
        self._images.copy_(images)
        self._graph.replay()
        self._seen[0].extend(self._seen[1])
        self._maps[0].extend(self._maps[1])
        return self._logits


class Repeats:
    """Counts batches of one shape, and replaces a network by `Replayed` where enough have come.

    A batch of another shape, as where an image could not be read, is computed layer by layer in between.

    Args:
        seen, maps: see `Replayed`.
    """

    def __init__(self, seen: list[Tensor], maps: list[list[Tensor]]) -> None:
        self._lists = seen, maps
        self._network: Any = None
        self._kind: tuple[Any, ...] = ()  # of the last batch
        self._count = 0  # of batches of this kind without another between them
        self._captured: tuple[Any, ...] = ()
        self._replayed: Replayed | None = None

    def faster(self, network: Any, images: Tensor) -> Any:
        """Returns the network, or its replay for images like these."""
        kind = (images.shape, images.dtype, images.device)
        if network is not self._network:
            self._network, self._count, self._replayed = network, 0, None
        self._count = self._count + 1 if kind == self._kind else 1
        self._kind = kind
        if self._replayed is not None and kind == self._captured:
            return self._replayed
        if self._count == WORTH:
            self._replayed = None  # its memory first
            try:
                self._replayed = Replayed(network, images, *self._lists)
            except RuntimeError:  # not enough memory, or a layer that cannot be captured: slower, with the same answers
                for entries in self._lists:
                    entries.clear()
                torch.cuda.empty_cache()
                return network
            self._captured = kind
            return self._replayed
        return network
