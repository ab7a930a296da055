"""Caches decoded images in memory or in a file: on small machines decoding, not the network, limits training."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PreprocessConfig
from ..utils.files import clear_space_errors, locked, write_text
from ..utils.text import json_text
from .dataset import DatasetError, ImageDataset
from .decode import fill, is_deep
from .identity import FileIndex, contents, files_of, reading_code
from .pixels import Pixels, Warnings
from .prefetch import in_advance

FORMAT = 4
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class _Stale(Exception):
    """Reason why a file of decoded images cannot be used; empty if there is no file."""


class CachedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images of one size as a uint8 or uint16 tensor, with their labels.

    `cached[i]` is `(float32 (C, H, W), label)`, and `batch(indices)` the same for many at once, which is the fast
    path: one indexed copy of bytes, moved to the device before it becomes float.

    Attributes:
        images: `(N, H, W, C)`; uint8 where all files have 8 bits, else uint16.
        targets: int64 `(N,)` or float32 `(N, K)`.
        index: the `ImageDataset` that was decoded: classes, patients, splits, paths.
        mean, std: float32 `(C,)`; pixels in [0, 1] become `(pixel - mean) / std`.
        warnings: warnings of the readers by text, with the rows of the images concerned.
    """

    def __init__(
        self,
        images: Tensor,
        index: ImageDataset,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        warnings: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if images.dtype not in (torch.uint8, torch.uint16) or images.ndim != 4 or len(images) != len(index):
            raise DatasetError(
                f"expected uint8 or uint16 ({len(index)}, H, W, C), got {images.dtype} {tuple(images.shape)}"
            )
        self.images = images
        self._describe(index, images.shape[3], mean, std, warnings)

    def _describe(
        self,
        index: ImageDataset,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        warnings: Mapping[str, Sequence[int]] | None,
    ) -> None:
        self.index = index
        self.targets = index.targets
        self.warnings = {text: list(rows) for text, rows in (warnings or {}).items() if rows}
        self.mean = torch.tensor(mean, dtype=torch.float32).expand(channels)
        self.std = torch.tensor(std, dtype=torch.float32).expand(channels)
        self._affine: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.batch([index])
        return images[0], targets[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def device(self) -> torch.device:
        """Device on which indices are best given: an index from elsewhere makes a GPU wait."""
        return self.images.device

    def batch(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Returns normalised images, float32 `(B, C, H, W)`, and labels at `indices`, both on `device`."""
        chosen = torch.as_tensor(indices).to(self.device, non_blocking=True)
        deep = self.images.dtype == torch.uint16
        stored = self.images.view(torch.int16) if deep else self.images  # few operations know uint16
        return self._normalised(stored[chosen], device), self.targets[chosen].to(device, non_blocking=True)

    def batches(self, parts: Iterable[Tensor], device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yields `batch(part)` of each part; a set on disk, and one in memory before a GPU, collects them ahead."""
        if torch.device(device).type != "cuda" or self.device.type != "cpu":
            for part in parts:
                yield self.batch(part, device)
            return
        # A copy from memory that is not pinned waits for all that the GPU has been asked to do before.
        ours, theirs = itertools.tee(torch.as_tensor(part) for part in parts)
        for rows, stored in zip(ours, in_advance(self._collected, theirs, readers=1), strict=True):
            yield self._normalised(stored, device), self.targets[rows].to(device, non_blocking=True)

    def _collected(self, rows: Tensor, pin: bool = True) -> Tensor:
        """Returns the stored pixels (B, H, W, C) of rows in memory, pinned for a GPU; a single thread does it.

        The threads of PyTorch would be started once more for the thread that calls this.
        """
        found = rows.numpy()
        if found.size and not 0 <= found.min() <= found.max() < len(self):
            raise IndexError(f"rows {found.min()} to {found.max()} of {len(self)} images")
        out = torch.empty((len(found), *self.images.shape[1:]), dtype=self.images.dtype, pin_memory=pin)
        np.take(self.images.numpy(), found, axis=0, out=out.numpy(), mode="clip")  # "raise" makes another copy
        return out

    def _normalised(self, stored: Tensor, device: torch.device | str) -> Tensor:
        """Returns stored pixels (B, H, W, C) as float32 (B, C, H, W) on `device`."""
        deep = stored.dtype != torch.uint8
        stored = stored.view(torch.int16) if deep else stored
        images = stored.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images = (images.int() & 0xFFFF).float() if deep else images.float()
        scale, shift = self._scale_and_shift(torch.device(device), 65535 if deep else 255)
        return torch.addcmul(shift, images, scale)

    def _scale_and_shift(self, device: torch.device, largest: int) -> tuple[Tensor, Tensor]:
        """Returns (x / largest - mean) / std as one scale and one shift, each (1, C, 1, 1)."""
        key = (device, largest)
        if key not in self._affine:
            scale = (1 / (largest * self.std)).view(1, -1, 1, 1)
            shift = (-self.mean / self.std).view(1, -1, 1, 1)
            self._affine[key] = (scale.to(device), shift.to(device))
        return self._affine[key]

    def split(self, name: str) -> CachedDataset:
        """Returns one split; a copy if its images are not contiguous."""
        part = self.index.split(name)
        rows = [i for i, record in enumerate(self.index.records) if record.split == name]
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        images = self.images[rows[0] : rows[0] + len(rows)] if contiguous else self.images[rows]
        place = {row: i for i, row in enumerate(rows)}
        said = {text: [place[row] for row in where if row in place] for text, where in self.warnings.items()}
        return CachedDataset(images, part, self.mean.tolist(), self.std.tolist(), said)

    def warning_lines(self) -> list[str]:
        """Returns one line per kind of reader warning: number of images, text, and an example."""
        records = self.index.records
        return [
            f"warning: {len(rows)} of {len(self)} images: {text} (such as {records[rows[0]].source})"
            for text, rows in self.warnings.items()
        ]


def cache_images(
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int = 3,
    *,
    file: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    processes: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    files: FileIndex | None = None,
) -> CachedDataset:
    """Decodes and resizes every image once, as prediction does, and keeps as many bits as the files have.

    The result equals the model's preprocessing to within half a step of 255, or of 65535 if any file has more than 8
    bits per channel. The transform of `dataset` is not applied.

    Args:
        config: the model's `config.preprocess`: size, crop mode, interpolation, mean and std.
        in_chans: channels the model takes.
        file: keep the decoded images in this `.npy` file and map it next time. It is used again only if it was made
            from files with the same content, in the same order, with the same size and channels and by the same
            readers; otherwise they are decoded again, with a warning that says why. An interrupted run leaves nothing
            behind, and of several processes that want the same file one makes it.
        workers: processes that decode, see `medmamba.imaging.ahead.read_ahead`: None starts one per core once more
            than two seconds of decoding are left, 0 none.
        processes: the same, under the name of earlier versions, if more than 1.
        progress: wraps the iteration over the images, for example `tqdm`.
        files: known hashes of files; the others are read.

    Memory: N x H x W x C bytes, for 12,000 colour images at 224 pixels 1.8 GB; twice that above 8 bits.

    Raises:
        DatasetError: no images, or a folder for `file` that cannot be written.
        DiskFullError: no space for `file`.
        ImageError: an image that cannot be read, with its path.
    """
    if len(dataset) == 0:
        raise DatasetError(f"{dataset.name} has no images")

    def decode(pixels: Pixels) -> None:
        fill(pixels, dataset, config, in_chans, processes if processes > 1 else workers, progress)

    if file is None:
        with Pixels((len(dataset), *config.input_size, in_chans), is_deep(dataset)) as pixels:
            decode(pixels)
            found, said = pixels.array, pixels.warnings()
    else:
        found, said = _from_file(Path(file), dataset, (config, in_chans), files or FileIndex(), decode)
    return CachedDataset(torch.from_numpy(found), dataset, config.mean, config.std, said)


def _from_file(
    path: Path,
    dataset: ImageDataset,
    settings: tuple[PreprocessConfig, int],
    index: FileIndex,
    fill: Callable[[Pixels], None],
) -> tuple[np.ndarray, Warnings]:
    """Loads the decoded images from `path`, decoding them first if needed."""
    shape = (len(dataset), *settings[0].input_size, settings[1])
    index.add(_sidecar(path).get("files"))
    key = _key(dataset, *settings, index)
    sources = files_of(dataset)
    with contextlib.suppress(_Stale):
        return _load(path, key, shape, sources, index)
    lock = path.with_name(f".{path.name}.lock")
    with _clear_errors(path), locked(lock, f"{path} is being made", remove=True):
        try:
            return _load(path, key, shape, sources, index)  # another process may have made it meanwhile
        except _Stale as reason:
            if str(reason):
                warnings.warn(f"{path}: {reason}; all images are decoded again", stacklevel=4)
        with Pixels(shape, is_deep(dataset), path) as pixels:
            fill(pixels)
            said = pixels.warnings()
            _sidecar_path(path).unlink(missing_ok=True)  # until it is written again, there is nothing to use
            pixels.publish()
        record = {"format": FORMAT, **key, "images": index.hashes([path], digest=_checksum)[0], "warnings": said}
        _write_sidecar(path, record, [*sources, path], index)
    return _map(path, shape), said


def _load(
    path: Path, key: dict[str, str], shape: tuple[int, ...], sources: list[Path], index: FileIndex
) -> tuple[np.ndarray, Warnings]:
    """Loads images and warnings from `path`.

    Raises:
        _Stale: no such file, damaged, or made from other images or settings.
    """
    record = _sidecar(path)
    if not path.is_file() and not record:
        raise _Stale
    if record.get("format") != FORMAT or "images" not in record:
        raise _Stale("damaged, or written by an earlier version")
    for name, reason in _REASONS.items():
        if record.get(name) != key[name]:
            raise _Stale(reason)
    if index.hashes([path], digest=_checksum) != [record["images"]]:
        raise _Stale("damaged")
    try:
        images = _map(path, shape)
        said = {str(text): [int(row) for row in rows] for text, rows in record["warnings"].items()}
    except _UNREADABLE:
        raise _Stale("damaged") from None
    if index.table([*sources, path]) != record.get("files"):  # times changed, or too recent to be trusted
        with contextlib.suppress(OSError):
            _write_sidecar(path, record, [*sources, path], index)
    return images, said


def _key(dataset: ImageDataset, config: PreprocessConfig, in_chans: int, index: FileIndex) -> dict[str, str]:
    """Returns digests of all that determines the pixels: names in order, contents, settings, code."""
    settings = (config.input_size, config.crop_mode, config.interpolation, in_chans)
    return {
        "settings": _digest([repr(settings)]),
        "sources": _digest(str(record.source) for record in dataset.records),
        "contents": _digest(contents(dataset, index)),
        "code": reading_code(),
    }


_REASONS = {
    "settings": "made for another size or with other settings",
    "sources": "made of other images",
    "contents": "some of its images have changed since",
    "code": "made by other versions of the code that reads images",
}


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:32]


def _checksum(file: Any) -> str:
    """Returns a checksum of an open file of decoded images, which detects damage and takes a sixth of SHA-256's time.

    SHA-256 of the sums of the 64-bit words of each 4 KiB: blind only to words exchanged within 4 KiB and to changes
    that cancel out.
    """
    digest, block, size = hashlib.sha256(), memoryview(bytearray(2**18)), 0
    words = np.frombuffer(block, np.uint64).reshape(-1, 512)
    while count := file.readinto(block[size:]):
        size += count
        if size == len(block):
            digest.update(words.sum(1, dtype=np.uint64))
            size = 0
    digest.update(block[:size])
    return digest.hexdigest()[:32]


def _sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sidecar(path: Path) -> dict[str, Any]:
    """Returns the record beside the file, or {} if it cannot be read."""
    try:
        found = json.loads(_sidecar_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_sidecar(path: Path, record: dict[str, Any], files: list[Path], index: FileIndex) -> None:
    write_text(_sidecar_path(path), json_text({**record, "files": index.table(files)}))


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Maps the images of a file copy-on-write.

    Raises:
        OSError, ValueError: cut short, or not what was expected.
    """
    images = np.load(path, mmap_mode="c", allow_pickle=False)
    if images.dtype not in (np.uint8, np.uint16) or images.shape != shape:
        raise ValueError(f"{path} holds {images.dtype} {images.shape}")
    return images


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turns errors of the cache folder into a clear message."""
    with clear_space_errors(path):
        try:
            yield
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            raise DatasetError(
                f"{path.parent} cannot hold decoded images ({error.strerror}); choose another folder for them "
                "(cache=, --cache), or none"
            ) from error
