"""Images that stay on disk during training: read, or decoded, a few batches before they are needed."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import PreprocessConfig
from .cache import CachedDataset
from .dataset import DatasetError, ImageDataset
from .decode import decoded_image, is_deep
from .pixels import group_warnings, said_by
from .prefetch import AHEAD, in_advance

Notes = dict[int, tuple[str, ...]]
Batch = tuple[Tensor, Notes]  # pixels (B, H, W, C), uint8 or uint16, and warnings of the readers by row


class Source(Protocol):
    """Where the pixels of a `StreamedDataset` come from.

    Attributes:
        shape: (N, H, W, C).
    """

    shape: tuple[int, int, int, int]

    def batches(self, parts: Iterable[Sequence[int]], pin: bool) -> Iterator[Batch]:
        """Yields the pixels of each part in turn, in pinned memory if `pin`."""
        ...


class StreamedDataset(CachedDataset):
    """Has the interface and the values of `CachedDataset`, without holding the images.

    Memory: `AHEAD` batches, whatever the number of images.

    Args:
        source: gives the pixels.
        index, mean, std, warnings: as of `CachedDataset`.
    """

    def __init__(
        self,
        source: Source,
        index: ImageDataset,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        warnings: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if source.shape[0] != len(index):
            raise DatasetError(f"expected {len(index)} images, got {source.shape[0]}")
        self.source = source
        self._describe(index, source.shape[3], mean, std, warnings)
        self._said: Notes = {}

    def __len__(self) -> int:
        return self.source.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.source.shape[1], self.source.shape[2]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def batch(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        return next(self.batches([torch.as_tensor(indices)], device))

    def batches(self, parts: Iterable[Tensor], device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        pin = torch.device(device).type == "cuda"
        ours, theirs = itertools.tee(torch.as_tensor(part).cpu() for part in parts)
        found = self.source.batches((part.tolist() for part in theirs), pin)
        for rows, (stored, notes) in zip(ours, found, strict=True):
            if notes:
                self._said |= notes
                self.warnings = group_warnings(self._said)
            targets = self.targets[rows]
            yield self._normalised(stored, device), targets.to(device, non_blocking=True)

    def split(self, name: str) -> CachedDataset:
        raise DatasetError("a streamed dataset cannot be split; split the images first")


class StoredImages:
    """Source of decoded images in a `.npy` file, as `cache_images` writes it.

    Reads with `pread`, not through a memory map: the pages of a map count as memory of the process, and each is
    fetched by a fault that blocks the thread.

    Raises:
        OSError, ValueError: no such file, cut short, or not one of images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        if mapped.dtype not in (np.uint8, np.uint16) or mapped.ndim != 4 or not mapped.flags.c_contiguous:
            raise ValueError(f"{self.path} holds {mapped.dtype} {mapped.shape}, not decoded images")
        self.shape: tuple[int, int, int, int] = mapped.shape
        self._dtype, self._offset = mapped.dtype, int(mapped.offset)
        self._mapped = None if hasattr(os, "preadv") else mapped
        self._stride = int(np.prod(self.shape[1:])) * mapped.dtype.itemsize

    def batches(self, parts: Iterable[Sequence[int]], pin: bool) -> Iterator[Batch]:
        with self.path.open("rb", buffering=0) as file:
            yield from in_advance(lambda rows: (self._read(file.fileno(), rows, pin), {}), parts)

    def _read(self, file: int, rows: Sequence[int], pin: bool) -> Tensor:
        kind = torch.uint8 if self._dtype == np.uint8 else torch.uint16
        out = torch.empty((len(rows), *self.shape[1:]), dtype=kind, pin_memory=pin)
        if self._mapped is not None:
            np.take(self._mapped, rows, axis=0, out=out.numpy())
            return out
        flat = out.numpy().view(np.uint8).reshape(len(rows), -1)
        for place, row in enumerate(rows):
            done = 0
            while done < self._stride:
                start = self._offset + row * self._stride + done
                count = os.preadv(file, [flat[place, done:].data], start)
                if count == 0:
                    raise OSError(f"{self.path} has become shorter; was it replaced during training?")
                done += count
        return out


class DecodedAnew:
    """Source that decodes each image whenever it is asked for, in worker processes.

    For sets whose decoded images do not even fit on the disk. The pixels are those of `cache_images`.

    Args:
        index: the images.
        config: size, crop mode and interpolation.
        in_chans: channels the model takes.
        workers: processes that decode; 0: this one.
    """

    def __init__(self, index: ImageDataset, config: PreprocessConfig, in_chans: int, workers: int = 0) -> None:
        self.shape = (len(index), *config.input_size, in_chans)
        self.workers = workers
        self._images = _Images(index, config, in_chans, is_deep(index))

    def batches(self, parts: Iterable[Sequence[int]], pin: bool) -> Iterator[Batch]:
        parts = list(parts)
        workers = min(self.workers, len(parts)) if len(parts) > 1 else 0
        loader = DataLoader(
            _Parts(self._images, parts),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, -(-AHEAD // workers)) if workers else None,
            generator=torch.Generator(),  # else it draws from the generator of the network
        )
        for found in loader:
            if isinstance(found, Exception):
                raise found
            stored, notes = found
            yield (stored.pin_memory() if pin else stored), notes


@dataclasses.dataclass
class _Images:
    index: ImageDataset
    config: PreprocessConfig
    in_chans: int
    deep: bool

    def stack(self, rows: Sequence[int]) -> Batch:
        found = [decoded_image(self.index, row, self.config, self.in_chans) for row in rows]
        # In a set of 8 bits an image of 16 makes its batch one of 16, in which level v of 255 is level 257 v of 65535.
        deep = self.deep or any(image.deep for image in found)
        out = np.empty((len(rows), *self.config.input_size, self.in_chans), np.uint16 if deep else np.uint8)
        for place, image in enumerate(found):
            widened = deep and image.pixels.dtype == np.uint8
            out[place] = image.pixels.astype(np.uint16) * 257 if widened else image.pixels
        notes = {row: said for row, image in zip(rows, found, strict=True) if (said := said_by(image.notes))}
        return torch.from_numpy(out), notes


class _Parts(Dataset[Any]):
    """One item per batch; an exception is returned rather than raised, which would lose its type and text."""

    def __init__(self, images: _Images, parts: list[Sequence[int]]) -> None:
        self.images, self.parts = images, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> Batch | Exception:
        try:
            return self.images.stack(self.parts[place])
        except (ValueError, OSError) as error:
            return error
