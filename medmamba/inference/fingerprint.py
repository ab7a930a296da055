"""Fingerprints of weights, to detect whether a record was fitted with these weights or with others.

Calibration and the statistics of out-of-distribution detection are valid only for the weights they were fitted with. A
hash of the bytes would also change when the same weights are cast to 16 bits. A fingerprint instead describes each part
of the network by two numbers that rounding hardly changes, both summed over its tensors: the projection onto a fixed
direction divided by the norm, and the logarithm of the norm.

Float32 weights match if both numbers agree to about six digits; any training step changes them by more. If the weights
are 16-bit numbers, rounding is tolerated, and changes below about half a percent go unnoticed.

Computing one takes a pass over the weights in float64, 0.05 s for 14 million parameters on one CPU core.
"""

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Fingerprint = Mapping[str, list[float]]

_STEP = 0.6180339887498949  # the golden ratio: its multiples modulo 1 fill [0, 1) evenly
_DIGITS = 12
_EXACT = 1e-6
_ROUNDED = 0.004  # per square root of the number of tensors: six times the effect of rounding to bfloat16


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Returns two numbers for each part ("patch_embed", "stages.0", "downsamples.0", "head", ...) of a state dict.

    Integer tensors are ignored. The result is the same on every device.
    """
    direction = torch.frac(torch.arange(_largest(tensors), dtype=torch.float64).mul_(_STEP)).sub_(0.5)
    found: dict[str, list[float]] = {}
    for name in sorted(tensors):
        if not tensors[name].is_floating_point():
            continue
        values = tensors[name].detach().flatten().cpu().double()
        norm = math.sqrt(torch.dot(values, values).item())
        weight = 0.5 + zlib.crc32(name.encode()) / 2**32  # detects two tensors that were swapped
        sums = found.setdefault(part_of(name), [0.0, 0.0])
        if norm:  # also if NaN, which then matches nothing
            sums[0] += weight * torch.dot(values, direction[: len(values)]).item() / norm
            sums[1] += weight * math.log(norm) if norm == norm else norm
    return {part: [float(f"{value:.{_DIGITS}g}") for value in sums] for part, sums in found.items()}


def changed_parts(tensors: Mapping[str, Tensor], recorded: Fingerprint, found: Fingerprint | None = None) -> set[str]:
    """Returns the parts of a state dict that differ from a recorded fingerprint or exist on one side only.

    Args:
        found: the fingerprint of the tensors, if already computed.
    """
    found = fingerprint(tensors) if found is None else found
    changed = set(found) ^ set(recorded)
    for part in set(found) & set(recorded):
        gaps = [abs(a - b) for a, b in zip(found[part], recorded[part], strict=True)]
        gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf
        if gap <= _EXACT:
            continue
        inside = [t for name, t in tensors.items() if part_of(name) == part and t.is_floating_point()]
        if gap > _ROUNDED * math.sqrt(len(inside)) or not all(_in_16_bits(t) for t in inside if t.ndim > 1):
            changed.add(part)
    return changed


def part_of(name: str) -> str:
    """Returns "stages.2" for "stages.2.blocks.0.norm.weight", and "head" for "head.bias"."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def stamp(model: nn.Module) -> tuple[object, ...]:
    """Returns a value that stays equal within a process as long as no weight changes; takes about 0.2 ms.

    It holds the addresses and version counters of all tensors, and a few values, because `weight.data -= ...` does not
    increase a counter.
    """
    tensors = list(_tensors(model))
    places = [t.data_ptr() for t in tensors]
    try:
        versions = [t._version for t in tensors]
    except RuntimeError:  # tensors made in inference mode have no version counter
        versions = [-1 if t.is_inference() else t._version for t in tensors]
    return (*places, *versions, *_probe(tensors))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    for table in (module._parameters, module._buffers):
        for tensor in table.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def _probe(tensors: list[Tensor]) -> list[float]:
    """Returns one value of each of the first and last few tensors: embedding, last layers and classifier."""
    some = [t for t in (*tensors[:4], *tensors[-6:]) if t.is_floating_point() and t.numel() and not t.is_meta]
    with torch.no_grad():
        last = [t.detach()[(-1,) * t.ndim] for t in some]
        if len({t.device for t in last}) == 1:
            return torch.stack([t.float() for t in last]).tolist()  # one transfer
        return [t.item() for t in last]


def _in_16_bits(tensor: Tensor) -> bool:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return True
    return any(bool((tensor.to(half).to(tensor.dtype) == tensor).all()) for half in (torch.bfloat16, torch.float16))


def _largest(tensors: Mapping[str, Tensor]) -> int:
    return max((t.numel() for t in tensors.values()), default=0)
