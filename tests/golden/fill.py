"""Deterministic weights for a MedMamba state dict, so that logits can be compared without shipping a large file.

`fill(shapes)` maps {key: shape} to {key: tensor}; every tensor depends only on its key and shape
(CPU generator seeded with crc32(key)), so any implementation with the same keys gets the same weights.
"""

import math
import zlib

import torch


def fill(shapes):
    out = {}
    for key, shape in shapes.items():
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        shape = tuple(shape)
        if key.endswith("num_batches_tracked"):
            out[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        r = torch.randn(shape, generator=g)
        if key.endswith("A_logs"):
            t = torch.log(torch.arange(1, shape[1] + 1).float()).expand(shape) + 0.1 * r
        elif key.endswith("Ds"):
            t = 1 + 0.1 * r
        elif key.endswith("dt_projs_bias"):
            t = -4 + 0.7 * r
        elif key.endswith(("dt_projs_weight", "x_proj_weight")):
            t = r * shape[-1] ** -0.5
        elif key.endswith("running_var"):
            t = 1 + 0.2 * r.abs()
        elif key.endswith("running_mean"):
            t = 0.1 * r
        elif len(shape) == 1 and key.endswith("weight"):
            t = 1 + 0.1 * r
        elif key.endswith("bias"):
            t = 0.05 * r
        else:
            t = r / math.sqrt(math.prod(shape[1:]))
        out[key] = t.contiguous()
    return out


def image(batch, channels, height, width, seed=0):
    """(batch, channels, height, width) float32 input in about [-1, 1]."""
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randn((batch, channels, height, width), generator=g).clamp(-2, 2) * 0.5
