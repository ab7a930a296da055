"""Decodes the images of a dataset into an array, through the pipeline that prediction reads with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from ..config import PreprocessConfig
from ..imaging.ahead import Order, Prepared, Unread, prepare, read_ahead
from ..imaging.image import ImageError
from .dataset import ImageDataset
from .deferred import RecordImages
from .pixels import Pixels


def is_deep(dataset: ImageDataset) -> bool:
    """Returns whether the first image has more than 8 bits, in which case others probably do too."""
    try:
        return dataset.image(0).bit_depth > 8
    except Exception:  # reported with its name when it is decoded
        return False


def decoded_image(dataset: ImageDataset, row: int, config: PreprocessConfig, in_chans: int) -> Prepared:
    """Returns one image in the size of the network's input, in the levels of its file, as `fill` keeps it.

    Raises:
        ImageError: it cannot be read.
    """
    return _read(prepare(dataset.image(row), _order(config, in_chans)))


def fill(
    out: Pixels,
    dataset: ImageDataset,
    config: PreprocessConfig,
    in_chans: int,
    workers: int | None,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> None:
    """Fills an array; see `cache_images` for the arguments."""

    def rows() -> Iterator[int]:
        chunks = read_ahead(RecordImages(dataset), _order(config, in_chans), workers=workers)
        row = 0
        with contextlib.closing(chunks):
            for chunk in chunks:
                for item in map(_read, chunk.items):
                    out.put(row, item.pixels, item.notes)
                    yield row
                    row += 1
                chunk.release()

    for _ in progress(rows()):
        pass


def _order(config: PreprocessConfig, in_chans: int) -> Order:
    return Order(config, in_chans, stored=True, sized=False)


def _read(item: Prepared | Unread) -> Prepared:
    if isinstance(item, Unread):
        raise item.cause or ImageError(item.error)
    return item
