"""Checks a `model.safetensors` against its configuration, before any tensor is read: by the header of the file.

The format: eight bytes with the length of the header, the header as JSON, the tensors. See
https://github.com/huggingface/safetensors#format.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MedMambaConfig
from ..utils.checksums import PretrainedError
from ..utils.strict_json import StrictJsonError, parse_json

MAX_HEADER = 16 * 2**20
# A block has 34 tensors; fewer than this cannot be a block, not even of a subclass.
LEAST_PER_BLOCK = 12
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Entry(NamedTuple):
    """Type (as safetensors names it) and shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Entry]:
    """Reads names, types and shapes, and checks the length of the file against them.

    Raises:
        PretrainedError: not a safetensors file, truncated, or with types that MedMamba does not use.
    """
    with path.open("rb") as file:
        entries, length = parse_header(file, str(path))
    size = path.stat().st_size
    expected = 8 + length + sum(entry.nbytes for entry in entries.values())
    if size != expected:
        raise PretrainedError(
            f"{path} is damaged or truncated: it has {size:,} bytes, and its header says {expected:,}; download or "
            "save it again"
        )
    return entries


def parse_header(file: IO[bytes], name: str) -> tuple[dict[str, Entry], int]:
    """Reads the header at the start of a stream; returns it and its length without the eight bytes before it.

    Raises:
        PretrainedError: see `read_header`.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_HEADER:
        raise PretrainedError(f"{name} is damaged or truncated: it does not start like a safetensors file")
    content = file.read(length)
    try:
        if len(content) != length:
            raise ValueError("the file ends inside it")
        found = parse_json(content.decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return {key: _entry(key, value) for key, value in found.items() if key != "__metadata__"}, length
    except (StrictJsonError, UnicodeDecodeError, ValueError) as error:
        raise PretrainedError(f"{name} is damaged or truncated: its header cannot be read ({error})") from error


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or not isinstance(value.get("shape"), list):
        raise ValueError(f"no shape for {name[:80]!r}")
    dtype, shape, offsets = value.get("dtype"), value["shape"], value.get("data_offsets")
    if dtype not in _BYTES:
        raise ValueError(f"{name[:80]!r} has type {str(dtype)[:20]}, which MedMamba does not use")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError(f"invalid shape for {name[:80]!r}")
    entry = Entry(dtype, tuple(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(f"the byte range of {name[:80]!r} does not match its shape")
    return entry


def check_header(entries: Mapping[str, Entry], config: MedMambaConfig, source: str) -> None:
    """Compares number and total size of the tensors with a configuration, before a network is built.

    Raises:
        PretrainedError: far fewer tensors than the blocks need, or far more bytes than the network has.
    """
    blocks = sum(config.depths)
    if len(entries) < LEAST_PER_BLOCK * blocks:
        raise PretrainedError(
            f"{source} does not match its configuration: {blocks} blocks (depths {config.depths}), but only "
            f"{len(entries)} tensors"
        )
    # Leaves room for float64 and for what a subclass adds.
    most = 4 * 8 * config.parameters + 2**26
    if (total := sum(entry.nbytes for entry in entries.values())) > most:
        raise PretrainedError(
            f"{source} does not match its configuration: {total / 2**20:,.0f} MiB of weights for "
            f"{config.parameters:,} parameters"
        )


def differences(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]]) -> list[str]:
    """Describes every difference between two sets of named shapes."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name, shape in found.items():
        if name in expected and tuple(shape) != tuple(expected[name]):
            problems.append(f"{name} is {tuple(shape)}, expected {tuple(expected[name])}")
    return problems


def shapes(tensors: Mapping[str, Tensor | Entry]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def listed(problems: list[str], most: int = 5) -> str:
    """Returns the first problems as one text."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that contain NaN or infinity."""
    return [
        name
        for name, t in tensors.items()
        if t.is_floating_point() and t.numel() and not torch.isfinite(t).all().item()
    ]


def load_strict(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Assigns tensors to a model, which may be on the meta device.

    Args:
        source: where the tensors are from, for the message.

    Raises:
        PretrainedError: a tensor is missing, unexpected or of another shape.
    """
    if problems := differences(shapes(model.state_dict()), shapes(tensors)):
        raise PretrainedError(f"{source} does not match its configuration: {listed(problems)}")
    model.load_state_dict(tensors, assign=True)
