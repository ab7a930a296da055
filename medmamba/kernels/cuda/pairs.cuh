// Two adjacent numbers of X_TYPE in one access, and sums over a warp.

struct alignas(8) Pair { float x, y; };

__device__ __forceinline__ Pair read(const x_t* from) {
    if constexpr (X_TYPE == 0) {
        const float2 v = *(const float2*)from;
        return {v.x, v.y};
    } else {
        const unsigned v = *(const unsigned*)from;
        return {to_float<X_TYPE>((u16)(v & 0xffffu)), to_float<X_TYPE>((u16)(v >> 16))};
    }
}

__device__ __forceinline__ void write(x_t* to, Pair v) {
    if constexpr (X_TYPE == 0) *(float2*)to = make_float2(v.x, v.y);
    else *(unsigned*)to = from_floats<X_TYPE>(v.x, v.y);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}

__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.f + __expf(-v)); }
__device__ __forceinline__ float silu(float v) { return v * sigmoid(v); }

// Layer norm over a warp: PAIRS pairs per lane, of which those with `index(i) < count` are valid.
template <int PAIRS, class Index> __device__ __forceinline__ void normalise(
    Pair* v, Index index, int count, const float* weight, const float* bias, float eps) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (index(i) < count) sum += v[i].x + v[i].y;
    const float mean = warp_sum(sum) / (2 * count);
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (index(i) < count) {
            v[i].x -= mean, v[i].y -= mean;
            sum += v[i].x * v[i].x + v[i].y * v[i].y;
        }
    const float scale = rsqrtf(warp_sum(sum) / (2 * count) + eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (index(i) < count) {
            const float2 w = *(const float2*)(weight + 2 * index(i)), b = *(const float2*)(bias + 2 * index(i));
            v[i].x = v[i].x * scale * w.x + b.x, v[i].y = v[i].y * scale * w.y + b.y;
        }
}
