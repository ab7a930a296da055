"""Functions shared by the Triton kernels of the scan. Importing this module, or one with kernels, requires Triton.

One program, of one warp, walks along the tokens of one segment of one direction (or of one group, in 1-D) for a block
of channels, its states in registers. Nothing is permuted in memory: a direction is an order of pixel indices.

Notation as in `reference.py`, plus
    BC      channels per program        NP    N padded to a power of 2          P = R + 2N
    table   (K, N + R + 2, C) float32: A * log2(e), dt_weight, dt_bias, D, each with channels last
    row     the distance between rows of `table`; equal to C, but never specialised, see `rows`

The layout of registers follows from the first load of a tile, so the loads of `table` choose it through VEC, the number
of neighbouring channels per thread. The forward pass wants all states of a channel in one thread, where the sum over
states is free; the backward pass, which sums over channels too, wants them spread over 4 x 8 threads.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PADDING = tl.constexpr(1 << 30)  # more than the tokens of any image


@triton.jit
def softplus(x):
    """Returns log(1 + exp(x)) to float32 accuracy.

    Through a polynomial for log(1 + e) / e on [0, 1], of relative error 3e-8: the fast logarithm of a GPU is inaccurate
    near 1, and small step sizes are the rule.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = 0.005232624 * e - 0.029504957
    p = p * e + 0.07822549
    p = p * e - 0.13663207
    p = p * e + 0.19105989
    p = p * e - 0.24842978
    p = p * e + 0.33319095
    p = p * e - 0.49999493
    p = p * e + 0.99999994
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def order(k, reverse, H, W, L, PLANAR: tl.constexpr):
    """Returns how direction k reads the map: runs of pixels `step` apart, with `jump` more between runs, and whether it
    is reversed (pixel L - 1 - q in place of pixel q). Row-major order is a single run."""
    if PLANAR:
        column = (k & 1) == 1
        run, step = tl.where(column, H, L), tl.where(column, W, 1)
        return run, step, tl.where(column, 1 - L, 0), (k >= 2) != reverse
    else:
        return L, 1, 0, reverse


@triton.jit
def rows(ptr, numbers, cs, row, VEC: tl.constexpr):
    """Returns addresses of a float32 tile of rows and channels. VEC sets the width of loads and so the layout of the
    tile, for which Triton must not specialise on `row`."""
    return tl.multiple_of(ptr + numbers[:, None] * row + cs[None, :], [1, VEC * 4])


@triton.jit
def saved(ptr, ns, cs, C, N: tl.constexpr, FOLDED: tl.constexpr, VEC: tl.constexpr):
    """Returns addresses of one saved state. FOLDED stores 32 channels at a time, so that rows are a constant distance
    apart and addresses take no registers; only these kernels read it."""
    if FOLDED:
        ptrs = (ptr + cs // 32 * (N * 32) + cs % 32)[None, :] + (ns * 32)[:, None]
    else:
        ptrs = (ptr + cs)[None, :] + (ns * C)[:, None]
    return tl.multiple_of(ptrs, [1, VEC * 4])


@triton.jit
def carry(h, A, ends_ptr, sums_ptr, piece, ns, cs, tile_ok, c_ok, C, row, N: tl.constexpr, VEC: tl.constexpr):
    """Carries the state h across a segment, given its end state from zero and the sum of its step sizes."""
    dt_sum = tl.load(sums_ptr + piece * C + cs, mask=c_ok, other=0.0)
    end = tl.load(rows(ends_ptr + piece * C * N, ns, cs, row, VEC), mask=tile_ok, other=0.0)
    return tl.exp2(dt_sum[None, :] * A) * h + end
