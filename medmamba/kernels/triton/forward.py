"""The forward pass of the scan in Triton; see `common.py` for the design and the notation."""
# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108 (a condition that is known when Triton compiles needs an `if` of its own)

import triton
import triton.language as tl

from .common import PADDING, carry, order, rows, saved, softplus


@triton.jit
def _vectors(ptr, t, end, skip, N: tl.constexpr, NP: tl.constexpr, PACKED: tl.constexpr):
    """Loads B and C of one token as float32, or zeros unless t < end. PACKED loads bfloat16 in pairs."""
    if PACKED:
        pairs = tl.arange(0, NP // 2)
        ptr = ptr.to(tl.pointer_type(tl.int32))
        ok = pairs * 0 + t < end
        B = tl.load(ptr + pairs, mask=ok, other=0)
        C = tl.load(ptr + NP // 2 + pairs, mask=ok, other=0)
        # Elements with even index are the low halves.
        B = tl.interleave((B << 16).to(tl.float32, bitcast=True), (B & -65536).to(tl.float32, bitcast=True))
        C = tl.interleave((C << 16).to(tl.float32, bitcast=True), (C & -65536).to(tl.float32, bitcast=True))
    else:
        ns = tl.arange(0, NP)
        B = tl.load(ptr + ns, mask=skip + t < end, other=0.0).to(tl.float32)
        C = tl.load(ptr + N + ns, mask=skip + t < end, other=0.0).to(tl.float32)
    return B, C


@triton.jit(do_not_specialize=["H", "W", "L", "row", "blocks", "segments", "segment_length"])
def scan_forward_kernel(
    x_ptr, delta_ptr, proj_ptr, table_ptr, out_ptr, states_ptr, ends_ptr, sums_ptr, last_ptr,
    H, W, L, C, row, blocks, segments, segment_length,
    x_b, x_k, x_t, p_b, p_k, p_t, o_b, o_k, o_t,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BC: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    FOLDED: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr, WRITE: tl.constexpr, SAVE: tl.constexpr, CARRY: tl.constexpr, ENDS: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Scans one segment. Flags choose the outputs:

    WRITE: stores y to out. SAVE: stores the state before each chunk. LAST: stores the state after the last token.
    ENDS: stores the state after the segment for a zero initial state, and the sum of its step sizes; a second launch
    with CARRY computes the initial state of each segment from these.
    ADJOINT: runs the recurrence of the gradient of the state, from the end; x is then dy, and the state is the gradient
    that reaches the previous token.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    line = pid // blocks // segments  # b * K + k
    k = line % K
    b = (line // K).to(tl.int64)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, L)
    if ADJOINT:
        begin, end = L - end, L - begin
    run, step, jump, backwards = order(k, ADJOINT, H, W, L, PLANAR)

    cs = block * BC + tl.arange(0, BC)
    ns = tl.arange(0, NP)
    # Added to a token index, this masks the padding of a tile: `skip + t < end` is the complete mask.
    c_skip, n_skip = cs * 0, ns * 0
    if not EVEN:
        c_skip = tl.where(cs < C, 0, PADDING)
    if N < NP:
        n_skip = tl.where(ns < N, 0, PADDING)
    c_ok = c_skip == 0
    tile_ok = c_ok[None, :] & (ns < N)[:, None]

    table_ptr += k * ((N + R + 2) * row)
    A = tl.load(rows(table_ptr, ns, cs, row, VEC), mask=tile_ok, other=0.0)
    weights = ()
    for r in tl.static_range(0, R, RB):
        rs = r + tl.arange(0, RB)
        weights = weights + (
            tl.load(rows(table_ptr, N + rs, cs, row, VEC), mask=c_ok[None, :] & (rs < R)[:, None], other=0.0),
        )
    bias = tl.load(table_ptr + (N + R) * row + cs, mask=c_ok, other=0.0)
    D = tl.load(table_ptr + (N + R + 1) * row + cs, mask=c_ok, other=0.0)

    x_ptr += b * x_b + k.to(tl.int64) * x_k + cs
    delta_ptr += b * x_b + k.to(tl.int64) * x_k + cs
    proj_ptr += (b * p_b + k.to(tl.int64) * p_k) * UNIT
    out_ptr += b * o_b + k.to(tl.int64) * o_k + cs
    state = ns[:, None] * row + cs[None, :]  # within one (N, C)
    first_piece = line.to(tl.int64) * segments
    first_chunk = line.to(tl.int64) * tl.cdiv(L, CHUNK)

    h = tl.zeros([NP, BC], tl.float32)
    if CARRY:
        for s in tl.range(segment):
            h = carry(h, A, ends_ptr, sums_ptr, first_piece + s, ns, cs, tile_ok, c_ok, C, row, N, VEC)
    dt_sum = tl.zeros([BC], tl.float32)

    for t in tl.range(begin, end, UNROLL):
        if SAVE:
            if t % CHUNK == 0:
                here = states_ptr + (first_chunk + t // CHUNK) * N * C
                tl.store(saved(here, ns, cs, C, N, FOLDED, VEC), h, mask=tile_ok)
        # The compiler cannot move a load above an earlier store, so all loads of the group come first.
        inner = t % run
        q = t * step + (t // run) * jump
        pixels, xs, pres, Bs, Cs = (), (), (), (), ()
        for i in tl.static_range(UNROLL):
            pixel = tl.where(backwards, L - 1 - q, q)
            if WIDE:
                pixel = pixel.to(tl.int64)
            ok = c_skip + (t + i) < end
            p = proj_ptr + pixel * (p_t * UNIT)
            pre = bias
            if R == 0:
                pre += tl.load(delta_ptr + pixel * x_t, mask=ok, other=0.0).to(tl.float32)
            for r in tl.static_range(0, R, RB):
                rs = r + tl.arange(0, RB)
                r_skip = rs * 0
                if r + RB > R:
                    r_skip = tl.where(rs < R, 0, PADDING)
                code = tl.load(p + rs, mask=r_skip + (t + i) < end, other=0.0)
                pre += tl.sum(weights[r // RB] * code.to(tl.float32)[:, None], 0)
            pixels = pixels + (pixel,)
            pres = pres + (pre,)
            xs = xs + (tl.load(x_ptr + pixel * x_t, mask=ok, other=0.0).to(tl.float32),)
            Bt, Ct = _vectors(p + R, t + i, end, n_skip, N, NP, PACKED)
            Bs, Cs = Bs + (Bt,), Cs + (Ct,)
            inner += 1
            wrap = inner == run
            q += step + tl.where(wrap, jump, 0)
            inner = tl.where(wrap, 0, inner)
        ys = ()
        for i in tl.static_range(UNROLL):
            if SOFTPLUS:
                dt = softplus(pres[i])
            else:
                dt = pres[i]
            dt = tl.where(c_skip + (t + i) < end, dt, 0.0)
            decay = tl.exp2(dt[None, :] * A)
            if ADJOINT:
                h = decay * (h + xs[i][None, :] * Cs[i][:, None])
            else:
                h = decay * h + (dt * xs[i])[None, :] * Bs[i][:, None]
            if ENDS:
                dt_sum += dt
            if WRITE:
                ys = ys + (tl.sum(h * Cs[i][:, None], 0) + D * xs[i],)
        if WRITE:
            for i in tl.static_range(UNROLL):
                tl.store(out_ptr + pixels[i] * o_t, ys[i].to(out_ptr.dtype.element_ty), mask=c_skip + (t + i) < end)

    if ENDS:
        piece = (first_piece + segment) * C
        tl.store(ends_ptr + piece * N + state, h, mask=tile_ok)
        tl.store(sums_ptr + piece + cs, dt_sum, mask=c_ok)
    if LAST:
        if segment == segments - 1:
            tl.store(last_ptr + line.to(tl.int64) * N * C + state, h, mask=tile_ok)


@triton.jit
def sum_kernel(in_ptr, out_ptr, inner, blocks, parts: tl.constexpr, BLOCK: tl.constexpr):
    """Sums (outer, parts, inner) to (outer, inner) in a fixed order."""
    pid = tl.program_id(0).to(tl.int64)
    outer = pid // blocks
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = i < inner
    in_ptr += outer * parts * inner + i
    total = tl.load(in_ptr, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(1, parts):
        total += tl.load(in_ptr + part * inner, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + outer * inner + i, total.to(out_ptr.dtype.element_ty), mask=ok)
