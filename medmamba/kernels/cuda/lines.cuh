// Code shared by the kernels of the one-dimensional scan, lines.cu and lines_backward.cu. Each (b, c) is a line of L
// tokens, adjacent in memory; the kernels read and write the tensors of the caller, whatever their other strides.
//
//     X_TYPE, Y_TYPE, P_TYPE   element type of u (and y, dy, du), of delta (and ddelta), of B and C
//     PER, LANES   a channel has PER * LANES >= N states; lane q of its LANES has the states q, q + LANES, ...
//     WARPS        per program
//     ROWS         channels of a warp at the same time, where lanes lie along the lines
//     VEC          tokens per access to lines: 8, 4, 2 or 1; divides L and the strides, and fits the alignment
//     P_VEC        the same for B and C; 1 also if their tokens are not adjacent
//     SEGMENT      8 * 32 / LANES / ROWS, the tokens of a warp, and of a segment of the backward pass
//     SOFTPLUS     whether the step size is softplus(delta + bias)
//
// The backward pass is two kernels. The first walks along the lines and leaves, for each segment, its initial state and
// the gradient of its last state, at the start of the segment in the memory of du and ddelta: they cost no memory, and
// the second kernel reads them before it overwrites them. The second one takes each segment by itself, with tokens in
// registers and channels one after the other, so that the gradients of B and C, which are sums over channels, never leave
// the program: no atomics, and the same bits each time.

constexpr int PADDED = PER * LANES;
constexpr int THREADS = 32 * WARPS;
constexpr int STEP = 8;  // consecutive tokens of a thread
constexpr unsigned EVERY = 0xffffffffu;

// Eight tokens as they lie in memory.
template <int TYPE> struct Raw { unsigned word[TYPE ? 4 : 8]; };

// Reads eight tokens, of which those from `there` on do not exist and become zero, ALIGNED at a time.
template <int TYPE, int ALIGNED>
__device__ __forceinline__ Raw<TYPE> read_tokens(const typename Element<TYPE>::type* from, int there, i64 stride = 1) {
    Raw<TYPE> raw;
#pragma unroll
    for (int i = 0; i < (TYPE ? 4 : 8); i++) raw.word[i] = 0;
    constexpr int WIDTH = TYPE == 0 && ALIGNED == 8 ? 4 : ALIGNED;
#pragma unroll
    for (int t = 0; t < STEP; t += WIDTH)
        if (t < there) {
            if constexpr (TYPE == 0 && WIDTH == 4 || TYPE != 0 && WIDTH == 8) {
                const uint4 v = *(const uint4*)(from + t);
                unsigned* to = raw.word + (TYPE ? 0 : t);
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            } else if constexpr (TYPE == 0 && WIDTH == 2 || TYPE != 0 && WIDTH == 4) {
                const uint2 v = *(const uint2*)(from + t);
                unsigned* to = raw.word + (TYPE ? t / 2 : t);
                to[0] = v.x, to[1] = v.y;
            } else if constexpr (TYPE == 0) raw.word[t] = __float_as_uint(from[t * stride]);
            else if constexpr (WIDTH == 2) raw.word[t / 2] = *(const unsigned*)(from + t);
            else raw.word[t / 2] |= (unsigned)from[t * stride] << (t % 2 * 16);
        }
    return raw;
}

// Token i of words read as above.
template <int TYPE> __device__ __forceinline__ float token(const unsigned* word, int i) {
    if constexpr (TYPE == 0) return __uint_as_float(word[i]);
    else return to_float<TYPE>((u16)(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu));
}

// Writes COUNT tokens, of which those from `there` on do not exist.
template <int TYPE, int COUNT>
__device__ __forceinline__ void write_tokens(typename Element<TYPE>::type* to, const float* v, int there) {
    constexpr int MOST = TYPE ? 8 : 4, WIDTH = VEC < COUNT ? (VEC < MOST ? VEC : MOST) : (COUNT < MOST ? COUNT : MOST);
#pragma unroll
    for (int t = 0; t < COUNT; t += WIDTH)
        if (t < there) {
            if constexpr (WIDTH == 1) to[t] = from_float<TYPE>(v[t]);
            else if constexpr (TYPE == 0 && WIDTH == 4) *(float4*)(to + t) = make_float4(v[t], v[t + 1], v[t + 2], v[t + 3]);
            else if constexpr (TYPE == 0) *(float2*)(to + t) = make_float2(v[t], v[t + 1]);
            else {
                unsigned word[WIDTH / 2];
#pragma unroll
                for (int i = 0; i < WIDTH / 2; i++) word[i] = from_floats<TYPE>(v[t + 2 * i], v[t + 2 * i + 1]);
                if constexpr (WIDTH == 8) *(uint4*)(to + t) = uint4{word[0], word[1], word[2], word[3]};
                else if constexpr (WIDTH == 4) *(uint2*)(to + t) = uint2{word[0], word[1]};
                else *(unsigned*)(to + t) = word[0];
            }
        }
}

// Where what belongs to a segment lies in the memory of its gradients: from its first aligned address.
template <class T> __device__ __forceinline__ float* left_at(T* segment) {
    return (float*)(((size_t)segment + 15) & ~(size_t)15);
}

// PER adjacent numbers, aligned.
__device__ __forceinline__ void read_states(float* to, const float* from) {
    if constexpr (PER == 4) {
        const float4 v = *(const float4*)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else
#pragma unroll
        for (int i = 0; i < PER; i++) to[i] = from[i];
}

__device__ __forceinline__ void write_states(float* to, const float* v) {
    if constexpr (PER == 4) *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
    else
#pragma unroll
        for (int i = 0; i < PER; i++) to[i] = v[i];
}

__device__ __forceinline__ void numbers(float* to, float4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

__device__ __forceinline__ void write8(float* to, const float* v) {
    *(float4*)to = make_float4(v[0], v[1], v[2], v[3]), *(float4*)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

// Where the lanes of a warp lie along lines: lane (r, j, q) has channel r, tokens 8 j to 8 j + 7 and states q, q + LANES,
// ... In shared memory, the first four of each eight tokens of a line are apart from the others, and lines are a bit longer
// than the tokens, so that lanes read from different banks.
constexpr int ALONG = 32 / LANES / ROWS;
constexpr int HALF = 4 * ALONG, LINE = 2 * HALF + 32 / LANES;
constexpr int OWN = STEP / LANES;  // tokens of which a lane computes the step size
constexpr int LEVELS = ALONG == 4 ? 2 : ALONG == 8 ? 3 : ALONG == 16 ? 4 : 5;  // of a scan over the lanes
static_assert(SEGMENT == STEP * ALONG, "");

__device__ __forceinline__ int place_in_line(int t) { return t % 8 / 4 * HALF + t / 8 * 4 + t % 4; }

// The tokens of lane q, of all eight.
template <int TYPE> __device__ __forceinline__ void own_tokens(float* to, const Raw<TYPE>& raw, int q) {
    unsigned word[TYPE ? 4 : 8];
#pragma unroll
    for (int i = 0; i < (TYPE ? 4 : 8); i++) word[i] = raw.word[i];
#pragma unroll
    for (int mask = LANES / 2, count = (TYPE ? 4 : 8) / 2; mask; mask /= 2, count /= 2)
#pragma unroll
        for (int i = 0; i < count; i++) word[i] = q & mask ? word[count + i] : word[i];
#pragma unroll
    for (int i = 0; i < OWN; i++) to[i] = token<TYPE>(word, i);
}

// The step sizes of a lane's eight tokens, from those that the lanes of its channel have computed; `sums` becomes the sums
// over this and the lanes before it, 1, 2, 4, ... lanes in total.
__device__ __forceinline__ void share_steps(float* dt, float* sums, const float* own, int lane, int q, int j) {
    sums[0] = 0.f;
#pragma unroll
    for (int t = 0; t < STEP; t++) {
        dt[t] = LANES == 1 ? own[t] : __shfl_sync(EVERY, own[t % OWN], lane - q + t / OWN);
        sums[0] += dt[t];
    }
#pragma unroll
    for (int k = 1; k < LEVELS; k++) {
        const float before = __shfl_up_sync(EVERY, sums[k - 1], (LANES << k) / 2);
        sums[k] = sums[k - 1] + (j >= (1 << k) / 2 ? before : 0.f);
    }
}

// The step sizes of a lane's own tokens, of which those from `there` on do not exist.
__device__ __forceinline__ void own_steps(float* dt, float offset, int there) {
#pragma unroll
    for (int t = 0; t < OWN; t++) dt[t] += offset;
    if (SOFTPLUS) softplus<OWN>(dt);
#pragma unroll
    for (int t = 0; t < OWN; t++) dt[t] = t < there ? dt[t] : 0.f;
}

// The state before a lane's tokens, from that after them for a zero initial state (in lane 0: for `initial`).
// `products` becomes the decays over 1, 2, 4, ... lanes.
__device__ __forceinline__ float scan_over_lanes(
    float h, float initial, const float* sums, float a, float* products, int j) {
#pragma unroll
    for (int k = 0; k < LEVELS; k++) {
        products[k] = exp2f(sums[k] * a);
        const float before = __shfl_up_sync(EVERY, h, LANES << k);
        h = j >= 1 << k ? products[k] * before + h : h;
    }
    const float before = __shfl_up_sync(EVERY, h, LANES);
    return j ? before : initial;
}
