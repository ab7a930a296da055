// Code shared by the CUDA kernels of the scan. NVRTC compiles it when a kernel first runs (nvrtc.py), so no header of
// the CUDA toolkit is included, and 16-bit numbers are converted by hand.
//
// Notation as in ../reference.py. Compile-time constants, set by ../backends/cuda.py:
//     X_TYPE, P_TYPE, Y_TYPE   element type of x (and dy, dx), of proj, of the output: 0 float, 1 half, 2 bfloat16
//     RANK                     R, length of the step size code
//     STATES                   N, at most 16
// A program is one block of threads. It scans one direction k of one image b for a group of channels; a direction is an
// order of pixel indices, nothing is permuted in memory. Tokens are processed in tiles of TILE; the forward pass saves
// the state before each tile for the backward pass.

typedef unsigned short u16;
typedef long long i64;

#define DIRECTIONS 4
#define TILE 16
#define NP 16  // padded number of states; B and C of the padding are zero

constexpr int N = STATES;
constexpr int P = RANK + 2 * N;            // numbers per token and direction
constexpr int RP = (RANK + 3) / 4 * 4;     // length of the code, padded to align B and C
constexpr int ROW = RP + 2 * NP;           // one token in shared memory: [code | B | C]
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

template <int TYPE> struct Element { typedef u16 type; };
template <> struct Element<0> { typedef float type; };

#ifndef EMULATED  // the tests run these kernels on a CPU, see tests/cuda_emulator.h
#define DYNAMIC_SHARED(name) extern __shared__ float4 name[]
__device__ __forceinline__ float half_to_float(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ u16 float_to_half(float f) { u16 v; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f)); return v; }
#endif

// Copies to shared memory in the background, from and to multiples of BYTES: 4, 8 or 16. The thread that began copies
// waits for all of them; others may read after a barrier that follows.
template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
#else
#pragma unroll
    for (int i = 0; i < BYTES / 4; i++) ((unsigned*)to)[i] = ((const unsigned*)from)[i];
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ u16 float_to_bfloat(float f) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u16 v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
#else
    unsigned bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

template <int TYPE> __device__ __forceinline__ float to_float(typename Element<TYPE>::type v) {
    if constexpr (TYPE == 0) return v;
    else if constexpr (TYPE == 1) return half_to_float(v);
    else return __uint_as_float((unsigned)v << 16);
}

template <int TYPE> __device__ __forceinline__ typename Element<TYPE>::type from_float(float f) {
    if constexpr (TYPE == 0) return f;
    else if constexpr (TYPE == 1) return float_to_half(f);
    else return float_to_bfloat(f);
}

// Two 16-bit numbers, the first in the lower half.
template <int TYPE> __device__ __forceinline__ unsigned from_floats(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned v;
    if constexpr (TYPE == 1) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    return v;
#else
    return (unsigned)from_float<TYPE>(a) | (unsigned)from_float<TYPE>(b) << 16;
#endif
}

// 1 / v to about 1e-7, for v of at least 1; a division also covers numbers that others cannot.
__device__ __forceinline__ float reciprocal(float v) {
#ifdef __CUDA_ARCH__
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
#else
    return 1.f / v;
#endif
}

// Four adjacent numbers in one load, or one.
template <int TYPE, int COUNT> struct Several { typedef typename Element<TYPE>::type type; };
template <> struct Several<0, 4> { typedef float4 type; };
template <> struct Several<1, 4> { typedef uint2 type; };
template <> struct Several<2, 4> { typedef uint2 type; };

template <int TYPE> __device__ __forceinline__ float4 to_floats(typename Several<TYPE, 4>::type v) {
    if constexpr (TYPE == 0) return v;
    else return make_float4(to_float<TYPE>((u16)v.x), to_float<TYPE>((u16)(v.x >> 16)), to_float<TYPE>((u16)v.y),
                            to_float<TYPE>((u16)(v.y >> 16)));
}

// Copies COUNT numbers to shared memory, aligned as a float4 if COUNT is four.
template <int TYPE, int COUNT> __device__ __forceinline__ void unpack(float* to, typename Several<TYPE, COUNT>::type v) {
    if constexpr (COUNT == 4) *(float4*)to = to_floats<TYPE>(v);
    else *to = to_float<TYPE>(v);
}

typedef Element<X_TYPE>::type x_t;
typedef Element<P_TYPE>::type p_t;
typedef Element<Y_TYPE>::type y_t;

// max(x, 0), with NaN kept, as PyTorch does; fmaxf would turn it into 0.
__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }

// log(1 + exp(x)) to float32 accuracy, through a polynomial for log(1 + e) / e on [0, 1] of relative error 3e-8: the
// fast logarithm is inaccurate near 1, and small step sizes are the rule.
// Of COUNT numbers at a time, so that their chains of operations interleave.
template <int COUNT> __device__ __forceinline__ void softplus(float* x) {
    constexpr float p[9] = {0.99999994f,  -0.49999493f, 0.33319095f,  -0.24842978f, 0.19105989f,
                            -0.13663207f, 0.07822549f, -0.029504957f, 0.005232624f};
    float e[COUNT], sum[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) e[i] = exp2f(-fabsf(x[i]) * LOG2E), sum[i] = p[8];
#pragma unroll
    for (int d = 7; d >= 0; d--)
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum[i] = sum[i] * e[i] + p[d];
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = fmaxf(x[i], 0.f) + e[i] * sum[i];
}

__device__ __forceinline__ float softplus(float x) {
    softplus<1>(&x);
    return x;
}

// 1 - exp(-dt) for dt >= 0, the slope of softplus where its value is dt; a series near 0 keeps the accuracy.
__device__ __forceinline__ float one_minus_exp(float dt) {
    float p = 1.f / 5040 - dt * (1.f / 40320);
    p = 1.f / 720 - p * dt;
    p = 1.f / 120 - p * dt;
    p = 1.f / 24 - p * dt;
    p = 1.f / 6 - p * dt;
    p = 0.5f - p * dt;
    p = 1.f - p * dt;
    return dt < 0.5f ? dt * p : 1.f - exp2f(-dt * LOG2E);
}

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

// Adds values of lanes that differ in `mask`; each lane keeps half of the sums, the upper lane the second half.
template <int COUNT> __device__ __forceinline__ void fold(float* v, int lane, int mask) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
        const bool upper = lane & mask;
        const float send = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
        v[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
    }
}

// The pixel index of token t in direction k: row-major, column-major, and both reversed.
__device__ __forceinline__ int pixel_of(int t, int k, int H, int W) {
    const int q = k >= 2 ? H * W - 1 - t : t;
    if (!(k & 1)) return q;
    int column = (int)((float)q / (float)H);  // to within one; an integer division takes many more instructions
    int row = q - column * H;
    if (row < 0) row += H, column--;
    if (row >= H) row -= H, column++;
    return row * W + column;
}

// Position of number j of a token in its row of shared memory.
__device__ __forceinline__ int place_of(int j) {
    return j < RANK ? j : j < RANK + N ? RP + j - RANK : RP + NP + j - RANK - N;
}
