"""Decoded images in memory: on small machines decoding, not the network, limits training."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PreprocessConfig
from ..preprocess import adapt_channels, resize
from .dataset import DatasetError, ImageDataset, to_tensor


class CachedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images of one size as a uint8 tensor, beside their labels.

    `cached[i]` is `(float32 (C, H, W), label)`, and `batch(indices)` the same for many at once, which is the fast
    path: one indexed copy of bytes, moved to the device before it becomes float.

    Attributes:
        images: uint8 `(N, H, W, C)`.
        targets: int64 `(N,)` or float32 `(N, K)`.
        index: the `ImageDataset` that was decoded: classes, patients, splits, paths.
        mean, std: float32 `(C,)`; pixels in [0, 1] become `(pixel - mean) / std`.
    """

    def __init__(
        self, images: Tensor, index: ImageDataset, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(index):
            raise DatasetError(f"expected uint8 ({len(index)}, H, W, C), got {images.dtype} {tuple(images.shape)}")
        self.images = images
        self.index = index
        self.targets = index.targets
        channels = images.shape[3]
        self.mean = torch.tensor(mean, dtype=torch.float32).expand(channels)
        self.std = torch.tensor(std, dtype=torch.float32).expand(channels)
        self._affine: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.batch([index])
        return images[0], targets[0]

    def batch(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """float32 `(B, C, H, W)` on `device`, normalised, and the labels of `indices` there."""
        # Where the images are: an index from elsewhere makes a GPU wait.
        chosen = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        images = self.images[chosen].to(device, non_blocking=True).permute(0, 3, 1, 2).float()  # (B, C, H, W)
        scale, shift = self._scale_and_shift(torch.device(device))
        return torch.addcmul(shift, images, scale), self.targets[chosen].to(device, non_blocking=True)

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(x / 255 - mean) / std as one multiplication and one addition: both (1, C, 1, 1)."""
        if device not in self._affine:
            scale = (1 / (255 * self.std)).view(1, -1, 1, 1)
            shift = (-self.mean / self.std).view(1, -1, 1, 1)
            self._affine[device] = (scale.to(device), shift.to(device))
        return self._affine[device]

    def split(self, name: str) -> CachedDataset:
        """One split, as a copy where the images are not contiguous."""
        part = self.index.split(name)
        rows = [i for i, record in enumerate(self.index.records) if record.split == name]
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        images = self.images[rows[0] : rows[0] + len(rows)] if contiguous else self.images[rows]
        return CachedDataset(images, part, self.mean.tolist(), self.std.tolist())


def cache_images(
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int = 3,
    *,
    file: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    processes: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CachedDataset:
    """Decode and resize every image once, as `medmamba.preprocess` does, and keep 8 bits of each channel.

    What the cache gives out is the model's preprocessing to within half a step of 255 (images of 16 bits lose the
    rest). The transform of `dataset` is not applied.

    Args:
        config: the model's `config.preprocess`: size, crop mode, interpolation, mean and std.
        in_chans: channels the model takes.
        file: keep the decoded images in this `.npy` file and map it next time. It is used again only if it was made
            from the same paths (or rows) with the same size and channels; an interrupted run leaves nothing behind.
        workers: threads that decode; by default as many as the machine has cores.
        processes: as many forks of this process instead, for many cores: threads keep about two of them busy. Needs
            `file` and a system with fork, in a process that has used neither a GPU nor threads; there is no progress.
        progress: wraps the iteration over the images, for example `tqdm`.

    Memory: N x H x W x C bytes, for 12,000 colour images at 224 pixels 1.8 GB.

    Raises:
        DatasetError: no images.
        ImageError: an image that cannot be read, with its path.
    """
    if len(dataset) == 0:
        raise DatasetError(f"{dataset.name} has no images")
    shape = (len(dataset), *config.input_size, in_chans)
    key = _key(dataset, config, in_chans)
    path = Path(file) if file is not None else None
    found = _load(path, key, shape) if path else None
    if found is None:
        # Of this process: others may be making the same file.
        partial = path.with_name(f"{path.name}.{os.getpid()}.part") if path else None
        found = np.lib.format.open_memmap(partial, "w+", np.uint8, shape) if partial else np.empty(shape, np.uint8)
        try:
            forked = processes > 1 and path is not None
            if not (forked and _fill_by_forks(found, dataset, config, in_chans, processes)):
                _fill(found, dataset, config, in_chans, workers, progress)
            if path and partial:
                found.flush()  # type: ignore[attr-defined]
                _sidecar(path).unlink(missing_ok=True)
                os.replace(partial, path)
                _sidecar(path).write_text(json.dumps({"key": key}))
        finally:
            if partial:
                partial.unlink(missing_ok=True)
    return CachedDataset(torch.from_numpy(found), dataset, config.mean, config.std)


def _fill(
    out: np.ndarray,
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int,
    workers: int | None,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    def work(index: int) -> int:
        out[index] = _decoded(dataset, index, config, in_chans)
        return index

    # One thread per image: threads within an operation, times those of the pool, would only stand in each other's way.
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


def _decoded(dataset: ImageDataset, index: int, config: PreprocessConfig, in_chans: int) -> np.ndarray:
    pixels = adapt_channels(to_tensor(dataset.image(index)), in_chans)  # (C, H, W)
    pixels = resize(pixels.unsqueeze(0), config)[0].permute(1, 2, 0)  # (H, W, C)
    return (pixels * 255).round().to(torch.uint8).numpy()


def _fill_by_forks(
    out: np.ndarray, dataset: ImageDataset, config: PreprocessConfig, in_chans: int, processes: int
) -> bool:
    """Fills an array that is mapped from a file; False where that cannot be done, or an image cannot be read (threads
    then say which)."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return False

    def work(first: int) -> None:
        torch.set_num_threads(1)
        for index in range(first, len(dataset), processes):
            out[index] = _decoded(dataset, index, config, in_chans)

    forks = [multiprocessing.get_context("fork").Process(target=work, args=(first,)) for first in range(processes)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join()
    return all(fork.exitcode == 0 for fork in forks)


def _key(dataset: ImageDataset, config: PreprocessConfig, in_chans: int) -> str:
    """Digest of what decides the bytes: the sources, and the settings apart from the normalisation."""
    settings = (config.input_size, config.crop_mode, config.interpolation, in_chans)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for record in dataset.records:
        digest.update(f"\0{record.source}".encode())
    return digest.hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _load(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images in `path` if they are what `key` stands for, mapped copy-on-write; None to make them anew."""
    try:
        if json.loads(_sidecar(path).read_text())["key"] != key:
            return None
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, KeyError):
        return None
    return images if images.dtype == np.uint8 and images.shape == shape else None
