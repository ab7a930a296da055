"""Decodes the images of a dataset into an array, in threads or in processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..config import PreprocessConfig
from ..imaging.load import MedicalImage
from ..imaging.preprocess import adapt_channels, resize
from ..utils.text import json_text
from .dataset import ImageDataset, to_tensor
from .pixels import Pixels

_TOO_DEEP = 17  # exit code of a process that found an image of more than 8 bits


def is_deep(dataset: ImageDataset) -> bool:
    """Returns whether the first image has more than 8 bits, in which case others probably do too."""
    try:
        return dataset.image(0).bit_depth > 8
    except Exception:  # reported with its name when it is decoded
        return False


def decoded_image(
    dataset: ImageDataset, row: int, config: PreprocessConfig, in_chans: int
) -> tuple[Tensor, MedicalImage]:
    """Returns the resized pixels, (H, W, C) in [0, 1], and the image as read."""
    image = dataset.image(row)
    pixels = adapt_channels(to_tensor(image), in_chans)  # (C, H, W)
    return resize(pixels.unsqueeze(0), config)[0].permute(1, 2, 0), image


def fill(
    out: Pixels,
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int,
    workers: int | None,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Fills an array in threads; see `cache_images` for the arguments."""

    def work(row: int) -> int:
        pixels, image = decoded_image(dataset, row, config, in_chans)
        out.put(row, pixels, image.bit_depth > 8, image.notes)
        return row

    # One thread per image: threads within an operation, times those of the pool, would oversubscribe the cores.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in progress(pool.map(work, range(len(dataset)))):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def fill_by_forks(out: Pixels, dataset: ImageDataset, config: PreprocessConfig, in_chans: int, processes: int) -> bool:
    """Fills a memory-mapped array in forked processes.

    Returns False if that is not possible, or if an image cannot be read; threads then report which.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return False

    def work(first: int, folder: str) -> None:
        torch.set_num_threads(1)
        for row in range(first, len(dataset), processes):
            pixels, image = decoded_image(dataset, row, config, in_chans)
            if image.bit_depth > 8 and not out.deep:
                sys.exit(_TOO_DEEP)  # the array of all processes must change
            out.put(row, pixels, image.bit_depth > 8, image.notes)
        Path(folder, str(first)).write_text(json_text(list(out.notes.items())), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        forks = [context.Process(target=work, args=(first, folder)) for first in range(processes)]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join()
        codes = {fork.exitcode for fork in forks}
        if codes == {0}:
            for file in Path(folder).iterdir():
                found = json.loads(file.read_text(encoding="utf-8"))
                out.notes.update({int(row): tuple(texts) for row, texts in found})
            return True
    if _TOO_DEEP not in codes or out.deep:
        return False
    out.widen()
    return fill_by_forks(out, dataset, config, in_chans, processes)
