// The forward pass of the four-direction scan.
//
//     LANES     lanes that share one channel, 1, 2 or 4: each has NP / LANES of its states and computes the step size of
//               GROUP / LANES tokens of each group. More lanes keep a GPU busy with fewer channels.
//     THREADS   per program; it takes THREADS / LANES channels
//     RESIDENT  programs per multiprocessor to compile for
//     SAVE      whether to save the state before each tile, (B, K, tiles, N, C)
//     ENDS      instead of y, write the state after each segment for a zero initial state, (B, K, segments, N, C), and
//               the sum of its step sizes, (B, K, segments, C)
//     CARRY     compute the initial state of each segment from the output of ENDS
//     QUADS     whether proj can be read four numbers at a time: R a multiple of 4, N = 16, aligned
//
// If there are too few lines to fill the GPU, the length is split into segments of whole tiles, which two launches,
// ENDS and CARRY, process in parallel. Grid: B * K * segments * blocks of channels. Writes the share of each direction
// in y, (B, K, L, C). What bounds it is latency: chains of operations of different tokens have to interleave, so the
// loop over the tokens of a group has no branches.

constexpr int SPT = NP / LANES;  // states per thread
constexpr int CB = THREADS / LANES;
constexpr int STEP = QUADS ? 4 : 1;  // numbers per load of proj
constexpr int LOADS = (TILE * (P / STEP) + THREADS - 1) / THREADS;
constexpr int GROUP = 4;            // tokens
constexpr int OWN = GROUP / LANES;  // of which a lane computes the step size
constexpr int CHAINS = SPT / 4;     // of additions, for one token

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) scan_forward(
    const x_t* __restrict__ x, const p_t* __restrict__ proj, const float* __restrict__ dt_weight,
    const float* __restrict__ dt_bias, const float* __restrict__ A, const float* __restrict__ D, y_t* __restrict__ y,
    float* __restrict__ states, float* __restrict__ ends, float* __restrict__ sums_of_dt, int H, int W, int C, int blocks,
    int segments, int length, i64 x_b, int x_l, i64 p_b, int p_l, int p_k) {
    __shared__ float4 rows4[2][TILE][ROW / 4];
    // Rings of four tiles, of which one is written while two are in use: pixel indices, and offsets of these pixels in x
    // and y in bytes.
    __shared__ int pixels[4 * TILE];
    __shared__ uint4 from4[4 * TILE / GROUP], to4[4 * TILE / GROUP];
    constexpr unsigned RING = 4 * TILE / GROUP - 1;
    __shared__ float4 steps4[2][CB], inputs4[2][CB];  // of a group of tokens: dt, and dt * x
    const int L = H * W, tiles = (L + TILE - 1) / TILE;
    const int block = blockIdx.x % blocks, segment = blockIdx.x / blocks % segments;
    const int line = blockIdx.x / blocks / segments, k = line % DIRECTIONS, b = line / DIRECTIONS;
    const int first = segment * length, last = min(first + length, tiles);  // tiles
    const int tid = threadIdx.x, part = tid % LANES, ct = tid / LANES, c = block * CB + ct;
    const bool mine = c < C;
    const int cc = mine ? c : C - 1;

    float a[SPT], h[SPT], w[RP];
    const int kc = k * C + cc;
#pragma unroll
    for (int i = 0; i < SPT; i++) {
        int n = part * SPT + i;
        a[i] = n < N ? A[kc * N + n] * LOG2E : 0.f;
        h[i] = 0.f;
    }
#pragma unroll
    for (int r = 0; r < RP; r++) w[r] = r < RANK ? dt_weight[kc * RANK + r] : 0.f;
    const float bias = dt_bias[kc], skip = D[kc];

    x += b * x_b + cc;
    proj += b * p_b + (i64)k * p_k;
    y += (i64)line * L * C + cc;
    if (SAVE) states += (i64)line * tiles * N * C + cc;

    ends += (i64)line * segments * N * C + cc;
    sums_of_dt += (i64)line * segments * C + cc;
    if (CARRY)
#pragma unroll (4 * LANES)  // as many loads in flight as the registers hold
        for (int s = 0; s < segment; s++) {
            const float dt = sums_of_dt[(i64)s * C];
#pragma unroll
            for (int i = 0; i < SPT; i++) {
                const int n = part * SPT + i;
                h[i] = exp2f(dt * a[i]) * h[i] + (n < N ? ends[((i64)s * N + n) * C] : 0.f);
            }
        }
    float dts = 0.f;

    auto place = [&](int tile) {  // by the first threads
        const int pixel = pixel_of(min(tile * TILE + tid, L - 1), k, H, W), at = (tile & 3) * TILE + tid;
        pixels[at] = pixel;
        ((unsigned*)from4)[at] = (unsigned)pixel * (unsigned)x_l * (unsigned)sizeof(x_t);
        ((unsigned*)to4)[at] = (unsigned)pixel * (unsigned)C * (unsigned)sizeof(y_t);
    };
    for (int i = tid; i < 2 * TILE * ROW; i += THREADS) ((float*)rows4)[i] = 0.f;  // the padding stays zero
    if (tid < TILE) place(first), place(first + 1);
    __syncthreads();

    typedef typename Several<P_TYPE, STEP>::type load_t;
    load_t ahead[LOADS];
    auto fetch = [&](int tile) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP);
            if (t < TILE)
                ahead[i] = *(const load_t*)(proj + (i64)pixels[(tile & 3) * TILE + t] * p_l + index % (P / STEP) * STEP);
        }
    };
    auto offsets = [&](unsigned* at, const uint4* of) {  // of the tokens of this lane
        if constexpr (OWN == 4) at[0] = of->x, at[1] = of->y, at[2] = of->z, at[3] = of->w;
        else
#pragma unroll
            for (int i = 0; i < OWN; i++) at[i] = ((const unsigned*)of)[part * OWN + i];
    };
    x_t next[OWN];
    auto input = [&](unsigned group) {
        unsigned at[OWN];
        offsets(at, &from4[group & RING]);
#pragma unroll
        for (int i = 0; i < OWN; i++) next[i] = *(const x_t*)((const char*)x + at[i]);
    };
    fetch(first);
    input(first * (TILE / GROUP));

    for (int tile = first; tile < last; tile++) {
        float* rows = (float*)rows4[tile & 1];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int index = tid + i * THREADS, t = index / (P / STEP), j = index % (P / STEP);
            if (t < TILE) unpack<P_TYPE, STEP>(rows + t * ROW + (QUADS ? 4 * j : place_of(j)), ahead[i]);
        }
        __syncthreads();
        if (tile + 1 < last) fetch(tile + 1);
        if (tid < TILE) place(tile + 2);
        if (SAVE && mine) {
            float* here = states + (i64)tile * N * C;
#pragma unroll
            for (int i = 0; i < SPT; i++)
                if (part * SPT + i < N) here[(part * SPT + i) * C] = h[i];
        }
        const int groups = min(TILE, L - tile * TILE + GROUP - 1) / GROUP;
        const float4(*those)[ROW / 4] = rows4[tile & 1];
        for (unsigned group = tile * (TILE / GROUP), end = group + groups; group < end; group++, those += GROUP) {
            float xs[OWN], own[OWN], dt[GROUP], in[GROUP], ys[GROUP];
#pragma unroll
            for (int i = 0; i < OWN; i++) xs[i] = to_float<X_TYPE>(next[i]), own[i] = bias;
            input(group + 1);
#pragma unroll
            for (int r = 0; r < RP; r += 4)
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const float4 code = those[part * OWN + i][r / 4];
                    own[i] += w[r] * code.x;
                    own[i] += w[r + 1] * code.y;
                    own[i] += w[r + 2] * code.z;
                    own[i] += w[r + 3] * code.w;
                }
            softplus<OWN>(own);
            if constexpr (LANES == 1)
#pragma unroll
                for (int i = 0; i < GROUP; i++) dt[i] = own[i], in[i] = own[i] * xs[i];
            else {
                float *steps = (float*)&steps4[group & 1][ct], *inputs = (float*)&inputs4[group & 1][ct];
#pragma unroll
                for (int i = 0; i < OWN; i++) steps[part * OWN + i] = own[i], inputs[part * OWN + i] = own[i] * xs[i];
                __syncwarp();
                const float4 d = *(const float4*)steps, u = *(const float4*)inputs;
                dt[0] = d.x, dt[1] = d.y, dt[2] = d.z, dt[3] = d.w;
                in[0] = u.x, in[1] = u.y, in[2] = u.z, in[3] = u.w;
            }
            if (ENDS)  // a segment that is not the last has no padding
#pragma unroll
                for (int i = 0; i < OWN; i++) dts += own[i];
#pragma unroll
            for (int i = 0; i < GROUP; i++) {
                const float4* row = those[i] + RP / 4 + part * (SPT / 4);
                float sums[CHAINS];
#pragma unroll
                for (int q = 0; q < CHAINS; q++) {
                    const float4 B = row[q], Cs = row[NP / 4 + q];
                    const float bs[4] = {B.x, B.y, B.z, B.w}, cs[4] = {Cs.x, Cs.y, Cs.z, Cs.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float& state = h[4 * q + j];
                        state = exp2f(dt[i] * a[4 * q + j]) * state + in[i] * bs[j];
                        sums[q] = j ? sums[q] + state * cs[j] : state * cs[j];
                    }
                }
                ys[i] = sums[0];
#pragma unroll
                for (int q = 1; q < CHAINS; q++) ys[i] += sums[q];
            }
            if (ENDS) continue;
            if constexpr (LANES == 2) fold<4>(ys, part, 1);
            if constexpr (LANES == 4) fold<4>(ys, part, 2), fold<2>(ys, part, 1);
            if (!mine) continue;
            unsigned at[OWN];
            offsets(at, &to4[group & RING]);
            const int left = L - (int)group * GROUP - part * OWN;
            if (left >= OWN)
#pragma unroll
                for (int i = 0; i < OWN; i++) *(y_t*)((char*)y + at[i]) = from_float<Y_TYPE>(ys[i] + skip * xs[i]);
            else
                for (int i = 0; i < OWN - 1; i++)
                    if (i < left) *(y_t*)((char*)y + at[i]) = from_float<Y_TYPE>(ys[i] + skip * xs[i]);
        }
    }
    if (ENDS) {
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) dts += __shfl_xor_sync(0xffffffffu, dts, mask);
        if (!mine) return;
#pragma unroll
        for (int i = 0; i < SPT; i++) {
            const int n = part * SPT + i;
            if (n < N) ends[((i64)segment * N + n) * C] = h[i];
        }
        if (part == 0) sums_of_dt[(i64)segment * C] = dts;
    }
}
