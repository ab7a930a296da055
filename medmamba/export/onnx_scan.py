"""The four-direction scan in standard ONNX operators, as the function `medmamba.Scan2D` that exported models carry.

A runtime that has no operator of that name (all but ONNX Runtime with the library of `scan_library`) expands the
function. Its operators are what any ONNX runtime has, and their number does not grow with the image.

Tokens are taken T at a time. Within a chunk, h[t] = exp(-s[t]) * (h[0] + sum over i <= t of exp(s[i]) dt[i] x[i] B[i]),
where s[t] is the sum of the steps -dt * A since the chunk began: the sum over i, with B and the C of the output, is one
matrix product. exp(s) overflows where s is large. So s is centred, which doubles its range, and in chunks where that is
not enough each step is clamped at MAX_STEP: exp(-18) of a state is less than float32 resolves beside it.

Notation: B, H, W, C, N, R, K as in `kernels.reference`; T tokens in each of J chunks.
"""

# It is ONNX written as Python, not Python that runs:
# mypy: ignore-errors

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

OPSET = 18
DOMAIN = "medmamba"
T = 8
MAX_STEP = 18.0
RANGE = T * MAX_STEP  # exp(RANGE / 2) is a ten-millionth of what float32 can hold


@script(Opset(DOMAIN, 1), default_opset=op)
def Scan2D(
    x: FLOAT["B", "H", "W", "C"],  # noqa: F821
    proj: FLOAT["B", "H", "W", 4, "P"],  # noqa: F821
    dt_weight: FLOAT[4, "C", "R"],  # noqa: F821
    dt_bias: FLOAT[4, "C"],  # noqa: F821
    A: FLOAT[4, "C", "N"],  # noqa: F821
    D: FLOAT[4, "C"],  # noqa: F821
):
    batch = op.Shape(x, start=0, end=1)
    height = op.Shape(x, start=1, end=2)
    width = op.Shape(x, start=2, end=3)
    channels = op.Shape(x, start=3, end=4)
    rank = op.Shape(dt_weight, start=2, end=3)
    states = op.Shape(A, start=2, end=3)
    size = op.Constant(value_ints=[T])
    length = height * width
    last = length - 1
    chunks = (length + (T - 1)) / T
    padded = chunks * T

    # The pixel that each token of the four directions reads. Tokens that fill up the last chunk read the last pixel.
    token = op.Min(op.Range(0, op.Squeeze(padded), 1), last)
    back = last - token
    down = (token % height) * width + token / height
    up = (back % height) * width + back / height
    pixels = op.Reshape(op.Concat(token, down, back, up, axis=0), op.Concat([4], chunks, size, axis=0))
    pixels = op.Transpose(pixels, perm=[1, 0, 2])  # (J, K, T)
    # From here on, the chunks of all images are one sequence, (B * J, ...): the work at hand stays small whatever the
    # batch, which processors' caches reward.
    xs = op.Gather(op.Reshape(x, op.Concat(batch, length, channels, axis=0)), pixels, axis=1)
    xs = op.Reshape(xs, op.Concat([-1], [4], size, channels, axis=0))  # (B * J, K, T, C)
    rows = pixels * 4 + op.Reshape(op.Constant(value_ints=[0, 1, 2, 3]), [4, 1])
    maps = op.Reshape(proj, op.Concat(batch, length * 4, [-1], axis=0))  # (B, L * K, R + 2N)
    projections = op.Reshape(op.Gather(maps, rows, axis=1), op.Concat([-1], [4], size, rank + states * 2, axis=0))
    code, Bs, Cs = op.Split(projections, op.Concat(rank, states, states, axis=0), axis=-1)  # (B * J, K, T, R | N | N)
    pre = op.MatMul(code, op.Transpose(dt_weight, perm=[0, 2, 1])) + op.Unsqueeze(dt_bias, [1])
    # softplus; the operator of that name is several times slower in ONNX Runtime
    dt = op.Max(pre, op.Log(op.Exp(op.Min(pre, 30.0)) + 1.0))  # (B * J, K, T, C)
    u = op.Unsqueeze(dt * xs, [2])  # (B * J, K, 1, T, C)

    # Centred negative sums of steps: at each token, and the half of all by which they are centred.
    to_sums = 0.5 - op.Trilu(op.Expand(1.0, op.Concat(size, size, axis=0)), upper=0)  # (T, T)
    sums = op.Unsqueeze(op.MatMul(to_sums, dt), [2])  # (B * J, K, 1, T, C)
    halves = op.Unsqueeze(op.ReduceSum(dt, [2], keepdims=1) * -0.5, [2])  # (B * J, K, 1, 1, C)
    steps = op.Unsqueeze(dt, [2])  # (B * J, K, 1, T, C)
    rates = op.Unsqueeze(-op.Transpose(A, perm=[0, 2, 1]), [2])  # (K, N, 1, C)
    ranges = halves * -2.0 * op.ReduceMax(rates, [1], keepdims=1)
    in_range = op.ReduceMax(ranges, [1, 2, 3, 4], keepdims=0) < RANGE  # (B * J,)
    limit = op.Constant(value_float=MAX_STEP)

    # What the state at the end of a chunk, and each output, take of the state at its start and of each token. The first
    # chunk of an image takes nothing of the state, which is that of another image.
    first = op.Range(0, op.Squeeze(batch * chunks), 1) % chunks
    carried = op.Reshape(op.Cast(op.Min(first, 1), to=1), [-1, 1, 1, 1, 1])
    carried = op.Expand(carried, op.Concat([1], [4], states, [1, 1], axis=0))
    to_state = op.Concat(carried, op.Unsqueeze(op.Transpose(Bs, perm=[0, 1, 3, 2]), [3]), axis=-1)  # (B*J,K,N,1,1+T)
    to_output = op.Unsqueeze(op.Transpose(Cs, perm=[0, 1, 3, 2]), [4]) * to_state
    to_output = op.Trilu(to_output, 1, upper=0)  # (B * J, K, N, T, 1+T)
    zeros = op.Expand(0.0, op.Concat([4], states, [1], channels, axis=0))  # (K, N, 1, C)

    @graph()
    def chunk(h: FLOAT[...], in_range_j, steps_j, sums_j, halves_j, u_j, to_state_j, to_output_j):
        if in_range_j:
            decay = op.Exp(sums_j * rates)  # (K, N, T, C)
            edge = op.Exp(halves_j * rates)  # (K, N, 1, C)
        else:
            decay = op.Exp(op.MatMul(to_sums, op.Min(steps_j * rates, limit)))
            edge = op.Exp(op.ReduceSum(op.Min(steps_j * rates, limit), [2], keepdims=1) * -0.5)
        inputs = op.Concat(h * edge, u_j / decay, axis=-2)  # (K, N, 1+T, C)
        y = op.ReduceSum(op.MatMul(to_output_j, inputs) * decay, [1], keepdims=0)  # (K, T, C)
        h_next = op.MatMul(to_state_j, inputs) * edge
        return h_next, y

    _, ys = op.Scan(
        zeros,
        in_range,
        steps,
        sums,
        halves,
        u,
        to_state,
        to_output,
        body=chunk,
        num_scan_inputs=7,
    )  # (B * J, K, T, C)

    # Where each pixel's outputs are among all tokens of all directions.
    pixel = op.Range(0, op.Squeeze(length), 1)
    column = (pixel % width) * height + pixel / width
    places = op.Concat(
        op.Unsqueeze(pixel, [1]),
        op.Unsqueeze(column + padded, [1]),
        op.Unsqueeze(last - pixel + padded * 2, [1]),
        op.Unsqueeze(last - column + padded * 3, [1]),
        axis=1,
    )  # (L, K)
    ys = op.Reshape(ys, op.Concat(batch, chunks, [4], size, channels, axis=0))
    tokens = op.Reshape(op.Transpose(ys, perm=[0, 2, 1, 3, 4]), op.Concat(batch, padded * 4, channels, axis=0))
    y = op.Reshape(op.ReduceSum(op.Gather(tokens, places, axis=1), [2], keepdims=0), op.Shape(x))
    return y + x * op.ReduceSum(D, [0], keepdims=0)
