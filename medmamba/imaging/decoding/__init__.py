"""Compressed frames: their own headers, and worker processes that decode them with limits of time and memory."""

from .codestream import StreamError, StreamHeader, parse_stream, rle_segments
from .pool import WorkerError, decode

__all__ = ["StreamError", "StreamHeader", "WorkerError", "decode", "parse_stream", "rle_segments"]
