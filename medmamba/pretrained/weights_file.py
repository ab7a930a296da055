"""Looks at a `model.safetensors` before any of its tensors is read: names, types, shapes and sizes stand in its header.

The format: eight bytes with the length of the header, the header as JSON, the tensors. See
https://github.com/huggingface/safetensors#format.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ..config import MedMambaConfig
from ..utils.checksums import PretrainedError
from ..utils.strict_json import StrictJsonError, parse_json

MAX_HEADER = 16 * 2**20
# A block has 34 tensors; fewer than this many cannot be one, not even of a subclass.
LEAST_PER_BLOCK = 12
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Entry(NamedTuple):
    """One tensor of a file: its type, in the names of safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """Reads names, types and shapes, and checks that the file is as long as they say.

    Raises:
        PretrainedError: not a safetensors file, cut short, or with types that no MedMamba has.
    """
    with path.open("rb") as file:
        entries, length = parse_header(file, str(path))
    size = path.stat().st_size
    expected = 8 + length + sum(entry.nbytes for entry in entries.values())
    if size != expected:
        raise PretrainedError(
            f"{path} is damaged or cut short: it has {size:,} bytes, and its header says {expected:,}; download or "
            "save it again"
        )
    return entries


def parse_header(file: IO[bytes], name: str) -> tuple[dict[str, Entry], int]:
    """Reads the header from the beginning of a stream; also returns its length without the eight bytes before it.

    Raises:
        PretrainedError: see `read_header`.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_HEADER:
        raise PretrainedError(f"{name} is damaged or cut short: it does not begin as a safetensors file does")
    content = file.read(length)
    try:
        if len(content) != length:
            raise ValueError("the file ends within it")
        found = parse_json(content.decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return {key: _entry(key, value) for key, value in found.items() if key != "__metadata__"}, length
    except (StrictJsonError, UnicodeDecodeError, ValueError) as error:
        raise PretrainedError(f"{name} is damaged or cut short: its header cannot be read ({error})") from error


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or not isinstance(value.get("shape"), list):
        raise ValueError(f"no shape for {name[:80]!r}")
    dtype, shape, offsets = value.get("dtype"), value["shape"], value.get("data_offsets")
    if dtype not in _BYTES:
        raise ValueError(f"{name[:80]!r} is of the type {str(dtype)[:20]}, which no MedMamba has")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError(f"the shape of {name[:80]!r} makes no sense")
    entry = Entry(dtype, tuple(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"{name[:80]!r} has not as many bytes as its shape says")
    return entry


def check_header(entries: Mapping[str, Entry], config: MedMambaConfig, source: str) -> None:
    """Compares the number and the size of the tensors with what a configuration makes, before a network is built.

    Raises:
        PretrainedError: far fewer tensors than blocks need, or far more bytes than the network has.
    """
    blocks = sum(config.depths)
    if len(entries) < LEAST_PER_BLOCK * blocks:
        raise PretrainedError(
            f"{source} does not fit its configuration: {blocks} blocks (depths {config.depths}), and only "
            f"{len(entries)} tensors"
        )
    # Room for float64, and for what a subclass adds.
    most = 4 * 8 * config.parameters + 2**26
    if (total := sum(entry.nbytes for entry in entries.values())) > most:
        raise PretrainedError(
            f"{source} does not fit its configuration: {total / 2**20:,.0f} MiB of weights for "
            f"{config.parameters:,} parameters"
        )


def differences(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> list[str]:
    """Everything by which two sets of named shapes differ, in words."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    for name, shape in found.items():
        if name in expected and tuple(shape) != tuple(expected[name]):
            problems.append(f"{name} is {tuple(shape)}, expected {tuple(expected[name])}")
    return problems


def shapes(tensors: Mapping[str, Tensor | Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def listed(problems: list[str], most: int = 5) -> str:
    """The first problems as one text."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that have NaN or infinity in them."""
    return [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and t.numel() and not torch.isfinite(t).all().item()
    ]
