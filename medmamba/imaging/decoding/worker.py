"""Decodes compressed frames in a separate process; started as a script by `decoding.pool`.

Native decoders abort, crash, hang or allocate without bound on damaged data, which cannot be contained within one
process. This script reads jobs from its standard input and writes pixels to its standard output. It imports pydicom
and NumPy only. Each message is two lengths, a JSON object and raw bytes: no pickle, in either direction.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose modules must not hide others

import contextlib
import faulthandler
import json
import os
import signal
import struct
from typing import Any, BinaryIO

SCRIPT = os.path.abspath(__file__)
LENGTHS = struct.Struct("<QQ")
_POLL_MS = 2000


def read_exactly(stream: BinaryIO, size: int) -> bytearray:
    """Returns `size` bytes of an unbuffered stream.

    Raises:
        EOFError: the other side is gone.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count
    return data


def write_all(stream: BinaryIO, *parts: "bytes | bytearray | memoryview") -> None:
    """Writes all of `parts` to an unbuffered stream, which takes as much at a time as its pipe holds."""
    for part in parts:
        view = memoryview(part).cast("B") if len(part) else memoryview(b"")
        while len(view):
            view = view[stream.write(view) or 0 :]


def pack(header: dict, payload_size: int) -> bytes:
    """Returns the beginning of a message: both lengths and the header as JSON."""
    text = json.dumps(header, allow_nan=False).encode()
    return LENGTHS.pack(len(text), payload_size) + text


def main() -> None:
    """Serves jobs until the parent closes the pipe or is gone."""
    jobs, answers = _private_streams()
    with contextlib.suppress(EOFError, BrokenPipeError):
        start, _ = _receive(jobs, None)
        sys.path[:] = start["path"]
        _harden()
        decode, arm, disarm = _import_decoder()
        write_all(answers, pack({}, 0))  # ready
        while True:
            job, data = _receive(jobs, start["parent"])
            arm(job["seconds"], job["bytes"])
            try:
                header, pixels = decode(job, data)
            except MemoryError:
                header, pixels = {"error": "memory"}, b""
            except Exception:  # its text may quote values of the file
                header, pixels = {"error": "decode"}, b""
            finally:
                disarm()
            write_all(answers, pack(header, len(pixels)), pixels)


def _private_streams() -> "tuple[BinaryIO, BinaryIO]":
    """Returns the pipes, and point the standard streams elsewhere: some decoders print."""
    jobs, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    if os.name == "nt":
        import msvcrt

        for stream in (jobs, answers):
            msvcrt.setmode(stream.fileno(), os.O_BINARY)  # type: ignore[attr-defined]
    return jobs, answers


def _receive(stream: BinaryIO, parent: "int | None") -> "tuple[dict, bytearray]":
    _wait(stream, parent)
    header_size, payload_size = LENGTHS.unpack(read_exactly(stream, LENGTHS.size))
    return json.loads(read_exactly(stream, header_size)), read_exactly(stream, payload_size)


def _wait(stream: BinaryIO, parent: "int | None") -> None:
    """Waits for a job. A process that the parent forked may hold the pipe open, so its end alone is not enough."""
    if parent is None or os.name == "nt":
        return
    import select

    poll = select.poll()
    poll.register(stream, select.POLLIN)
    while not poll.poll(_POLL_MS):
        if os.getppid() != parent:
            raise EOFError


def _harden() -> None:
    # Ctrl-C reaches the whole group of processes; the parent decides what ends here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "nt":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # type: ignore[attr-defined]  # no dialogue after a crash
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    import resource

    # A core file would hold pixels of a patient.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _import_decoder():  # type: ignore[no-untyped-def]
    import logging
    import warnings

    import numpy as np
    from pydicom.pixels import get_decoder

    keep_bits: Any = {"correct_unused_bits": False}  # the parent looks at them
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    nowhere = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(ImportError, AttributeError, OSError, StopIteration):
        _read_gdcm_buffers_directly()

    def decode(job: dict, data: bytearray) -> "tuple[dict, memoryview]":
        decoder = get_decoder(job["syntax"])
        # One item after an empty offset table (PS3.5 A.4).
        items = b"".join((b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0", len(data).to_bytes(4, "little"), data))
        for plugin in job["plugins"]:
            # Pillow undoes the colour transform of an Adobe stream; the other plug-ins leave it to pydicom.
            done = plugin == "pillow" and job["adobe_transform"] == 1
            try:
                array, properties = decoder.as_array(
                    items, index=0, decoding_plugin=plugin, raw=done, **keep_bits, **job["options"]
                )
            except MemoryError:
                raise
            except Exception:
                continue
            photometric = "RGB" if done else str(properties["photometric_interpretation"])
            array = np.ascontiguousarray(array)
            header = {"dtype": array.dtype.str, "shape": array.shape, "photometric": photometric}
            return header, array.data.cast("B")
        raise ValueError("no plug-in decodes this frame")

    def arm(seconds: float, size: int) -> None:
        # SIGALRM ends the process whatever native code does at the time.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)
        else:
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        _limit_memory(size)

    def disarm() -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            faulthandler.cancel_dump_traceback_later()

    return decode, arm, disarm


class _Pixels(bytes):
    """Decoded bytes where pydicom expects the text that GDCM's Python binding makes of them."""

    def encode(self, *_: Any) -> "bytes":  # type: ignore[override]
        return self


def _read_gdcm_buffers_directly() -> None:
    """Lets GDCM write its pixels into a buffer.

    Its Python binding returns them as text that pydicom encodes again, which takes longer than many a frame takes to
    decode, and ignores that a frame could not be decoded.

    Raises:
        ImportError, AttributeError, OSError, StopIteration: no GDCM, or one built with other symbols (Windows), where
            the binding is used as it is.
    """
    import ctypes

    import gdcm

    library = next(module for name, module in sys.modules.items() if name.rpartition(".")[2] == "_gdcmswig")
    # bool gdcm::Bitmap::GetBuffer(char *) const, in a library that the binding was linked with
    get_buffer = ctypes.CDLL(library.__file__)["_ZNK4gdcm6Bitmap9GetBufferEPc"]
    get_buffer.restype, get_buffer.argtypes = ctypes.c_bool, (ctypes.c_void_p, ctypes.c_char_p)

    def decoded(image: Any) -> _Pixels:
        buffer = ctypes.create_string_buffer(image.GetBufferLength())
        if not get_buffer(int(image.this), buffer):
            raise ValueError("GDCM cannot decode this frame")
        return _Pixels(buffer)

    gdcm.Image.GetBuffer = decoded


def _limit_memory(size: int) -> None:
    """Allows `size` bytes of address space beyond what is in use, where the system has such a limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", "rb") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = used + size if hard == resource.RLIM_INFINITY else min(used + size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
