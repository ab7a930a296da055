// The second kernel of the backward pass of the one-dimensional scan: all gradients of one segment (see lines.cuh).
//
//     WHOLE    lines are a single segment: there is no first kernel, so this one writes the gradients of A and D, too
//     PARTS    programs that share the channels of a group; more than one leaves shares of the gradients of B and C
//     V_TYPE   element type of the gradients of B and C
//     RESIDENT programs per multiprocessor to compile for
//
// Per channel and state, forward in time: each lane runs over its tokens from a zero state, a scan over the lanes gives
// their initial states, and the lane runs again from there; then the same backward in time for the gradients of states.
// Sums over channels stay in registers until all channels are done. Grid: B * groups * segments * PARTS. Writes du, ddelta,
// the gradients of B and C (PARTS, B, G, N, L), and those of bias for each segment, (B, segments, C).

typedef Element<V_TYPE>::type v_t;

struct alignas(16) Shared {
    float B[PADDED][LINE], C[PADDED][LINE];  // later their gradients
    // Where the channels of this program begin. Read for each channel, as the compiler would compute them for each.
    const void* origins[5];
};

// Reads shared memory once more rather than keep what was read before, where registers lack.
__device__ __forceinline__ float4 read_again(const float* from) {
#ifdef __CUDA_ARCH__
    if (WARPS * RESIDENT <= 8) return read4f(from);
    float4 v;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"((unsigned)__cvta_generic_to_shared(from)));
    return v;
#else
    return read4f(from);
#endif
}

// Token i of an array of less than 4 GiB, so that its place takes 32 bits.
template <class T> __device__ __forceinline__ T& token_of(const void* const& origin, unsigned i) {
    T* token = (T*)((char*)*(const void* const volatile*)&origin + i * (unsigned)sizeof(T));
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(token));
#endif
    return *token;
}

__device__ __forceinline__ float sum_lanes(float v, int smallest, int end) {
#pragma unroll
    for (int mask = smallest; mask < end; mask *= 2) v += __shfl_xor_sync(EVERY, v, mask);
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_lines_backward(
    const x_t* __restrict__ dy, const x_t* __restrict__ u, const y_t* __restrict__ delta, const float* __restrict__ A,
    const p_t* __restrict__ B, const p_t* __restrict__ C, const float* __restrict__ D, const float* __restrict__ bias,
    const float* __restrict__ tail, x_t* du, y_t* ddelta, v_t* __restrict__ dB, v_t* __restrict__ dC,
    float* __restrict__ dA, float* __restrict__ dD, float* __restrict__ dbias, int channels, int group, int L, i64 dy_b,
    i64 dy_c, i64 u_b, i64 u_c, i64 delta_b, i64 delta_c, i64 B_b, i64 B_g, i64 B_n, i64 B_l, i64 C_b, i64 C_g, i64 C_n,
    i64 C_l) {
    __shared__ Shared S;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int q = lane % LANES, j = lane / LANES % ALONG, r = lane / LANES / ALONG;
    const int segments = (L + SEGMENT - 1) / SEGMENT, groups = channels / group, programs = gridDim.x / PARTS;
    // The parts and the segments of an image next to each other, so that they read B and C at about the same time.
    const int part = blockIdx.x % PARTS, segment = blockIdx.x / PARTS % segments;
    const int bg = blockIdx.x / PARTS / segments, g = bg % groups, b = bg / groups;
    const int begin = segment * SEGMENT, at = begin + j * STEP, left = L - at;

    const p_t *from_B = B + b * B_b + g * B_g, *from_C = C + b * C_b + g * C_g;
    for (int i = tid; i < PADDED * SEGMENT; i += THREADS) {
        const int n = i / SEGMENT, t = i % SEGMENT, token = begin + t;
        const bool there = n < N && token < L;
        S.B[n][place_in_line(t)] = there ? to_float<P_TYPE>(from_B[n * B_n + token * B_l]) : 0.f;
        S.C[n][place_in_line(t)] = there ? to_float<P_TYPE>(from_C[n * C_n + token * C_l]) : 0.f;
    }
    const i64 origin = (i64)b * channels + g * group;
    if (tid == 0) {
        S.origins[0] = u + b * u_b + g * group * u_c;
        S.origins[1] = dy + b * dy_b + g * group * dy_c;
        S.origins[2] = delta + b * delta_b + g * group * delta_c;
        S.origins[3] = du + origin * L;
        S.origins[4] = ddelta + origin * L;
    }
    __syncthreads();

    float sum_dB[PER][STEP], sum_dC[PER][STEP];
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
        for (int t = 0; t < STEP; t++) sum_dB[i][t] = sum_dC[i][t] = 0.f;

    constexpr int STRIDE = PARTS * WARPS * ROWS;
    constexpr bool AHEAD = X_TYPE && Y_TYPE;  // for float32, the registers do not hold the next channel as well
    const int place = warp * ROWS + r;
    Raw<Y_TYPE> next_delta;
    Raw<X_TYPE> next_u, next_dy;
    auto fetch = [&](int index) {
        const int present = index < group ? left : 0;
        next_delta = read_tokens<Y_TYPE, VEC>(&token_of<const y_t>(S.origins[2], index * (unsigned)delta_c + at), present);
        next_u = read_tokens<X_TYPE, VEC>(&token_of<const x_t>(S.origins[0], index * (unsigned)u_c + at), present);
        next_dy = read_tokens<X_TYPE, VEC>(&token_of<const x_t>(S.origins[1], index * (unsigned)dy_c + at), present);
    };
    if (AHEAD) fetch(part * WARPS * ROWS + place);

#pragma unroll 1
    for (int start = part * WARPS * ROWS; start < group; start += STRIDE) {  // the same for all lanes: they exchange numbers
        const int index = start + place;
        if (!AHEAD) fetch(index);
        const bool mine = index < group;
        const unsigned c = min(index, group - 1);

        // The state before the segment, in its first lanes, and the gradient of its last state, in its last lanes.
        float a[PER], edge[PER];
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const int n = i * LANES + q;
            a[i] = n < N ? A[(g * group + c) * N + n] * LOG2E : 0.f;
            edge[i] = 0.f;
        }
        if (!WHOLE && mine) {
            if (j == 0 && segment)
                read_states(edge, (tail && segment == segments - 1 ? tail + (origin + c) * PADDED
                                                                   : left_at(&token_of<x_t>(S.origins[3], c * L + begin))) + q * PER);
            if (j == ALONG - 1 && segment < segments - 1)
                read_states(edge, left_at(&token_of<y_t>(S.origins[4], c * L + begin)) + q * PER);
        }

        float us[STEP], dys[STEP], dt[STEP], own_u[OWN], own_dy[OWN], own_dt[OWN];
#pragma unroll
        for (int t = 0; t < STEP; t++) us[t] = token<X_TYPE>(next_u.word, t), dys[t] = token<X_TYPE>(next_dy.word, t);
        own_tokens<X_TYPE>(own_u, next_u, q), own_tokens<X_TYPE>(own_dy, next_dy, q);
        own_tokens<Y_TYPE>(own_dt, next_delta, q);
        own_steps(own_dt, bias[g * group + c], mine ? left - q * OWN : 0);
        if (AHEAD && start + STRIDE < group) fetch(index + STRIDE);
        float in[STEP], sums[LEVELS];
        share_steps(dt, sums, own_dt, lane, q, j);
#pragma unroll
        for (int t = 0; t < STEP; t++) in[t] = dt[t] * us[t];

        float d_in[STEP], d_dt[STEP];  // gradients of in, and of dt through the decay
#pragma unroll
        for (int t = 0; t < STEP; t++) d_in[t] = d_dt[t] = 0.f;
        float sum_dA[PER];
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const float *line_B = S.B[i * LANES + q] + 4 * j, *line_C = S.C[i * LANES + q] + 4 * j;
            float Bs[STEP], Cs[STEP], factor[STEP], kept[STEP], products[LEVELS];
            numbers(Bs, read4f(line_B)), numbers(Bs + 4, read4f(line_B + HALF));
            float h = j ? 0.f : edge[i];
#pragma unroll
            for (int t = 0; t < STEP; t++) factor[t] = exp2f(dt[t] * a[i]);
#pragma unroll
            for (int t = 0; t < STEP; t++) h = factor[t] * h + in[t] * Bs[t];
            h = scan_over_lanes(h, edge[i], sums, a[i], products, j);
            numbers(Cs, read4f(line_C)), numbers(Cs + 4, read4f(line_C + HALF));
#pragma unroll
            for (int t = 0; t < STEP; t++) {
                kept[t] = factor[t] * h;
                h = in[t] * Bs[t] + kept[t];
                sum_dC[i][t] += dys[t] * h;
            }
            float grad = j < ALONG - 1 ? 0.f : edge[i];  // of the state before the token
#pragma unroll
            for (int t = STEP - 1; t >= 0; t--) grad = factor[t] * (dys[t] * Cs[t] + grad);
#pragma unroll
            for (int k = 0; k < LEVELS; k++) {
                const float product = k ? __shfl_down_sync(EVERY, products[k], LANES * ((1 << k) - 1)) : products[0];
                const float after = __shfl_down_sync(EVERY, grad, LANES << k);
                grad = j + (1 << k) < ALONG ? product * after + grad : grad;
            }
            const float after = __shfl_down_sync(EVERY, grad, LANES);
            grad = j < ALONG - 1 ? after : edge[i];
            sum_dA[i] = 0.f;
#pragma unroll
            for (int t = STEP - 1; t >= 0; t--) {
                if (t == 7) numbers(Bs, read_again(line_B + HALF)), numbers(Cs, read_again(line_C + HALF));
                if (t == 3) numbers(Bs, read_again(line_B)), numbers(Cs, read_again(line_C));
                grad += dys[t] * Cs[t % 4];
                sum_dB[i][t] += grad * in[t];
                d_in[t] += grad * Bs[t % 4];
                const float exponent = grad * kept[t];  // gradient of dt * A
                d_dt[t] += exponent * a[i];
                if (WHOLE) sum_dA[i] += exponent * dt[t];
                grad *= factor[t];
            }
        }

        if constexpr (LANES == 4) fold<8>(d_in, q, 2), fold<4>(d_in, q, 1), fold<8>(d_dt, q, 2), fold<4>(d_dt, q, 1);
        if constexpr (LANES == 2) fold<8>(d_in, q, 1), fold<8>(d_dt, q, 1);
        float slopes = 0.f, products = 0.f;
        const float skip = D[g * group + c];
#pragma unroll
        for (int t = 0; t < OWN; t++) {
            const float slope = SOFTPLUS ? one_minus_exp(own_dt[t]) : 1.f;
            d_dt[t] = (d_dt[t] * LN2 + own_u[t] * d_in[t]) * slope;
            products += own_dy[t] * own_u[t];
            d_in[t] = own_dt[t] * d_in[t] + skip * own_dy[t];
            slopes += mine && q * OWN + t < left ? d_dt[t] : 0.f;
        }
        __syncwarp();  // what the first kernel has left here was read
        if (mine) {
            write_tokens<X_TYPE, OWN>(&token_of<x_t>(S.origins[3], c * L + at + q * OWN), d_in, left - q * OWN);
            write_tokens<Y_TYPE, OWN>(&token_of<y_t>(S.origins[4], c * L + at + q * OWN), d_dt, left - q * OWN);
        }
        slopes = sum_lanes(slopes, 1, LANES * ALONG);
        if (WHOLE) {
            products = sum_lanes(products, 1, LANES * ALONG);
#pragma unroll
            for (int i = 0; i < PER; i++) {
                sum_dA[i] = sum_lanes(sum_dA[i], LANES, LANES * ALONG);
                if (mine && j == 0 && i * LANES + q < N) dA[(origin + c) * N + i * LANES + q] = sum_dA[i];
            }
        }
        if (mine && j == 0 && q == 0) {
            dbias[((i64)b * segments + segment) * channels + g * group + c] = slopes;
            if (WHOLE) dD[origin + c] = products;
        }
    }

    if constexpr (ROWS > 1)
#pragma unroll
        for (int i = 0; i < PER; i++)
#pragma unroll
            for (int t = 0; t < STEP; t++) {
                sum_dB[i][t] = sum_lanes(sum_dB[i][t], LANES * ALONG, 32);
                sum_dC[i][t] = sum_lanes(sum_dC[i][t], LANES * ALONG, 32);
            }
    for (int turn = 0; turn < WARPS; turn++) {  // in a fixed order
        __syncthreads();
        if (warp == turn && r == 0)
#pragma unroll
            for (int i = 0; i < PER; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float4* to[2] = {(float4*)(S.B[i * LANES + q] + half * HALF + 4 * j),
                                     (float4*)(S.C[i * LANES + q] + half * HALF + 4 * j)};
                    const float *B4 = sum_dB[i] + 4 * half, *C4 = sum_dC[i] + 4 * half;
                    float4 more_B = make_float4(B4[0], B4[1], B4[2], B4[3]);
                    float4 more_C = make_float4(C4[0], C4[1], C4[2], C4[3]);
                    if (turn) more_B = *to[0] + more_B, more_C = *to[1] + more_C;
                    *to[0] = more_B, *to[1] = more_C;
                }
    }
    __syncthreads();
    const i64 start = ((i64)part * (programs / segments) + bg) * N;
    for (int i = tid; i < N * SEGMENT; i += THREADS) {
        const int n = i / SEGMENT, t = i % SEGMENT;
        if (begin + t >= L) continue;
        dB[(start + n) * L + begin + t] = from_float<V_TYPE>(S.B[n][place_in_line(t)]);
        dC[(start + n) * L + begin + t] = from_float<V_TYPE>(S.C[n][place_in_line(t)]);
    }
}
