"""From any number of images to what a network says of each, in order: the one way behind prediction and evaluation.

Few images are read and computed in the caller's thread. Of many, processes read ahead (`medmamba.imaging.ahead`) while
one or several devices compute (`engine`). Memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..imaging.ahead import CHUNK, Chunk, Order, Prepared, Unread, read_ahead
from ..utils.extras import require
from ..utils.modes import unwrap
from .engine import Answer, Engine, Running, Transferred
from .pinned import pinned
from .tta import check

MOST = 256  # images in a batch that is chosen here
MOST_BYTES = 1 << 29  # of their pixels, float32
_FEW = 16  # images in a batch as long as it is not known whether there will be many
_IN_FLIGHT = (2, 8)  # batches per GPU: as many images as in 2 of the largest, so that it never waits; at most 8
_DECODERS = 2  # threads per GPU that have it decode
_NICE = {"cpu": 10, "cuda": 5}  # computing, or feeding the GPU, comes before reading ahead


@dataclass(frozen=True)
class Options:
    """How a stream runs; the answers do not depend on it, apart from `precision`, `reduced` and `tta`.

    Attributes:
        batch_size: images per forward pass; None: the smallest that is about as fast as the best, found by trying on a
            GPU; 16 on a CPU.
        workers: processes that read images; 0: none. None: as many as there are cores, once that is worth it.
        precision: "float32" (TF32 off), "tf32", "bfloat16" or "float16"; None: that of the model's weights.
        devices: where to compute, such as ["cuda:0", "cuda:1"]; None: where the model is.
        reduced: decode JPEG at reduced size, see `Order.reduced`.
        tta: test-time augmentation, see `medmamba.inference.tta`.
        gpu_decode: decode plain JPEG files on the GPU that computes, see `gpu_decode`.
        signature: answers hold the signatures of the images, see `signature`.
    """

    batch_size: int | None = None
    workers: int | None = None
    precision: str | None = None
    devices: Sequence[str | torch.device] | None = None
    reduced: bool = False
    tta: str = "none"
    gpu_decode: bool = False
    signature: bool = False

    def __post_init__(self) -> None:
        check(self.tta)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")


@dataclass
class Batch:
    """Consecutive images with their answers.

    Attributes:
        items: one for each image.
        answer: features and logits of those that are `Prepared`, in order; None where there are none. Not finite values
            are returned as they are.
    """

    items: list[Prepared | Unread]
    answer: Answer | None

    def rows(self) -> Iterator[tuple[Prepared | Unread, Tensor | None]]:
        """Yields each image with its logits."""
        position = 0
        for item in self.items:
            if isinstance(item, Unread) or self.answer is None:
                yield item, None
            else:
                yield item, self.answer.logits[position]
                position += 1


def stream(model: Any, sources: Iterable[Any], order: Order, options: Options = Options()) -> Iterator[Batch]:
    """Reads and classifies images.

    Args:
        model: a `MedMamba`, in any mode; not changed. Weights that change meanwhile are noticed.
        sources: see `read_ahead`; taken as needed, in the caller's thread, of any number.
        order: how to read them.
        options: how to run.

    Yields:
        Batches in order; the pixels of their items are gone by then.

    Raises:
        ValueError: a number out of range, or no such device or precision.
    """
    model = unwrap(model)
    devices = [torch.device(d) for d in options.devices or [model.patch_embed.proj.weight.device]]
    if options.gpu_decode:
        if not all(device.type == "cuda" for device in devices):
            raise ValueError("gpu_decode needs NVIDIA GPUs to compute on")
        require("nvidia.nvimgcodec", "decoding on a GPU", "gpu-decode")
        order = dataclasses.replace(order, encoded=True)
    run = _Run(model, order, options, devices)
    chunk = min(CHUNK, options.batch_size or _FEW)
    chunk = 2 * chunk if options.gpu_decode else chunk  # more at once decode faster
    size = options.batch_size or _most(order)
    ahead = 2 + (_in_flight(size, order) + 1) * len(devices) * -(-size // chunk)
    if all(device.type == "cpu" for device in devices):
        ahead = 2 + -(-2 * (options.batch_size or _FEW) // chunk)
    chunks = read_ahead(
        sources,
        order,
        workers=options.workers,
        chunk=chunk,
        ahead=ahead,
        nice=max(_NICE.get(device.type, 0) for device in devices),
        using=lambda memory: pinned(memory, devices),
    )
    with contextlib.closing(chunks):
        yield from run.batches(chunks)


def _most(order: Order) -> int:
    """Returns the most images in a batch that is chosen here."""
    return min(MOST, max(_FEW, MOST_BYTES // order.bytes_per_image))


def _in_flight(size: int, order: Order) -> int:
    """Returns how many batches of a size a GPU is given before the first answer is waited for."""
    fewest, most = _IN_FLIGHT
    return min(max(fewest * _most(order) // size, fewest), most)


class _Run:
    def __init__(self, model: Any, order: Order, options: Options, devices: list[torch.device]) -> None:
        self.model, self.order, self.options = model, order, options
        self.engines = [
            Engine(model, device, options.precision, options.tta, order, options.signature) for device in devices
        ]
        self._size = options.batch_size
        self._going: deque[tuple[list[Chunk], Running | None]] = deque()
        # Decoding on a GPU waits for it, so threads do that; copies are only asked for.
        self._threads = ThreadPoolExecutor(_DECODERS * len(devices)) if options.gpu_decode else None

    def batches(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        """Yields the answers to chunks, some batches per GPU behind."""
        try:
            yield from self._batches(chunks)
        finally:
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)

    def _batches(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        waiting: list[tuple[Chunk, Transferred | Future[Transferred]]] = []
        count = turn = 0
        many = False
        gpus = sum(engine.device.type == "cuda" for engine in self.engines)
        for chunk in chunks:
            many = chunk.slot is not None
            engine = self.engines[turn % len(self.engines)]
            submit = self._threads.submit if self._threads is not None else None
            waiting.append((chunk, submit(engine.transfer, chunk) if submit else engine.transfer(chunk)))
            count += len(chunk.items)
            size = self._batch_size(many)
            depth = gpus * _in_flight(size, self.order) if many else 0
            if count >= size:
                self._start(engine, waiting, many)
                waiting, count, turn = [], 0, turn + 1
            # What is done goes at once, since what is read next needs its memory.
            while self._going and (len(self._going) > depth or self._is_done()):
                yield self._finished()
        if waiting:
            self._start(self.engines[turn % len(self.engines)], waiting, many)
        while self._going:
            yield self._finished()

    def _start(self, engine: Engine, waiting: list[tuple[Chunk, Any]], many: bool) -> None:
        parts = [part.result() if isinstance(part, Future) else part for _, part in waiting]
        self._going.append(([chunk for chunk, _ in waiting], engine.submit(parts, self.model.config, many)))

    def _batch_size(self, many: bool) -> int:
        if self._size is None and many:
            # Of whole chunks, so never fewer.
            self._size = max(_FEW, self.engines[0].best_batch(self.model.config, _most(self.order)))
        return self._size or _FEW

    def _is_done(self) -> bool:
        """Returns whether the next answer is there."""
        running = self._going[0][1]
        return running is None or running.done

    def _finished(self) -> Batch:
        chunks, running = self._going.popleft()
        answer = None if running is None else running.answer()
        items = [item for chunk in chunks for item in chunk.items]
        for chunk in chunks:
            chunk.release()
        return Batch(items, answer)
