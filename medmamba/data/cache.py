"""Caches decoded images in memory or in a file: on small machines decoding, not the network, limits training."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import PreprocessConfig
from ..imaging.load import MedicalImage
from ..imaging.preprocess import adapt_channels, resize
from ..utils.files import clear_space_errors, locked, write_text
from ..utils.text import json_text
from .dataset import DatasetError, ImageDataset, to_tensor
from .identity import FileIndex, contents, files_of, reading_code
from .pixels import Pixels, Warnings

FORMAT = 3
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_TOO_DEEP = 17  # exit code of a process that found an image of more than 8 bits


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
        self.index = index
        self.targets = index.targets
        self.warnings = {text: list(rows) for text, rows in (warnings or {}).items() if rows}
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
        """Returns normalised images, float32 `(B, C, H, W)`, and labels at `indices`, both on `device`."""
        # Where the images are: an index from elsewhere makes a GPU wait.
        chosen = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        deep = self.images.dtype == torch.uint16
        stored = self.images.view(torch.int16) if deep else self.images  # few operations know uint16
        images = stored[chosen].to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, C, H, W)
        images = (images.int() & 0xFFFF).float() if deep else images.float()
        scale, shift = self._scale_and_shift(torch.device(device))
        return torch.addcmul(shift, images, scale), self.targets[chosen].to(device, non_blocking=True)

    def _scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns (x / largest - mean) / std as one scale and one shift, each (1, C, 1, 1)."""
        if device not in self._affine:
            largest = 255 if self.images.dtype == torch.uint8 else 65535
            scale = (1 / (largest * self.std)).view(1, -1, 1, 1)
            shift = (-self.mean / self.std).view(1, -1, 1, 1)
            self._affine[device] = (scale.to(device), shift.to(device))
        return self._affine[device]

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
        workers: threads that decode; by default as many as the machine has cores.
        processes: as many forks of this process instead, for many cores: threads keep about two of them busy. Needs
            `file` and fork, in a process that has used neither a GPU nor threads; progress is not shown.
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

    def fill(pixels: Pixels) -> None:
        if processes == 1 or pixels.path is None or not _fill_by_forks(pixels, dataset, config, in_chans, processes):
            _fill(pixels, dataset, config, in_chans, workers, progress)

    if file is None:
        with Pixels((len(dataset), *config.input_size, in_chans), _is_deep(dataset)) as pixels:
            fill(pixels)
            found, said = pixels.array, pixels.warnings()
    else:
        found, said = _from_file(Path(file), dataset, (config, in_chans), files or FileIndex(), fill)
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
        with Pixels(shape, _is_deep(dataset), path) as pixels:
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


def _is_deep(dataset: ImageDataset) -> bool:
    """Returns whether the first image has more than 8 bits, in which case others probably do too."""
    try:
        return dataset.image(0).bit_depth > 8
    except Exception:  # reported with its name when it is decoded
        return False


def _decoded(dataset: ImageDataset, row: int, config: PreprocessConfig, in_chans: int) -> tuple[Tensor, MedicalImage]:
    """Returns the resized pixels, (H, W, C) in [0, 1], and the image as read."""
    image = dataset.image(row)
    pixels = adapt_channels(to_tensor(image), in_chans)  # (C, H, W)
    return resize(pixels.unsqueeze(0), config)[0].permute(1, 2, 0), image


def _fill(
    out: Pixels,
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int,
    workers: int | None,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    def work(row: int) -> int:
        pixels, image = _decoded(dataset, row, config, in_chans)
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


def _fill_by_forks(out: Pixels, dataset: ImageDataset, config: PreprocessConfig, in_chans: int, processes: int) -> bool:
    """Fills a memory-mapped array in forked processes.

    Returns False if that is not possible, or if an image cannot be read; threads then report which.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return False

    def work(first: int, folder: str) -> None:
        torch.set_num_threads(1)
        for row in range(first, len(dataset), processes):
            pixels, image = _decoded(dataset, row, config, in_chans)
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
    return _fill_by_forks(out, dataset, config, in_chans, processes)
