"""Reads images ahead of their use: in order, in as many processes as there are cores, and in bounded memory.

`read_ahead` is the way in. `order` says what is done to one image, `process` and `child` are the two ends of a process,
`memory` is what they share.
"""

from .decoders import CHUNK, Chunk, cores, read_ahead
from .order import Deferred, Order, Prepared, Unread, constant_note, prepare, prepare_bytes, read_source

__all__ = [
    "CHUNK",
    "Chunk",
    "Deferred",
    "Order",
    "Prepared",
    "Unread",
    "constant_note",
    "cores",
    "prepare",
    "prepare_bytes",
    "read_ahead",
    "read_source",
]
