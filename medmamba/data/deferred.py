"""Images of a data set for the processes that read ahead."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import lru_cache

from ..imaging.ahead import Deferred
from ..imaging.image import ImageError, MedicalImage, Window
from .dataset import ImageDataset, Reader, Record

_LARGEST = 1 << 16  # bytes of a pickled reader; more are arrays in memory, which need no decoding


class RecordImage(Deferred):
    """One record of a data set, with its reader."""

    def __init__(self, record: Record, shared: _Shared) -> None:
        self.record, self._shared = record, shared
        self.portable = shared.packed is not None

    @property
    def name(self) -> str:
        return str(self.record.source)

    def read(self, frame: int | None, window: Window | None) -> MedicalImage:
        if frame is not None or window is not None:
            raise ImageError(f"{self.name}: the reader of the data set says which frame and window")
        return self._shared.reader.read(self.record)


class RecordImages:
    """The images of a data set in order, as `read_ahead` takes them."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._records = dataset.records
        self._shared = _Shared(dataset.reader)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RecordImage]:
        return (RecordImage(record, self._shared) for record in self._records)


class _Shared:
    """A reader, which each process makes once."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.packed: bytes | None = None
        if type(reader).__module__ == "__main__":
            return
        try:
            packed = pickle.dumps(reader)
        except Exception:  # a reader of the caller's with anything in it
            return
        if len(packed) <= _LARGEST and b"__main__" not in packed:
            self.packed = packed

    def __reduce__(self) -> tuple[object, ...]:
        return _unpacked, (self.packed,)


@lru_cache(maxsize=8)
def _unpacked(packed: bytes) -> _Shared:
    return _Shared(pickle.loads(packed))
