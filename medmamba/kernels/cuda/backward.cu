// The backward pass of the four-direction scan: all gradients, tile by tile from the end.
//
//     WARPS     per program; it takes WARPS * 8 * CPT channels
//     CPT       channels per thread: 2, or 4, which costs fewer instructions and more registers
//     OCCUPANCY programs per multiprocessor to compile for
//     ALIGNED   whether C is a multiple of 4
//     QUADS     whether proj can be read four numbers at a time: R a multiple of 4, N = 16, aligned
//
// Grid: B * K * blocks of channels. Writes partial sums: dx per direction, (B, K, L, C); dproj per block of channels,
// (blocks, B, L, K, P); parameter gradients per image, (B, K, N + R + 2, C). They are reduced afterwards in a fixed
// order, without atomics, so results are reproducible from run to run.
//
// Per tile: (1) gather its tokens into shared memory; (2) forward from the saved state, keeping the state before each
// group of tokens; (3) from the last group on, forward again with states and decays in registers, then backward; (4)
// the step sizes and dx; (5) sums over channels and over tokens. In (2) and (3) a warp holds 16 states of 8 * CPT
// channels; thread (j, s) holds states 4s to 4s + 3 of CPT channels from CPT * j, so that sums over states and over
// channels both take few shuffles.

constexpr int THREADS = 32 * WARPS;
constexpr int WC = 8 * CPT;  // channels per warp
constexpr int CB = WARPS * WC;
constexpr int SHARE = THREADS / CB;  // threads per channel in (1), (4) and (5); each takes every SHARE-th token or rank
constexpr int PITCH = CB + 4;  // puts adjacent tokens of a channel into different banks
constexpr int GROUP = 4;
constexpr int GROUPS = TILE / GROUP;
constexpr int OWN = TILE / SHARE;
constexpr int STEP = QUADS ? 4 : 1;  // numbers per load of proj
typedef Several<P_TYPE, STEP>::type load_t;
// Lanes that share one gradient of the code in (5), so that few gradients still occupy most threads. All lanes of a
// warp take the same number of rounds, because 16 tokens times any rank are a multiple of its outputs.
constexpr int SPLIT = RANK <= 8 ? 4 : 1;
constexpr float LN2 = 0.6931471805599453f;

// Compensated (Kahan) summation in float32.
struct Sum {
    float total = 0.f, lost = 0.f;
    __device__ __forceinline__ void add(float v) {
        v -= lost;
        const float next = total + v;
        lost = (next - total) - v;
        total = next;
    }
};

struct Shared {
    float rows[TILE][ROW];
    float dt[TILE][PITCH], in[TILE][PITCH], dy[TILE][PITCH];  // in: dt * x, later its gradient; dy: later that of dt
    float kept[WARPS][GROUPS - 1][4][32 * CPT];
    float dbc[WARPS][TILE][2 * NP];
    float w[RANK][PITCH], dw[RANK][PITCH];
    int pixels[2][TILE];
};

template <int COUNT> __device__ __forceinline__ void fold(float* v, int lane, int mask) {
    // Adds values of lanes that differ in `mask`; each lane keeps half of the sums.
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        const bool upper = lane & mask;
        const float send = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
        v[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
    }
}

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

    // In (1), (4), (5): one channel, every SHARE-th token.
    const int ct = tid % CB, share = tid / CB, c = block * CB + ct;
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

    x += b * x_b + cc;
    dy += b * dy_b + cc;
    proj += b * p_b + (i64)k * p_k;
    dx += (i64)line * L * C + cc;
    states += (i64)line * tiles * N * C;
    dproj += (((i64)block * batch + b) * L * DIRECTIONS + k) * P;
    dtable += (i64)line * (N + RANK + 2) * C;

    for (int i = tid; i < TILE * ROW; i += THREADS) S.rows[0][i] = 0.f;
    for (int i = tid; i < RANK * CB; i += THREADS) {
        int channel = block * CB + i % CB;
        S.w[i / CB][i % CB] = channel < C ? dt_weight[(k * C + channel) * RANK + i / CB] : 0.f;
        S.dw[i / CB][i % CB] = 0.f;
    }

    for (int tile = tiles - 1; tile >= 0; tile--) {
        int* pixels = S.pixels[tile & 1];
        if (tid < TILE) pixels[tid] = pixel_of(min(tile * TILE + tid, L - 1), k, H, W);
        __syncthreads();

        // (1)
        x_t xs[OWN], dys[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int pixel = pixels[share + i * SHARE];
            xs[i] = x[(i64)pixel * x_l];
            dys[i] = dy[(i64)pixel * dy_l];
        }
        for (int i = tid; i < TILE * (P / STEP); i += THREADS) {
            const int t = i / (P / STEP), j = i % (P / STEP);
            const load_t v = *(const load_t*)(proj + (i64)pixels[t] * p_l + j * STEP);
            unpack<P_TYPE, STEP>(&S.rows[t][QUADS ? 4 * j : place_of(j)], v);
        }
        float w[RANK];
#pragma unroll
        for (int r = 0; r < RANK; r++) w[r] = S.w[r][ct];
        __syncthreads();
        float products = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int t = share + i * SHARE;
            float pre = bias;
#pragma unroll
            for (int r = 0; r < RANK; r++) pre += w[r] * S.rows[t][r];
            const bool there = mine && tile * TILE + t < L;  // padding changes neither states nor sums
            const float dt = there ? softplus(pre) : 0.f;
            const float xt = there ? to_float<X_TYPE>(xs[i]) : 0.f, dyt = there ? to_float<X_TYPE>(dys[i]) : 0.f;
            products += xt * dyt;
            S.dt[t][ct] = dt;
            S.in[t][ct] = dt * xt;
            S.dy[t][ct] = dyt;
        }
        dskip.add(products);
        __syncthreads();

        // (2)
        float h[4][CPT];
        const float* before = states + (i64)tile * N * C + cw;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = 4 * s + i;
            if (ALIGNED) {
                if (n < N && cw < C) load(h[i], before + n * C);
                else
#pragma unroll
                    for (int q = 0; q < CPT; q++) h[i][q] = 0.f;
            } else
#pragma unroll
                for (int q = 0; q < CPT; q++) h[i][q] = n < N && cw + q < C ? before[n * C + q] : 0.f;
        }
        for (int group = 0; group < GROUPS - 1; group++) {
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
        for (int group = GROUPS - 1; group >= 0; group--) {
            if (group < GROUPS - 1)
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
                S.dbc[warp][t][which / 4 * NP + 4 * s + which % 4] = dbc[0];
                fold<2 * CPT>(dc, lane, 1), fold<CPT>(dc, lane, 2);
                __syncwarp();  // every lane has read what is overwritten next
                float* to = (lane & 1 ? S.dy[t] : S.in[t]) + cs + lane / 2 % 2 * (CPT / 2);
                to[0] = dc[0];
                if (CPT == 4) to[1] = dc[1];
            }
        }
        __syncthreads();

        // (4)
        float slopes = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int t = share + i * SHARE, pixel = pixels[t];
            const float xt = to_float<X_TYPE>(x[(i64)pixel * x_l]), dyt = to_float<X_TYPE>(dy[(i64)pixel * dy_l]);
            const float dt = S.dt[t][ct], din = S.in[t][ct];
            if (mine && tile * TILE + t < L) dx[(i64)pixel * C] = from_float<X_TYPE>(dt * din + skip * dyt);
            // Zero for padded tokens and channels, because their dt is zero.
            const float dpre = (S.dy[t][ct] * LN2 + xt * din) * one_minus_exp(dt);
            slopes += dpre;
            S.dy[t][ct] = dpre;
        }
        dbias.add(slopes);
        __syncthreads();

        // (5)
        for (int r = share; r < RANK; r += SHARE) {
            float sum = 0.f;
#pragma unroll
            for (int t = 0; t < TILE; t++) sum += S.dy[t][ct] * S.rows[t][r];
            S.dw[r][ct] += sum;
        }
        for (int i = tid / SPLIT; i < TILE * RANK; i += THREADS / SPLIT) {  // the same number of rounds for a whole warp
            const int t = i % TILE, r = i / TILE;
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
            for (int q = tid % SPLIT * 4; q < CB; q += 4 * SPLIT) {
                float u[4], v[4];
                load4(u, &S.dy[t][q]), load4(v, &S.w[r][q]);
#pragma unroll
                for (int j = 0; j < 4; j++) sums[j] += u[j] * v[j];
            }
            float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
            for (int mask = 1; mask < SPLIT; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
            if (tid % SPLIT == 0 && tile * TILE + t < L) dproj[(i64)pixels[t] * (DIRECTIONS * P) + r] = from_float<Y_TYPE>(sum);
        }
        for (int i = tid; i < TILE * 2 * N; i += THREADS) {
            const int t = i / (2 * N), j = i % (2 * N), from = j < N ? j : NP + j - N;
            float sum = 0.f;
#pragma unroll
            for (int v = 0; v < WARPS; v++) sum += S.dbc[v][t][from];
            if (tile * TILE + t < L) dproj[(i64)pixels[t] * (DIRECTIONS * P) + RANK + j] = from_float<Y_TYPE>(sum);
        }
    }

#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int q = 0; q < CPT; q++)
            if (4 * s + i < N && cw + q < C) dtable[(4 * s + i) * C + cw + q] = da[i][q];
    __syncthreads();
    S.dt[share][ct] = dbias.total, S.in[share][ct] = dskip.total;
    __syncthreads();
    if (share == 0 && mine) {
        for (int r = 0; r < RANK; r++) dtable[(N + r) * C + c] = S.dw[r][ct];
        for (int i = 1; i < SHARE; i++) dbias.add(S.dt[i][ct]), dskip.add(S.in[i][ct]);
        dtable[(N + RANK) * C + c] = dbias.total;
        dtable[(N + RANK + 1) * C + c] = dskip.total;
    }
}
