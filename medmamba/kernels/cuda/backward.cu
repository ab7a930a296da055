// The backward pass of the four-direction scan: all gradients, tile by tile from the end.
//
//     WARPS     per program; it takes WARPS * 8 * CPT channels
//     CPT       channels per thread: 2, or 4, which costs fewer instructions and more registers
//     OCCUPANCY programs per multiprocessor to compile for
//     ALIGNED   whether C is a multiple of 4
//     QUADS     whether proj can be read four numbers at a time: R a multiple of 4, N = 16, aligned
//     CHUNKS    whether x and dy can be read 16 bytes at a time
//
// Grid: B * K * blocks of channels. Writes partial sums: dx per direction, (B, K, L, C); dproj per block of channels,
// (blocks, B, L, K, P); parameter gradients per image, (B, K, N + R + 2, C). They are reduced afterwards in a fixed
// order, without atomics, so results are reproducible from run to run.
//
// Per tile: (1) gather its tokens and compute the step sizes; (2) forward from the saved state, keeping the state before
// each group of tokens; (3) from the last group on, forward again with states and decays in registers, then backward; (4)
// gradients before softplus, and dx; (5) sums over channels. A warp holds 16 states of 8 * CPT channels, and all steps but
// the sum over the warps of (5) stay within it. In (2) and (3), thread (j, s) holds states 4s to 4s + 3 of CPT channels
// from CPT * j, so that sums over states and over channels both take few shuffles.

constexpr int THREADS = 32 * WARPS;
constexpr int WC = 8 * CPT;  // channels per warp
constexpr int CB = WARPS * WC;
constexpr int SHARE = 32 / WC;  // lanes per channel in (1) and (4)
constexpr int PITCH = CB + 4;   // puts adjacent tokens of a channel into different banks
constexpr int GROUP = 4;  // tokens whose states are in registers at the same time in (3)
constexpr int GROUPS = TILE / GROUP;
constexpr int TOGETHER = 4;        // consecutive tokens of a thread in (1) and (4), for independent chains of operations
constexpr int STEP = QUADS ? 4 : 1;  // numbers per load of proj
typedef Several<P_TYPE, STEP>::type load_t;
constexpr int LOADS = (TILE * (P / STEP) + THREADS - 1) / THREADS;

struct Shared {
    float rows[TILE][ROW];
    float dt[TILE][PITCH], in[TILE][PITCH], dy[TILE][PITCH];  // in: dt * x, later its gradient; dy: later that of dt
    float before[4][THREADS * CPT];  // the states before the tile
    float kept[WARPS][GROUPS - 1][4][32 * CPT];
    float sums[WARPS][TILE][ROW];  // over the channels of a warp: gradients of [code | B | C]
    float w[RP][PITCH], dw[RP][PITCH];
    x_t maps[2][2][TILE][CB];  // x and dy of this tile and of the next
    // Rings of four tiles: pixel indices, and offsets of these pixels in x, dy and dx, in bytes.
    int pixels[4][TILE];
    unsigned from[4][2][TILE];
    uint4 to[4][TILE / 4];
};

__device__ __forceinline__ void load(float* to, const float* from) {
    if constexpr (CPT == 4) {
        float4 v = *(const float4*)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
        float2 v = *(const float2*)from;
        to[0] = v.x, to[1] = v.y;
    }
}

__device__ __forceinline__ void store(float* to, const float* from) {
    if constexpr (CPT == 4) *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
    else *(float2*)to = make_float2(from[0], from[1]);
}

__device__ __forceinline__ void load4(float* to, const float* from) {
    float4 v = *(const float4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void store_y(y_t* to, float4 v) {
    if constexpr (Y_TYPE == 0) *(float4*)to = v;
    else
        *(uint2*)to = uint2{(unsigned)from_float<Y_TYPE>(v.x) | (unsigned)from_float<Y_TYPE>(v.y) << 16,
                            (unsigned)from_float<Y_TYPE>(v.z) | (unsigned)from_float<Y_TYPE>(v.w) << 16};
}

extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY) scan_backward(
    const x_t* __restrict__ dy, const x_t* __restrict__ x, const p_t* __restrict__ proj,
    const float* __restrict__ dt_weight, const float* __restrict__ dt_bias, const float* __restrict__ A,
    const float* __restrict__ D, const float* __restrict__ states, x_t* __restrict__ dx, y_t* __restrict__ dproj,
    float* __restrict__ dtable, int batch, int H, int W, int C, int blocks, i64 dy_b, int dy_l, i64 x_b, int x_l,
    i64 p_b, int p_l, int p_k) {
    DYNAMIC_SHARED(memory);
    Shared& S = *(Shared*)memory;
    const int L = H * W, tiles = (L + TILE - 1) / TILE;
    const int block = blockIdx.x % blocks, line = blockIdx.x / blocks, k = line % DIRECTIONS, b = line / DIRECTIONS;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;

    // In (1), (4): one channel, groups of TOGETHER tokens.
    const int ct = warp * WC + lane % WC, share = lane / WC, c = block * CB + ct;
    const bool mine = c < C;
    const int cc = mine ? c : C - 1;
    const float bias = dt_bias[k * C + cc], skip = D[k * C + cc];
    Sum dskip, dbias;

    // In (2), (3): states 4s + i of channels cw + q.
    const int s = lane % 4, cs = warp * WC + lane / 4 * CPT, cw = block * CB + cs;
    float a[4][CPT], g[4][CPT], da[4][CPT];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int q = 0; q < CPT; q++) {
            int n = 4 * s + i;
            a[i][q] = n < N && cw + q < C ? A[(k * C + cw + q) * N + n] * LOG2E : 0.f;
            g[i][q] = da[i][q] = 0.f;
        }

    x += b * x_b;
    dy += b * dy_b;
    proj += b * p_b + (i64)k * p_k;
    dx += (i64)line * L * C + cc;
    states += (i64)line * tiles * N * C;
    dproj += (((i64)block * batch + b) * L * DIRECTIONS + k) * P;
    dtable += (i64)line * (N + RANK + 2) * C;

    for (int i = tid; i < TILE * ROW; i += THREADS) S.rows[0][i] = 0.f;
    for (int i = tid; i < RP * CB; i += THREADS) {
        int channel = block * CB + i % CB;
        S.w[i / CB][i % CB] = channel < C && i / CB < RANK ? dt_weight[(k * C + channel) * RANK + i / CB] : 0.f;
        S.dw[i / CB][i % CB] = 0.f;
    }
    for (int i = 0; i < 4; i++)
        for (int q = 0; q < CPT; q++) S.before[i][tid * CPT + q] = 0.f;  // padding stays zero
    auto place = [&](int tile) {  // by the first threads
        const int pixel = pixel_of(min(max(tile, 0) * TILE + tid, L - 1), k, H, W);
        S.pixels[tile & 3][tid] = pixel;
        S.from[tile & 3][0][tid] = (unsigned)pixel * (unsigned)x_l * (unsigned)sizeof(x_t);
        S.from[tile & 3][1][tid] = (unsigned)pixel * (unsigned)dy_l * (unsigned)sizeof(x_t);
        ((unsigned*)S.to[tile & 3])[tid] = (unsigned)pixel * (unsigned)C * (unsigned)sizeof(x_t);
    };
    load_t ahead[LOADS];
    auto fetch = [&](int tile) {  // proj
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP), j = index % (P / STEP);
            if (t < TILE) ahead[i] = *(const load_t*)(proj + (i64)S.pixels[tile & 3][t] * p_l + j * STEP);
        }
    };
    auto bring_maps = [&](int tile) {  // x and dy of the channels of this warp
        constexpr int EACH = CHUNKS ? 16 / sizeof(x_t) : 1, COPIES = 2 * TILE * WC / EACH / 32;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int index = i * 32 + lane, at = warp * WC + index % (WC / EACH) * EACH, rest = index / (WC / EACH);
            const int t = rest % TILE, which = rest / TILE;
            const x_t* from = (which ? dy : x) + min(block * CB + at, C - EACH);
            from = (const x_t*)((const char*)from + S.from[tile & 3][which][t]);
            x_t* to = &S.maps[tile & 1][which][t][at];
            if constexpr (CHUNKS) copy_async<16>(to, from);
            else *to = *from;
        }
    };
    auto bring_states = [&](int tile) {  // of this thread
        const float* before = states + (i64)tile * N * C + cw;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = 4 * s + i;
            float* to = &S.before[i][tid * CPT];
            if (ALIGNED) {
                if (n < N && cw < C) copy_async<4 * CPT>(to, before + n * C);
            } else
#pragma unroll
                for (int q = 0; q < CPT; q++)
                    if (n < N && cw + q < C) to[q] = before[n * C + q];
        }
    };
    if (tid < TILE) place(tiles - 1), place(tiles - 2);
    __syncthreads();
    fetch(tiles - 1), bring_maps(tiles - 1), bring_states(tiles - 1);

    for (int tile = tiles - 1; tile >= 0; tile--) {
        const int* pixels = S.pixels[tile & 3];
        const int valid = L - tile * TILE;  // tokens; padding changes neither states nor sums, because its dt is zero

        // (1)
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP), j = index % (P / STEP);
            if (t < TILE) unpack<P_TYPE, STEP>(&S.rows[t][QUADS ? 4 * j : place_of(j)], ahead[i]);
        }
        wait_for_copies();
        __syncthreads();
        if (tid < TILE) place(tile - 2);
        if (tile) fetch(tile - 1), bring_maps(tile - 1);
        float products = 0.f;
        for (int first = share * TOGETHER; first < TILE; first += SHARE * TOGETHER) {
            float xt[TOGETHER], dyt[TOGETHER], dt[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                xt[i] = to_float<X_TYPE>(S.maps[tile & 1][0][first + i][ct]);
                dyt[i] = to_float<X_TYPE>(S.maps[tile & 1][1][first + i][ct]);
                dt[i] = bias;
            }
#pragma unroll
            for (int r = 0; r < RP; r += 4) {
                const float w[4] = {S.w[r][ct], S.w[r + 1][ct], S.w[r + 2][ct], S.w[r + 3][ct]};
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    float code[4];
                    load4(code, &S.rows[first + i][r]);
#pragma unroll
                    for (int j = 0; j < 4; j++) dt[i] += w[j] * code[j];
                }
            }
            softplus<TOGETHER>(dt);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int t = first + i;
                const bool there = mine && t < valid;
                dt[i] = there ? dt[i] : 0.f, dyt[i] = there ? dyt[i] : 0.f;
                products += xt[i] * dyt[i];
                S.dt[t][ct] = dt[i];
                S.in[t][ct] = dt[i] * xt[i];
                S.dy[t][ct] = dyt[i];
            }
        }
        dskip.add(products);
        __syncwarp();

        // (2)
        float h[4][CPT];
#pragma unroll
        for (int i = 0; i < 4; i++) load(h[i], &S.before[i][tid * CPT]);
        if (tile) bring_states(tile - 1);
        const int groups = min(GROUPS, (valid + GROUP - 1) / GROUP);
        for (int group = 0; group < groups - 1; group++) {
#pragma unroll
            for (int i = 0; i < 4; i++) store(&S.kept[warp][group][i][lane * CPT], h[i]);
#pragma unroll
            for (int u = 0; u < GROUP; u++) {
                const int t = group * GROUP + u;
                float dt[CPT], in[CPT], B[4];
                load(dt, &S.dt[t][cs]), load(in, &S.in[t][cs]), load4(B, &S.rows[t][RP + 4 * s]);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int q = 0; q < CPT; q++) h[i][q] = exp2f(dt[q] * a[i][q]) * h[i][q] + in[q] * B[i];
            }
        }

        // (3)
        for (int group = groups - 1; group >= 0; group--) {
            if (group < groups - 1)
#pragma unroll
                for (int i = 0; i < 4; i++) load(h[i], &S.kept[warp][group][i][lane * CPT]);
            float hs[GROUP + 1][4][CPT], decays[GROUP][4][CPT];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int q = 0; q < CPT; q++) hs[0][i][q] = h[i][q];
#pragma unroll
            for (int u = 0; u < GROUP; u++) {
                const int t = group * GROUP + u;
                float dt[CPT], in[CPT], B[4];
                load(dt, &S.dt[t][cs]), load(in, &S.in[t][cs]), load4(B, &S.rows[t][RP + 4 * s]);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int q = 0; q < CPT; q++) {
                        decays[u][i][q] = exp2f(dt[q] * a[i][q]);
                        hs[u + 1][i][q] = decays[u][i][q] * hs[u][i][q] + in[q] * B[i];
                    }
            }
#pragma unroll
            for (int u = GROUP - 1; u >= 0; u--) {
                const int t = group * GROUP + u;
                float dt[CPT], in[CPT], dyt[CPT], B[4], Cs[4];
                load(dt, &S.dt[t][cs]), load(in, &S.in[t][cs]), load(dyt, &S.dy[t][cs]);
                load4(B, &S.rows[t][RP + 4 * s]), load4(Cs, &S.rows[t][RP + NP + 4 * s]);
                float dbc[8], dc[2 * CPT];  // gradients of B and C; of the input and, through the decay, of dt
#pragma unroll
                for (int i = 0; i < 8; i++) dbc[i] = 0.f;
#pragma unroll
                for (int q = 0; q < 2 * CPT; q++) dc[q] = 0.f;
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int q = 0; q < CPT; q++) {
                        float& grad = g[i][q];
                        dbc[4 + i] += dyt[q] * hs[u + 1][i][q];
                        grad += dyt[q] * Cs[i];
                        dbc[i] += grad * in[q];
                        dc[q] += grad * B[i];
                        grad *= decays[u][i][q];
                        const float exponent = grad * hs[u][i][q];  // gradient of dt * A
                        da[i][q] += dt[q] * exponent;
                        dc[CPT + q] += exponent * a[i][q];
                    }
                fold<8>(dbc, lane, 16), fold<4>(dbc, lane, 8), fold<2>(dbc, lane, 4);
                const int which = lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
                S.sums[warp][t][RP + which / 4 * NP + 4 * s + which % 4] = dbc[0];
                fold<2 * CPT>(dc, lane, 1), fold<CPT>(dc, lane, 2);
                __syncwarp();  // every lane has read what is overwritten next
                float* to = (lane & 1 ? S.dy[t] : S.in[t]) + cs + lane / 2 % 2 * (CPT / 2);
                to[0] = dc[0];
                if (CPT == 4) to[1] = dc[1];
            }
        }
        __syncwarp();

        // (4)
        float slopes = 0.f;
        for (int first = share * TOGETHER; first < TILE; first += SHARE * TOGETHER) {
            float dyt[TOGETHER];
            const uint4 offsets = S.to[tile & 3][first / 4];
            const unsigned at[TOGETHER] = {offsets.x, offsets.y, offsets.z, offsets.w};
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const int t = first + i;
                const float xt = to_float<X_TYPE>(S.maps[tile & 1][0][t][ct]);
                const float dt = S.dt[t][ct], din = S.in[t][ct];
                dyt[i] = dt * din + skip * to_float<X_TYPE>(S.maps[tile & 1][1][t][ct]);
                // Zero for padded tokens and channels, because their dt is zero.
                const float dpre = (S.dy[t][ct] * LN2 + xt * din) * one_minus_exp(dt);
                slopes += dpre;
                S.dy[t][ct] = dpre;
            }
            if (!mine) continue;
            if (first + TOGETHER <= valid)
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) *(x_t*)((char*)dx + at[i]) = from_float<X_TYPE>(dyt[i]);
            else
                for (int i = 0; i < TOGETHER; i++)
                    if (first + i < valid) *(x_t*)((char*)dx + at[i]) = from_float<X_TYPE>(dyt[i]);
        }
        dbias.add(slopes);
        __syncwarp();

        // (5)
#pragma unroll 2
        for (int r = 0; r < RP; r += 4) {  // of the code's weights: this lane sums its tokens
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int i = 0; i < TILE / SHARE; i++) {
                const int t = (i / TOGETHER * SHARE + share) * TOGETHER + i % TOGETHER;
                const float dpre = S.dy[t][ct];
                float code[4];
                load4(code, &S.rows[t][r]);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += dpre * code[j];
            }
            if constexpr (SHARE == 2) fold<4>(sum, lane, 16);
#pragma unroll
            for (int j = 0; j < 4 / SHARE; j++) S.dw[r + share * (4 / SHARE) + j][ct] += sum[j];
        }
        {  // of the codes: this lane sums the channels of its warp for one token and half of the ranks
            const int t = lane % TILE, half = lane / TILE * (RP / 2);
            float dpre[WC];
#pragma unroll
            for (int q = 0; q < WC; q += 4) load4(dpre + q, &S.dy[t][warp * WC + q]);
#pragma unroll 2
            for (int r = half; r < half + RP / 2; r++) {
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int q = 0; q < WC; q += 4) {
                    float w[4];
                    load4(w, &S.w[r][warp * WC + q]);
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[j] += dpre[q + j] * w[j];
                }
                S.sums[warp][t][r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
        }
        __syncthreads();
        if (QUADS) {
            for (int i = tid; i < TILE * (ROW / 4); i += THREADS) {
                const int t = i / (ROW / 4), j = i % (ROW / 4) * 4;
                float sum[4];
                load4(sum, &S.sums[0][t][j]);
#pragma unroll
                for (int v = 1; v < WARPS; v++) {
                    float more[4];
                    load4(more, &S.sums[v][t][j]);
#pragma unroll
                    for (int q = 0; q < 4; q++) sum[q] += more[q];
                }
                if (t < valid)
                    store_y(dproj + (i64)pixels[t] * (DIRECTIONS * P) + j, make_float4(sum[0], sum[1], sum[2], sum[3]));
            }
        } else {
            for (int i = tid; i < TILE * P; i += THREADS) {
                const int t = i / P, j = i % P;
                float sum = 0.f;
#pragma unroll
                for (int v = 0; v < WARPS; v++) sum += S.sums[v][t][place_of(j)];
                if (t < valid) dproj[(i64)pixels[t] * (DIRECTIONS * P) + j] = from_float<Y_TYPE>(sum);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int q = 0; q < CPT; q++)
            if (4 * s + i < N && cw + q < C) dtable[(4 * s + i) * C + cw + q] = da[i][q];
    __syncwarp();
    S.dt[share][ct] = dbias.total, S.in[share][ct] = dskip.total;
    __syncwarp();
    if (share == 0 && mine) {
        for (int r = 0; r < RANK; r++) dtable[(N + r) * C + c] = S.dw[r][ct];
        for (int i = 1; i < SHARE; i++) dbias.add(S.dt[i][ct]), dskip.add(S.in[i][ct]);
        dtable[(N + RANK) * C + c] = dbias.total;
        dtable[(N + RANK + 1) * C + c] = dskip.total;
    }
}
