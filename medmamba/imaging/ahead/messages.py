"""What travels between the processes: jobs to a child as pickle, since they come from us, answers as JSON, since it is
the child that decodes files from strangers."""

from __future__ import annotations

import builtins
import itertools
import json
import struct
from typing import Any, BinaryIO

import numpy as np

from .. import image as errors
from .order import Prepared, Unread

_LENGTH = struct.Struct("<Q")
_LARGEST = 1 << 28
_DTYPES = {"B": np.uint8, "H": np.uint16, "f": np.float32}


def send(stream: BinaryIO, content: bytes) -> None:
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def receive(stream: BinaryIO) -> bytes:
    """Returns one message.

    Raises:
        EOFError: the other side is gone.
    """
    head = _exactly(stream, _LENGTH.size)
    (length,) = _LENGTH.unpack(head)
    if length > _LARGEST:
        raise EOFError
    return _exactly(stream, length)


def put(items: list[Prepared | Unread], memory: memoryview) -> bytes:
    """Writes pixels one after another into the memory, and returns all else as a message."""
    rows: list[Any] = []
    offset = 0
    for item in items:
        if isinstance(item, Unread):
            rows.append([item.source, item.error, _described(item.cause)])
            continue
        pixels = np.ascontiguousarray(item.pixels)
        np.frombuffer(memory, pixels.dtype, pixels.size, offset)[:] = pixels.ravel()
        offset += pixels.nbytes + -pixels.nbytes % 4
        rows.append([item.source, item.notes, pixels.dtype.char, pixels.shape, item.deep, item.encoded])
        rows[-1].append(item.picture_notes_at)
    return json.dumps(rows).encode("utf-8", "surrogatepass")


def take(message: bytes, memory: memoryview) -> tuple[list[Prepared | Unread], list[np.ndarray]]:
    """Returns what `put` was given, and the pixels of neighbours of one kind as arrays (n, h, w, c).

    Both are views of the memory.

    Raises:
        EOFError: the message makes no sense.
    """
    items: list[Prepared | Unread] = []
    runs: list[np.ndarray] = []
    offset = 0
    try:
        rows = json.loads(message)
        for (kind, *shape), group in itertools.groupby(rows, _kind_of):
            if kind == "unread":
                items += [Unread(name, text, _remade(described, text)) for name, text, described in group]
                continue
            dtype, (height, width, channels) = np.dtype(_DTYPES[kind]), shape
            size = height * width * channels * dtype.itemsize
            together = list(group)
            for part in [together] if size % 4 == 0 else [[row] for row in together]:
                count = len(part)
                run = np.frombuffer(memory, dtype, count * size // dtype.itemsize, offset)
                run = run.reshape(count, height, width, channels)
                offset += count * (size + -size % 4)
                runs.append(run)
                for (source, notes, _, _, deep, encoded, at), pixels in zip(part, run, strict=True):
                    items.append(Prepared(source, notes, pixels, deep, tuple(encoded) if encoded else None, at))
    except (ValueError, KeyError, TypeError, IndexError):
        raise EOFError from None
    return items, runs


def _kind_of(row: list[Any]) -> tuple[Any, ...]:
    return ("unread",) if len(row) == 3 else (row[2], *row[3])


def _described(error: Exception | None) -> list[Any]:
    attributes = {k: v for k, v in vars(error).items() if isinstance(v, int | float | str | tuple)} if error else {}
    return [type(error).__name__, attributes]


def _remade(described: list[Any], text: str) -> Exception:
    """Returns an error of the same type where that is one of ours or of Python's, with its attributes."""
    name, attributes = described
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ValueError | OSError | MemoryError)):
        kind = errors.ImageError
    try:
        error = kind(text)
    except TypeError:  # UnicodeDecodeError and its like
        error = errors.ImageError(text)
    for key, value in attributes.items():
        error.__dict__[key] = tuple(value) if isinstance(value, list) else value
    return error


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts, missing = [], count
    while missing:
        part = stream.read(missing)
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
