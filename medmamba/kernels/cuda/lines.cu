// The one-dimensional scan: its forward pass, and with GRADIENT the first kernel of its backward pass (see lines.cuh).
//
//     GRADIENT  0: writes y, and the last state (B, C, N). 1: for each segment, its initial state and the gradient of its
//               last one; and the gradients of A and D for each line, (B, C, N) and (B, C)
//     PACKED    whether B and C stay in 16 bits in shared memory: fewer bytes to read, more instructions
//     RESIDENT  programs per multiprocessor to compile for
//
// A warp walks along the lines of 32 / LANES channels, with their states in registers, in tiles of TILE_L tokens. Of a
// tile, each lane first computes the step sizes of eight or sixteen tokens; B and C are shared by the warps of the program,
// whose channels belong to one group. Grid: B * groups * blocks of channels.
//
// The gradient of A needs no pass in reverse: with s = dh/dA = a s + dt a h', where h' is the state before, it is the sum
// of <dy C, s> over tokens. The gradient of a segment's last state does, and comes from the segments after it, each of
// which passes on its own gradient plus that of its last state times its decay.

constexpr int CHANNELS = 32 / LANES;  // per warp
constexpr int TILE_L = LANES == 4 ? 32 : 16;
constexpr int PIECES = CHANNELS * TILE_L / STEP / 32;  // that a lane loads: eight tokens of a channel each
constexpr int ACROSS = TILE_L / STEP;                  // lanes along a line
constexpr int PITCH = TILE_L + 4, PAIRS = 2 * TILE_L + 4;
constexpr int EACH = (2 * PADDED * ACROSS + THREADS - 1) / THREADS;  // pieces of B and C

constexpr int TOGETHER = PACKED ? 8 : 4;  // tokens for which B and C are read at once

template <bool packed> struct Vectors { typedef float type; };
template <> struct Vectors<true> { typedef u16 type; };
typedef Vectors<PACKED>::type vector_t;
constexpr int VECTOR = TILE_L + (PACKED ? 8 : 4);  // 16 bytes more than the tokens, so that lanes read from different banks

__device__ __forceinline__ void read_vector(float* to, const vector_t* from) {
    if constexpr (PACKED) {
        const uint4 v = *(const uint4*)from;
        const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = token<P_TYPE>(word, i);
    } else
        numbers(to, read4f((const float*)from));
}

struct alignas(16) Shared {
    vector_t vectors[2][2 * PADDED][VECTOR];  // B and C of this tile and of the next
    float steps[WARPS][CHANNELS][PAIRS];  // dt and dt * u, alternating
    float lines[WARPS][CHANNELS][PITCH];  // y; GRADIENT: dy
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_lines(
    const x_t* __restrict__ u, const y_t* __restrict__ delta, const float* __restrict__ A, const p_t* __restrict__ B,
    const p_t* __restrict__ C, const float* __restrict__ D, const float* __restrict__ bias, x_t* y, float* last,
    const x_t* __restrict__ dy, x_t* du, y_t* ddelta, float* tail, float* dA, float* dD, int channels, int group, int L,
    int blocks, i64 u_b, i64 u_c, i64 delta_b, i64 delta_c, i64 dy_b, i64 dy_c, i64 B_b, i64 B_g, i64 B_n, i64 B_l,
    i64 C_b, i64 C_g, i64 C_n, i64 C_l) {
    __shared__ Shared S;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, q = lane % LANES, ch = lane / LANES;
    const int groups = channels / group, g = blockIdx.x / blocks % groups, b = blockIdx.x / blocks / groups;
    const int first = (blockIdx.x % blocks * WARPS + warp) * CHANNELS;  // channel of the warp within the group
    const bool mine = first + ch < group;
    const int c = g * group + min(first + ch, group - 1);
    const i64 line = (i64)b * channels + c;
    const int segments = (L + SEGMENT - 1) / SEGMENT;

    float a[PER], h[PER];
    float sensitivity[PER], sum_dA[PER], decay[PER], carry[PER], dts = 0.f;  // of GRADIENT
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int n = i * LANES + q;
        a[i] = n < N ? A[(i64)c * N + n] * LOG2E : 0.f;
        h[i] = sensitivity[i] = sum_dA[i] = carry[i] = 0.f, decay[i] = 1.f;
    }

    // What this lane loads: some channels, other than its own if a channel has fewer lanes than a line.
    const int at = lane % ACROSS * STEP;
    const x_t *from_u[PIECES], *from_dy[PIECES];
    const y_t* from_delta[PIECES];
    x_t* to_y[PIECES];
    float offset[PIECES], skip[PIECES];
    bool there[PIECES];
    Sum products[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int row = (p * 32 + lane) / ACROSS, cp = g * group + min(first + row, group - 1);
        there[p] = first + row < group;
        from_u[p] = u + b * u_b + cp * u_c + at;
        from_delta[p] = delta + b * delta_b + cp * delta_c + at;
        from_dy[p] = GRADIENT ? dy + b * dy_b + cp * dy_c + at : u;
        to_y[p] = y + ((i64)b * channels + cp) * L + at;
        offset[p] = bias[cp], skip[p] = D[cp];
    }
    const p_t* from[EACH];
    i64 strides[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int row = (tid + i * THREADS) / ACROSS, n = row % PADDED;
        const bool of_B = row < PADDED;
        strides[i] = of_B ? B_l : C_l;
        from[i] = (of_B ? B + b * B_b + g * B_g + n * B_n : C + b * C_b + g * C_g + n * C_n) + at * strides[i];
        if (row >= 2 * PADDED || n >= N) from[i] = nullptr;
    }

    Raw<X_TYPE> next_u[PIECES], next_dy[PIECES];
    Raw<Y_TYPE> next_delta[PIECES];
    Raw<P_TYPE> next[EACH];
    auto fetch = [&](int start) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int left = there[p] ? L - start - at : 0;
            next_delta[p] = read_tokens<Y_TYPE, VEC>(from_delta[p] + start, left);
            next_u[p] = read_tokens<X_TYPE, VEC>(from_u[p] + start, left);
            if (GRADIENT) next_dy[p] = read_tokens<X_TYPE, VEC>(from_dy[p] + start, left);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            next[i] = read_tokens<P_TYPE, P_VEC>(from[i] + (P_VEC == 1 ? start * strides[i] : start),
                                                 from[i] ? L - start - at : 0, P_VEC == 1 ? strides[i] : 1);
    };
    fetch(0);

    for (int start = 0, tile = 0; start < L; start += TILE_L, tile++) {
        Raw<X_TYPE> now_u[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int row = (p * 32 + lane) / ACROSS, left = L - start - at;
            now_u[p] = next_u[p];
            float dt[STEP];
#pragma unroll
            for (int i = 0; i < STEP; i++) dt[i] = token<Y_TYPE>(next_delta[p].word, i) + offset[p];
            if (SOFTPLUS) softplus<STEP>(dt);
            if (left < STEP)
#pragma unroll
                for (int i = 0; i < STEP; i++) dt[i] = i < left ? dt[i] : 0.f;
            float* to = &S.steps[warp][row][2 * at];
#pragma unroll
            for (int i = 0; i < STEP; i += 2)
                *(float4*)(to + 2 * i) = make_float4(dt[i], dt[i] * token<X_TYPE>(now_u[p].word, i), dt[i + 1],
                                                     dt[i + 1] * token<X_TYPE>(now_u[p].word, i + 1));
            if constexpr (GRADIENT) {
                float v[STEP], sum = 0.f;
#pragma unroll
                for (int i = 0; i < STEP; i++) {
                    v[i] = token<X_TYPE>(next_dy[p].word, i);
                    sum += v[i] * token<X_TYPE>(now_u[p].word, i);
                }
                products[p].add(sum);
                write8(&S.lines[warp][row][at], v);
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int row = (tid + i * THREADS) / ACROSS;
            if (row >= 2 * PADDED) continue;
            vector_t* to = &S.vectors[tile & 1][row][at];
            if constexpr (PACKED) *(uint4*)to = uint4{next[i].word[0], next[i].word[1], next[i].word[2], next[i].word[3]};
            else {
                float v[STEP];
#pragma unroll
                for (int t = 0; t < STEP; t++) v[t] = token<P_TYPE>(next[i].word, t);
                write8((float*)to, v);
            }
        }
        if (start + TILE_L < L) fetch(start + TILE_L);
        __syncthreads();

        const vector_t(*vectors)[VECTOR] = S.vectors[tile & 1];
#pragma unroll (8 / TOGETHER)
        for (int t = 0; t < TILE_L; t += TOGETHER) {
            float dt[TOGETHER], in[TOGETHER], v[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; j += 2) {
                const float4 two = read4f(&S.steps[warp][ch][2 * (t + j)]);
                dt[j] = two.x, in[j] = two.y, dt[j + 1] = two.z, in[j + 1] = two.w;
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; j += 4)
                if constexpr (GRADIENT) {
                    numbers(v + j, read4f(&S.lines[warp][ch][t + j]));
                    dts += (dt[j] + dt[j + 1]) + (dt[j + 2] + dt[j + 3]);
                } else v[j] = v[j + 1] = v[j + 2] = v[j + 3] = 0.f;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                float Bs[TOGETHER], Cs[TOGETHER];
                read_vector(Bs, &vectors[i * LANES + q][t]), read_vector(Cs, &vectors[PADDED + i * LANES + q][t]);
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    const float factor = exp2f(dt[j] * a[i]);
                    if constexpr (GRADIENT) {
                        const float kept = factor * h[i], e = v[j] * Cs[j];
                        h[i] = in[j] * Bs[j] + kept;
                        sensitivity[i] = factor * sensitivity[i] + dt[j] * kept;
                        sum_dA[i] += e * sensitivity[i];
                        decay[i] *= factor;
                        carry[i] += decay[i] * e;
                    } else {
                        h[i] = factor * h[i] + in[j] * Bs[j];
                        v[j] += h[i] * Cs[j];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < (GRADIENT ? 0 : TOGETHER); j += 4) {
                float* sums = v + j;
                if constexpr (LANES == 4) fold<4>(sums, lane, 2), fold<2>(sums, lane, 1);
                if constexpr (LANES == 2) fold<4>(sums, lane, 1);
                constexpr int COUNT = 4 / LANES;
                float* to = &S.lines[warp][ch][t + j + q * COUNT];
                if constexpr (COUNT == 4) *(float4*)to = make_float4(sums[0], sums[1], sums[2], sums[3]);
                else
#pragma unroll
                    for (int i = 0; i < COUNT; i++) to[i] = sums[i];
            }
        }
        __syncwarp();
        if constexpr (GRADIENT == 0) {
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const float* lines = &S.lines[warp][(p * 32 + lane) / ACROSS][at];
                float v[STEP];
                numbers(v, read4f(lines)), numbers(v + 4, read4f(lines + 4));
#pragma unroll
                for (int i = 0; i < STEP; i++) v[i] += skip[p] * token<X_TYPE>(now_u[p].word, i);
                if (there[p]) write_tokens<X_TYPE, STEP>(to_y[p] + start, v, L - start - at);
            }
            __syncwarp();
        } else if ((start + TILE_L) % SEGMENT == 0 && start + TILE_L < L) {
            const int segment = start / SEGMENT;
            float* to = left_at(du + line * L + segment * SEGMENT) + PADDED + q;
            float* gradients = left_at(ddelta + line * L + segment * SEGMENT) + q * PER;
            float* state = (tail && segment + 2 == segments ? tail + line * PADDED
                                                            : left_at(du + line * L + (segment + 1) * SEGMENT)) + q * PER;
            if (mine) *to = dts, write_states(gradients, carry), write_states(state, h);
            dts = 0.f;
#pragma unroll
            for (int i = 0; i < PER; i++) carry[i] = 0.f, decay[i] = 1.f;
        }
    }

    if constexpr (GRADIENT == 0) {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (mine && i * LANES + q < N) last[line * N + i * LANES + q] = h[i];
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (mine && i * LANES + q < N) dA[line * N + i * LANES + q] = sum_dA[i];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            float sum = products[p].total;
#pragma unroll
            for (int mask = ACROSS / 2; mask; mask /= 2) sum += __shfl_xor_sync(EVERY, sum, mask);
            const int row = first + (p * 32 + lane) / ACROSS;
            if (row < group && at == 0) dD[(i64)b * channels + g * group + row] = sum;
        }
        if (!mine) return;
        constexpr int AHEAD = 4;  // segments whose gradients are loaded at once
        for (int segment = segments - 2; segment >= 0; segment -= AHEAD) {
            float own[AHEAD][PER], sums[AHEAD];
#pragma unroll
            for (int s = 0; s < AHEAD; s++)
                if (segment - s >= 0) {
                    const i64 token = line * L + (segment - s) * SEGMENT;
                    read_states(own[s], left_at(ddelta + token) + q * PER), sums[s] = left_at(du + token)[PADDED + q];
                }
#pragma unroll
            for (int s = 0; s < AHEAD; s++)
                if (segment - s >= 0) {
                    write_states(left_at(ddelta + line * L + (segment - s) * SEGMENT) + q * PER, carry);
#pragma unroll
                    for (int i = 0; i < PER; i++) carry[i] = exp2f(sums[s] * a[i]) * carry[i] + own[s][i];
                }
        }
    }
}
