// The forward pass of the one-dimensional scan for few lines: the lanes of a warp lie along ROWS lines (see lines.cuh), so
// that there are more warps than in lines.cu, each with more work per token.
//
//     RESIDENT programs per multiprocessor to compile for
//
// A program takes WARPS * ROWS channels of a group, SEGMENT tokens at a time. Grid: B * groups * blocks of channels.

constexpr int EACH = (2 * PADDED * ALONG + THREADS - 1) / THREADS;  // pieces of B and C: eight tokens of a state

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_lines_across(
    const x_t* __restrict__ u, const y_t* __restrict__ delta, const float* __restrict__ A, const p_t* __restrict__ B,
    const p_t* __restrict__ C, const float* __restrict__ D, const float* __restrict__ bias, x_t* __restrict__ y,
    float* __restrict__ last, int channels, int group, int L, int blocks, i64 u_b, i64 u_c, i64 delta_b, i64 delta_c,
    i64 B_b, i64 B_g, i64 B_n, i64 B_l, i64 C_b, i64 C_g, i64 C_n, i64 C_l) {
    __shared__ struct alignas(16) { float vectors[2][2 * PADDED][LINE]; } S;  // B and C of these tokens and of the next
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int q = lane % LANES, j = lane / LANES % ALONG, r = lane / LANES / ALONG;
    const int groups = channels / group, g = blockIdx.x / blocks % groups, b = blockIdx.x / blocks / groups;
    const int index = (blockIdx.x % blocks * WARPS + warp) * ROWS + r, at = j * STEP;
    const bool mine = index < group;
    const int c = g * group + min(index, group - 1);
    const i64 line = (i64)b * channels + c;
    u += b * u_b + c * u_c + at, delta += b * delta_b + c * delta_c + at, y += line * L + at + q * OWN;
    const float offset = bias[c], skip = D[c];
    float a[PER], state[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int n = i * LANES + q;
        a[i] = n < N ? A[(i64)c * N + n] * LOG2E : 0.f;
        state[i] = 0.f;
    }
    const p_t* from[EACH];
    i64 strides[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int row = (tid + i * THREADS) / ALONG, n = row % PADDED;
        const bool of_B = row < PADDED;
        strides[i] = of_B ? B_l : C_l;
        from[i] = (of_B ? B + b * B_b + g * B_g + n * B_n : C + b * C_b + g * C_g + n * C_n) +
                  (tid + i * THREADS) % ALONG * STEP * strides[i];
        if (row >= 2 * PADDED || n >= N) from[i] = nullptr;
    }

    Raw<X_TYPE> next_u;
    Raw<Y_TYPE> next_delta;
    Raw<P_TYPE> next[EACH];
    auto fetch = [&](int start) {
        const int left = mine ? L - start - at : 0;
        next_delta = read_tokens<Y_TYPE, VEC>(delta + start, left);
        next_u = read_tokens<X_TYPE, VEC>(u + start, left);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            next[i] = read_tokens<P_TYPE, P_VEC>(from[i] + (P_VEC == 1 ? start * strides[i] : start),
                                                 from[i] ? L - start - (tid + i * THREADS) % ALONG * STEP : 0,
                                                 P_VEC == 1 ? strides[i] : 1);
    };
    fetch(0);

    for (int start = 0, tile = 0; start < L; start += SEGMENT, tile ^= 1) {
        float us[STEP], own_u[OWN], own_dt[OWN];
#pragma unroll
        for (int t = 0; t < STEP; t++) us[t] = token<X_TYPE>(next_u.word, t);
        own_tokens<X_TYPE>(own_u, next_u, q), own_tokens<Y_TYPE>(own_dt, next_delta, q);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int row = (tid + i * THREADS) / ALONG;
            float v[STEP];
#pragma unroll
            for (int t = 0; t < STEP; t++) v[t] = token<P_TYPE>(next[i].word, t);
            if (row >= 2 * PADDED) continue;
            float* to = S.vectors[tile][row] + (tid + i * THREADS) % ALONG * 4;
            *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
            *(float4*)(to + HALF) = make_float4(v[4], v[5], v[6], v[7]);
        }
        if (start + SEGMENT < L) fetch(start + SEGMENT);
        const int left = L - start - at - q * OWN;
        float dt[STEP], in[STEP], sums[LEVELS], v[STEP];
        own_steps(own_dt, offset, left);
        share_steps(dt, sums, own_dt, lane, q, j);
#pragma unroll
        for (int t = 0; t < STEP; t++) in[t] = dt[t] * us[t], v[t] = 0.f;
        __syncthreads();

#pragma unroll
        for (int i = 0; i < PER; i++) {
            const float *line_B = S.vectors[tile][i * LANES + q] + 4 * j, *line_C = line_B + PADDED * LINE;
            float Bs[STEP], Cs[STEP], factor[STEP], products[LEVELS];
            numbers(Bs, read4f(line_B)), numbers(Bs + 4, read4f(line_B + HALF));
            numbers(Cs, read4f(line_C)), numbers(Cs + 4, read4f(line_C + HALF));
            float h = j ? 0.f : state[i];
#pragma unroll
            for (int t = 0; t < STEP; t++) factor[t] = exp2f(dt[t] * a[i]), Bs[t] *= in[t];
#pragma unroll
            for (int t = 0; t < STEP; t++) h = factor[t] * h + Bs[t];
            h = scan_over_lanes(h, state[i], sums, a[i], products, j);
#pragma unroll
            for (int t = 0; t < STEP; t++) {
                h = factor[t] * h + Bs[t];
                v[t] += h * Cs[t];
            }
            state[i] = __shfl_sync(EVERY, h, (r * ALONG + ALONG - 1) * LANES + q);
        }
        if constexpr (LANES == 4) fold<8>(v, q, 2), fold<4>(v, q, 1);
        if constexpr (LANES == 2) fold<8>(v, q, 1);
#pragma unroll
        for (int t = 0; t < OWN; t++) v[t] += skip * own_u[t];
        if (mine) write_tokens<X_TYPE, OWN>(y + start, v, left);
    }
#pragma unroll
    for (int i = 0; i < PER; i++)
        if (mine && j == 0 && i * LANES + q < N) last[line * N + i * LANES + q] = state[i];
}
