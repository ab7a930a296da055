"""The backward pass of the scan in Triton; see `common.py` for the design and the notation."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .common import LN2, LOG2E, carry, order, rows, saved, softplus


@triton.jit
def _one_minus_exp(dt):
    """Returns 1 - exp(-dt) for dt >= 0, the slope of softplus where its value is dt; near 0 by a series."""
    p = 1 / 5040 - 1 / 40320 * dt
    p = 1 / 720 - p * dt
    p = 1 / 120 - p * dt
    p = 1 / 24 - p * dt
    p = 1 / 6 - p * dt
    p = 1 / 2 - p * dt
    p = 1.0 - p * dt
    return tl.where(dt < 0.5, dt * p, 1.0 - tl.exp2(-dt * LOG2E))


@triton.jit
def _tile(ptr, pixels, stride, VEC: tl.constexpr):
    """Returns addresses of (tokens, channels), read VEC channels at a time to match the layout of the other tiles."""
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr[None, :] + pixels[:, None] * stride, [1, VEC * SIZE])


@triton.jit(do_not_specialize=["H", "W", "L", "row", "blocks", "segments", "segment_length"])
def scan_backward_kernel(
    dy_ptr, x_ptr, delta_ptr, proj_ptr, table_ptr, states_ptr, ends_ptr, sums_ptr, scratch_ptr,
    dx_ptr, ddelta_ptr, dproj_ptr, dtable_ptr,
    H, W, L, C, row, blocks, segments, segment_length,
    x_b, x_k, x_t, y_b, y_k, y_t, p_b, p_k, p_t, dx_b, dx_k, dx_t, dp_block, dp_b, dp_k, dp_t,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    FOLDED: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, SOFTPLUS: tl.constexpr, CARRY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes all gradients of one segment, chunk by chunk from its end.

    Per chunk: (1) gather its tokens into `scratch`, in float32 and scan order; (2) run forward from the saved state,
    keeping every SUB-th state; (3) from the last group of SUB tokens on, run forward again with states and decays in
    registers, then backward; (4) scatter the results. Steps 2 and 3 dominate the cost, so they avoid address
    computations, masks and conversions; `scratch` is small enough to stay in the cache. Sums over channels are written
    per block of channels, sums over tokens per (b, k, segment), and reduced afterwards without atomics.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    line = pid // blocks // segments
    k = line % K
    b = (line // K).to(tl.int64)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, L)
    run, step, jump, backwards = order(k, False, H, W, L, PLANAR)
    GROUPS: tl.constexpr = CHUNK // SUB

    lane = tl.arange(0, BC)
    cs = block * BC + lane
    ns = tl.arange(0, NP)
    rs = tl.arange(0, RP)
    ts = tl.arange(0, CHUNK)
    c_ok = cs * 0 == 0
    if not EVEN:
        c_ok = cs < C
    n_ok = ns < N
    r_ok = rs < R
    tile_ok = c_ok[None, :] & n_ok[:, None]

    table_ptr += k * ((N + R + 2) * row)
    A = tl.load(rows(table_ptr, ns, cs, row, VEC), mask=tile_ok, other=0.0)

    k64 = k.to(tl.int64)
    x_ptr += b * x_b + k64 * x_k + cs
    delta_ptr += b * x_b + k64 * x_k + cs
    dy_ptr += b * y_b + k64 * y_k + cs
    dx_ptr += b * dx_b + k64 * dx_k + cs
    ddelta_ptr += b * dx_b + k64 * dx_k + cs
    proj_ptr += (b * p_b + k64 * p_k) * UNIT
    dproj_ptr += block.to(tl.int64) * dp_block + b * dp_b + k64 * dp_k
    first_chunk = line.to(tl.int64) * tl.cdiv(L, CHUNK)
    dtable_ptr += ((b * segments + segment) * K + k) * ((N + R + 2) * C)

    # The scratch of this program; results overwrite inputs.
    dt_ptr = scratch_ptr + pid.to(tl.int64) * (3 * CHUNK * BC + 2 * CHUNK * NP + GROUPS * NP * BC)
    input_ptr = dt_ptr + CHUNK * BC  # dt * x, later its gradient
    dy_row_ptr = input_ptr + CHUNK * BC  # dy, later the gradient of dt through the decay
    B_ptr = dy_row_ptr + CHUNK * BC  # B, later its gradient
    C_ptr = B_ptr + CHUNK * NP  # C, later its gradient
    kept_ptr = C_ptr + CHUNK * NP + ns[:, None] * BC + lane[None, :]
    tile = ts[:, None] * BC + lane[None, :]
    tile_n = ts[:, None] * NP + ns[None, :]

    g = tl.zeros([NP, BC], tl.float32)  # gradient of the state after the current token
    if CARRY:
        last_piece = line.to(tl.int64) * segments + segments - 1
        for s in tl.range(segments - 1 - segment):
            g = carry(g, A, ends_ptr, sums_ptr, last_piece - s, ns, cs, tile_ok, c_ok, C, row, N, VEC)
    dA = tl.zeros([NP, BC], tl.float32)
    dD = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)

    chunks = tl.cdiv(end - begin, CHUNK)
    for chunk_from_end in tl.range(chunks):
        start = begin + (chunks - 1 - chunk_from_end) * CHUNK

        # (1)
        tokens = start + ts
        t_ok = tokens < end
        ct_ok = t_ok[:, None] & c_ok[None, :]
        # In float32, because integer division takes about 20 instructions; exact for maps up to 10^6 pixels wide.
        runs = ((start % run + ts + 0.5) * (1.0 / run)).to(tl.int32) + start // run
        q = tokens * step + runs * jump
        pixels = tl.where(backwards, L - 1 - q, q)
        if WIDE:
            pixels = pixels.to(tl.int64)
        pre = tl.zeros([CHUNK, BC], tl.float32) + tl.load(table_ptr + (N + R) * row + cs, mask=c_ok, other=0.0)[None, :]
        if R == 0:
            pre += tl.load(_tile(delta_ptr, pixels, x_t, VEC), mask=ct_ok, other=0.0).to(tl.float32)
        for r in tl.static_range(R):
            code = tl.load(proj_ptr + pixels * (p_t * UNIT) + r, mask=t_ok, other=0.0).to(tl.float32)
            pre += code[:, None] * tl.load(table_ptr + (N + r) * row + cs, mask=c_ok, other=0.0)[None, :]
        if SOFTPLUS:
            pre = softplus(pre)
        tl.store(dt_ptr + tile, tl.where(ct_ok, pre, 0.0))
        # Stored and loaded again, here and below: otherwise the compiler recomputes it for each layout.
        tl.debug_barrier()
        x = tl.load(_tile(x_ptr, pixels, x_t, VEC), mask=ct_ok, other=0.0).to(tl.float32)
        dy = tl.load(_tile(dy_ptr, pixels, y_t, VEC), mask=ct_ok, other=0.0).to(tl.float32)
        dD += tl.sum(x * dy, 0)
        p_ptrs = proj_ptr + (pixels * (p_t * UNIT))[:, None] + (R + ns)[None, :]
        p_ok = t_ok[:, None] & n_ok[None, :]
        tl.store(input_ptr + tile, tl.load(dt_ptr + tile) * x)
        tl.store(dy_row_ptr + tile, dy)
        tl.store(B_ptr + tile_n, tl.load(p_ptrs, mask=p_ok, other=0.0).to(tl.float32))
        tl.store(C_ptr + tile_n, tl.load(p_ptrs + N, mask=p_ok, other=0.0).to(tl.float32))
        tl.debug_barrier()  # other threads read what this one wrote

        # (2)
        before = states_ptr + (first_chunk + start // CHUNK) * N * C
        h = tl.load(saved(before, ns, cs, C, N, FOLDED, VEC), mask=tile_ok, other=0.0)
        for j in tl.range(GROUPS - 1):
            tl.store(kept_ptr + j * (NP * BC), h)
            for i in tl.static_range(SUB):
                t = j * SUB + i
                B1 = tl.load(B_ptr + t * NP + ns)
                decay = tl.exp2(tl.load(dt_ptr + t * BC + lane)[None, :] * A)
                h = decay * h + tl.load(input_ptr + t * BC + lane)[None, :] * B1[:, None]
        tl.store(kept_ptr + (GROUPS - 1) * (NP * BC), h)
        tl.debug_barrier()

        # (3)
        for group_from_end in tl.range(GROUPS):
            j = GROUPS - 1 - group_from_end
            h = tl.load(kept_ptr + j * (NP * BC))
            decays, hs = (), (h,)
            for i in tl.static_range(SUB):
                t = j * SUB + i
                B1 = tl.load(B_ptr + t * NP + ns)
                decay = tl.exp2(tl.load(dt_ptr + t * BC + lane)[None, :] * A)
                h = decay * h + tl.load(input_ptr + t * BC + lane)[None, :] * B1[:, None]
                decays, hs = decays + (decay,), hs + (h,)
            for i in tl.static_range(SUB - 1, -1, -1):
                # Reloading these is cheaper than keeping them, because registers limit this kernel.
                t = j * SUB + i
                dt1 = tl.load(dt_ptr + t * BC + lane)
                input1 = tl.load(input_ptr + t * BC + lane)
                dy1 = tl.load(dy_row_ptr + t * BC + lane)
                B1 = tl.load(B_ptr + t * NP + ns)
                C1 = tl.load(C_ptr + t * NP + ns)
                dC1 = tl.sum(dy1[None, :] * hs[i + 1], 1)
                g += dy1[None, :] * C1[:, None]
                dB1 = tl.sum(g * input1[None, :], 1)
                dinput1 = tl.sum(g * B1[:, None], 0)
                g *= decays[i]
                dexponent = g * hs[i]  # gradient of dt * A
                dA += dt1[None, :] * dexponent
                tl.store(input_ptr + t * BC + lane, dinput1)
                tl.store(dy_row_ptr + t * BC + lane, tl.sum(dexponent * A, 0))
                tl.store(B_ptr + t * NP + ns, dB1)
                tl.store(C_ptr + t * NP + ns, dC1)
        tl.debug_barrier()

        # (4)
        dt = tl.load(dt_ptr + tile)
        dinput = tl.load(input_ptr + tile)
        x = tl.load(_tile(x_ptr, pixels, x_t, VEC), mask=ct_ok, other=0.0).to(tl.float32)
        dy = tl.load(_tile(dy_ptr, pixels, y_t, VEC), mask=ct_ok, other=0.0).to(tl.float32)
        D = tl.load(table_ptr + (N + R + 1) * row + cs, mask=c_ok, other=0.0)
        dx = dt * dinput + D[None, :] * dy
        tl.store(_tile(dx_ptr, pixels, dx_t, VEC), dx.to(dx_ptr.dtype.element_ty), mask=ct_ok)
        dpre = tl.load(dy_row_ptr + tile) * LN2 + x * dinput
        if SOFTPLUS:
            dpre *= _one_minus_exp(dt)
        tl.store(dy_row_ptr + tile, dpre)
        tl.debug_barrier()
        dpre = tl.load(dy_row_ptr + tile)
        dbias += tl.sum(dpre, 0)
        dp_ptrs = dproj_ptr + (pixels * dp_t)[:, None]
        tl.store(dp_ptrs + (R + ns)[None, :], tl.load(B_ptr + tile_n).to(dproj_ptr.dtype.element_ty), mask=p_ok)
        tl.store(dp_ptrs + (R + N + ns)[None, :], tl.load(C_ptr + tile_n).to(dproj_ptr.dtype.element_ty), mask=p_ok)
        if R == 0:
            tl.store(_tile(ddelta_ptr, pixels, dx_t, VEC), dpre.to(ddelta_ptr.dtype.element_ty), mask=ct_ok)
        else:
            weight = tl.load(
                table_ptr + (N + rs)[None, :] * row + cs[:, None], mask=r_ok[None, :] & c_ok[:, None], other=0.0
            )
            dcode = tl.dot(dpre, weight, input_precision=PRECISION)
            tl.store(dp_ptrs + rs[None, :], dcode.to(dproj_ptr.dtype.element_ty), mask=t_ok[:, None] & r_ok[None, :])
            codes = tl.load(
                proj_ptr + (pixels * (p_t * UNIT))[None, :] + rs[:, None], mask=t_ok[None, :] & r_ok[:, None], other=0.0
            ).to(tl.float32)
            dw = tl.dot(codes, dpre, input_precision=PRECISION)
            dw_ptrs = dtable_ptr + (N + rs)[:, None] * C + cs[None, :]
            dw_ok = r_ok[:, None] & c_ok[None, :]
            if chunk_from_end > 0:  # accumulated in memory to save registers
                dw += tl.load(dw_ptrs, mask=dw_ok, other=0.0)
            tl.store(dw_ptrs, dw, mask=dw_ok)
        tl.debug_barrier()  # the next chunk overwrites the scratch

    tl.store(dtable_ptr + ns[:, None] * C + cs[None, :], dA, mask=tile_ok)
    tl.store(dtable_ptr + (N + R) * C + cs, dbias, mask=c_ok)
    tl.store(dtable_ptr + (N + R + 1) * C + cs, dD, mask=c_ok)
