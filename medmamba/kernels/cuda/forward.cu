// The forward pass of the four-direction scan.
//
//     LANES     lanes that share one channel, each with NP / LANES of its states: 1 if there are enough channels to
//               fill the GPU, otherwise more
//     THREADS   per program; it takes THREADS / LANES channels
//     SAVE      whether to save the state before each tile, (B, K, tiles, N, C)
//     ENDS      instead of y, write the state after each segment for a zero initial state, (B, K, segments, N, C), and
//               the sum of its step sizes, (B, K, segments, C)
//     CARRY     compute the initial state of each segment from the output of ENDS
//     QUADS     whether proj can be read four numbers at a time: R a multiple of 4, N = 16, aligned
//
// If there are too few lines to fill the GPU, the length is split into segments of whole tiles, which two launches,
// ENDS and CARRY, process in parallel. Grid: B * K * segments * blocks of channels. Writes the share of each direction
// in y, (B, K, L, C).

constexpr int SPT = NP / LANES;  // states per thread
constexpr int CB = THREADS / LANES;
constexpr int STEP = QUADS ? 4 : 1;  // numbers per load of proj
constexpr int LOADS = (TILE * (P / STEP) + THREADS - 1) / THREADS;
constexpr int GROUP = 4;  // tokens of x to prefetch

extern "C" __global__ void __launch_bounds__(THREADS) scan_forward(
    const x_t* __restrict__ x, const p_t* __restrict__ proj, const float* __restrict__ dt_weight,
    const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D, y_t* __restrict__ y,
    float* __restrict__ states, float* __restrict__ ends, float* __restrict__ sums_of_dt, int H, int W, int C, int blocks,
    int segments, int length, i64 x_b, int x_l, i64 p_b, int p_l, int p_k) {
    __shared__ float4 rows4[2][TILE][ROW / 4];
    __shared__ int pixels[4][TILE];  // ring buffer of four tiles: two are in use while the next is written
    const int L = H * W, tiles = (L + TILE - 1) / TILE;
    const int block = blockIdx.x % blocks, segment = blockIdx.x / blocks % segments;
    const int line = blockIdx.x / blocks / segments, k = line % DIRECTIONS, b = line / DIRECTIONS;
    const int first = segment * length, last = min(first + length, tiles);  // tiles
    const int tid = threadIdx.x, part = tid % LANES, c = block * CB + tid / LANES;
    const bool mine = c < C;
    const int cc = mine ? c : C - 1;

    float a[SPT], h[SPT], w[RANK];
    const int kc = k * C + cc;
#pragma unroll
    for (int i = 0; i < SPT; i++) {
        int n = part * SPT + i;
        a[i] = n < N ? A[kc * N + n] * LOG2E : 0.f;
        h[i] = 0.f;
    }
#pragma unroll
    for (int r = 0; r < RANK; r++) w[r] = dt_weight[kc * RANK + r];
    const float bias = dt_bias[kc], skip = part == 0 ? D[kc] : 0.f;

    x += b * x_b + cc;
    proj += b * p_b + (i64)k * p_k;
    y += (i64)line * L * C + cc;
    if (SAVE) states += (i64)line * tiles * N * C + cc;

    ends += (i64)line * segments * N * C + cc;
    sums_of_dt += (i64)line * segments * C + cc;
    if (CARRY)
        for (int s = 0; s < segment; s++) {
            const float dt = sums_of_dt[(i64)s * C];
#pragma unroll
            for (int i = 0; i < SPT; i++) {
                const int n = part * SPT + i;
                h[i] = exp2f(dt * a[i]) * h[i] + (n < N ? ends[((i64)s * N + n) * C] : 0.f);
            }
        }
    float dts = 0.f;

    for (int i = tid; i < 2 * TILE * ROW; i += THREADS) ((float*)rows4)[i] = 0.f;  // the padding stays zero
    if (tid < TILE) pixels[first & 3][tid] = pixel_of(min(first * TILE + tid, L - 1), k, H, W);
    __syncthreads();

    typedef typename Several<P_TYPE, STEP>::type load_t;
    load_t ahead[LOADS];
    auto fetch = [&](int tile) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP);
            if (t < TILE) ahead[i] = *(const load_t*)(proj + (i64)pixels[tile & 3][t] * p_l + index % (P / STEP) * STEP);
        }
    };
    auto input = [&](int t) { return x[(i64)pixels[t / TILE & 3][t % TILE] * x_l]; };
    x_t next[GROUP];
    fetch(first);
#pragma unroll
    for (int i = 0; i < GROUP; i++) next[i] = input(first * TILE + i);

    for (int tile = first; tile < last; tile++) {
        float* rows = (float*)rows4[tile & 1];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP), j = index % (P / STEP);
            if (t < TILE) unpack<P_TYPE, STEP>(rows + t * ROW + (QUADS ? 4 * j : place_of(j)), ahead[i]);
        }
        if (tid < TILE) pixels[tile + 1 & 3][tid] = pixel_of(min((tile + 1) * TILE + tid, L - 1), k, H, W);
        __syncthreads();
        if (tile + 1 < last) fetch(tile + 1);
        if (SAVE && mine) {
            float* here = states + (i64)tile * N * C;
#pragma unroll
            for (int i = 0; i < SPT; i++)
                if (part * SPT + i < N) here[(part * SPT + i) * C] = h[i];
        }
        for (int group = 0; group < TILE; group += GROUP) {
            float xs[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; i++) xs[i] = to_float<X_TYPE>(next[i]);
#pragma unroll
            for (int i = 0; i < GROUP; i++) next[i] = input(tile * TILE + group + GROUP + i);
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const int t = group + i;
                const float4* row = rows4[tile & 1][t];
                float pre = bias;
#pragma unroll
                for (int r = 0; r < RP / 4; r++) {
                    float4 code = row[r];
                    pre += w[4 * r] * code.x;
                    if (4 * r + 1 < RANK) pre += w[4 * r + 1] * code.y;
                    if (4 * r + 2 < RANK) pre += w[4 * r + 2] * code.z;
                    if (4 * r + 3 < RANK) pre += w[4 * r + 3] * code.w;
                }
                const float dt = softplus(pre), in = dt * xs[i];
                if (ENDS) dts += dt;  // a segment that is not the last has no padding
                float sums[4] = {skip * xs[i], 0.f, 0.f, 0.f};
#pragma unroll
                for (int q = 0; q < SPT / 4; q++) {
                    const float4 B = row[RP / 4 + part * (SPT / 4) + q], Cs = row[RP / 4 + NP / 4 + part * (SPT / 4) + q];
                    const float bs[4] = {B.x, B.y, B.z, B.w}, cs[4] = {Cs.x, Cs.y, Cs.z, Cs.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float& state = h[4 * q + j];
                        state = exp2f(dt * a[4 * q + j]) * state + in * bs[j];
                        sums[j] += state * cs[j];
                    }
                }
                if (ENDS) continue;
                float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
                for (int mask = 1; mask < LANES; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
                if (mine && part == 0 && tile * TILE + t < L)
                    y[(i64)pixels[tile & 3][t] * C] = from_float<Y_TYPE>(sum);
            }
        }
    }
    if (ENDS && mine) {
#pragma unroll
        for (int i = 0; i < SPT; i++) {
            const int n = part * SPT + i;
            if (n < N) ends[((i64)segment * N + n) * C] = h[i];
        }
        if (part == 0) sums_of_dt[(i64)segment * C] = dts;
    }
}
