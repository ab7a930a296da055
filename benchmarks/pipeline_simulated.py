"""What the pipeline itself loses: processes that sleep instead of decoding, and a GPU that takes its time without one.

    python benchmarks/pipeline_simulated.py --workers 16 --decode 1.05 1.64 --gpu 14000 --batch-size 64 256

Two cores are enough to see how well 16 processes and a GPU are kept busy. Everything but decoding and the network is
`iter_predict` as it is: jobs, shared memory, order, batches on their way, and results. Prints images per second without
the first fifth, beside what the processes and the GPU alone would give.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

# The processes that read import this module for `Asleep`: PyTorch is imported where it is used.
from medmamba.imaging.ahead import Deferred
from medmamba.imaging.load import load_image

SIDE, CLASSES, FEATURES = 32, 8, 256


class Asleep(Deferred):
    """An image that takes `seconds` to read, without a processor."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @property
    def name(self) -> str:
        return "asleep"

    def read(self, frame: Any, window: Any) -> Any:
        time.sleep(self.seconds)
        return picture()


@functools.cache
def picture() -> Any:
    return load_image(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


class SimulatedGpu:
    """Stands in for `Engine`: batches one after another, at a rate.

    Args:
        rate: images per second.
        launch: seconds of the caller per batch.
    """

    device = SimpleNamespace(type="cuda")

    def __init__(self, rate: float, launch: float) -> None:
        self.rate, self.launch, self.free_at = rate, launch, 0.0

    def transfer(self, chunk: Any) -> int:
        return len(chunk.items)

    def submit(self, parts: list[int], *_: Any) -> SimulatedBatch:
        end = time.perf_counter() + self.launch
        while time.perf_counter() < end:
            pass
        self.free_at = max(self.free_at, time.perf_counter()) + sum(parts) / self.rate
        return SimulatedBatch(sum(parts), self.free_at)


class SimulatedBatch:
    def __init__(self, count: int, ready_at: float) -> None:
        self.count, self.ready_at = count, ready_at

    @property
    def done(self) -> bool:
        return time.perf_counter() >= self.ready_at

    def answer(self) -> Any:
        import torch

        from medmamba.inference.engine import Answer

        time.sleep(max(self.ready_at - time.perf_counter(), 0))
        return Answer(torch.zeros(self.count, FEATURES), torch.randn(self.count, CLASSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--decode", type=float, nargs="+", default=[1.05], help="milliseconds per image and process")
    parser.add_argument("--gpu", type=float, default=14000, help="images per second")
    parser.add_argument("--launch", type=float, default=1.0, help="milliseconds of the caller per batch")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--images", type=int, default=40000)
    args = parser.parse_args()
    import torch

    from medmamba import create_model
    from medmamba.inference import stream

    torch.set_num_threads(1)
    model = create_model("nano", num_classes=CLASSES, preprocess={"input_size": (SIDE, SIDE)}).eval()
    stream.Engine = lambda *_: SimulatedGpu(args.gpu, args.launch / 1e3)  # type: ignore[assignment, misc]
    # All at once, the processes take long to start on few cores.
    stream.read_ahead = functools.partial(stream.read_ahead, wait=True)  # type: ignore[assignment]
    stream.pinned = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    print("| ms per image | batch | processes alone/s | GPU alone/s | end to end/s | of the slower |")
    print("| --- | --- | --- | --- | --- | --- |")
    for decode in args.decode:
        for size in args.batch_size:
            alone = 1e3 * args.workers / decode
            found = rate(model, decode, size, args.images, args.workers)
            share = found / min(alone, args.gpu)
            print(f"| {decode} | {size} | {alone:.0f} | {args.gpu:.0f} | {found:.0f} | {share:.2f} |", flush=True)


def rate(model: Any, decode: float, size: int, count: int, workers: int) -> float:
    """Returns images per second without the first fifth."""
    from pipeline_simulated import Asleep  # by its name other processes find it

    from medmamba.inference.predict import iter_predict

    # Sleeping is inexact for a millisecond: the time of 16 images at once, as many as are in a job.
    asleep, awake = Asleep(16 * decode / 1e3), Asleep(0)

    def sources() -> Iterator[Any]:
        for i in range(count):
            yield awake if i % 16 else asleep

    begin, start = count // 5, 0.0
    results = iter_predict(model, sources(), batch_size=size, workers=workers, devices=["cuda:0"])
    for done, _ in enumerate(results, 1):
        if done == begin:
            start = time.perf_counter()
    return (count - begin) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
