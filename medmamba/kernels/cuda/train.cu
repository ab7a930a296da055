// The operations around the scan in training, forward and backward, each in one pass over memory: layer norms fused
// with adjacent operations, and the end of a block. Compile-time constants, set by ../block/training.py:
//     OP        SPLIT  of the right half of each pixel of x (rows of 2C numbers); the left half is copied, and where
//                      `right` is given, for the backward pass, the right half too
//               GATE   times silu(gate), with a pixel stride of gate_l
//               MERGE  of 2x2 patches, see `place`; an odd last row or column of x is dropped
//               ALONE
//     CHANNELS  C, of a row of the norm: a multiple of 4, with MERGE of 16
//     LANES     lanes that share a row, a power of two; a warp takes 32 / LANES rows at a time
//     PARAMS    whether to compute the gradients of weight and bias
//     FACTORS   whether the end of a block multiplies the scan branch of each image
// Accesses are four numbers wide. The backward pass recomputes mean and deviation, as it has to read x anyway.

#define SPLIT 0
#define GATE 1
#define MERGE 2
#define ALONE 3

constexpr int C = CHANNELS, FOURS = C / 4;
constexpr int OWN = (FOURS + LANES - 1) / LANES;  // fours per lane
constexpr int ROWS = 32 / LANES;                         // rows per warp

__device__ __forceinline__ float total(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ __forceinline__ float4 sigmoid(float4 v) {
    return make_float4(sigmoid(v.x), sigmoid(v.y), sigmoid(v.z), sigmoid(v.w));
}

// Over the lanes of a row.
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}

// This thread's share of a row.
struct Share {
    int sub = threadIdx.x % LANES;
    __device__ __forceinline__ int channel(int i) const { return 4 * (sub + LANES * i); }
    __device__ __forceinline__ bool has(int i) const { return FOURS % LANES == 0 || sub + LANES * i < FOURS; }
};

// Where channel c of a row of the norm lies in x.
struct Map {
    int height, width, W;  // MERGE: size of the result, and the width of x
    i64 image;             // numbers of one image of x
    __device__ __forceinline__ i64 place(i64 row, int c) const {
        if (OP == SPLIT) return row * 2 * C + C + c;
        if (OP != MERGE) return row * C + c;
        const i64 b = row / (height * width);
        const int pixel = row % (height * width), part = c / (C / 4);  // (0,0), (1,0), (0,1), (1,1)
        const i64 y = pixel / width * 2 + part % 2, x = pixel % width * 2 + part / 2;
        return b * image + (y * W + x) * (C / 4) + c % (C / 4);
    }
};

// Standardises the row v to mean 0 and deviation 1; returns the factor. Rows out of range are zero.
__device__ __forceinline__ float standardise(float4* v, const Share& share, float eps) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) sum += total(v[i]);
    const float mean = row_sum(sum) * (1.f / C);
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (share.has(i)) {
            v[i] = v[i] + -mean;
            sum += total(v[i] * v[i]);
        }
    const float scale = rsqrtf(row_sum(sum) * (1.f / C) + eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) v[i] = v[i] * scale;
    return scale;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) norm_forward(
    const x_t* __restrict__ x, const x_t* __restrict__ gate, const float* __restrict__ weight,
    const float* __restrict__ bias, x_t* __restrict__ out, x_t* __restrict__ left, x_t* __restrict__ right, i64 rows,
    int gate_l, int height, int width, int W, i64 image, float eps) {
    const i64 row = ((i64)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS + threadIdx.x % 32 / LANES;
    const bool valid = row < rows;  // no early return: other lanes of the warp need this one
    const Share share;
    const Map map{height, width, W, image};
    float4 v[OWN], other[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (!valid || !share.has(i)) continue;
        const int c = share.channel(i);
        v[i] = read4(x + map.place(row, c));
        if (OP == GATE) other[i] = read4(gate + row * gate_l + c);
        if (OP == SPLIT) {
            *(four_t*)(left + row * C + c) = *(const four_t*)(x + row * 2 * C + c);
            if (right) *(four_t*)(right + row * C + c) = *(const four_t*)(x + row * 2 * C + C + c);
        }
    }
    standardise(v, share, eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (!valid || !share.has(i)) continue;
        const int c = share.channel(i);
        float4 y = v[i] * read4f(weight + c) + read4f(bias + c);
        if (OP == GATE) y = y * (other[i] * sigmoid(other[i]));
        write4(out + row * C + c, y);
    }
}

// Computes from dout: dx, dgate with GATE (contiguous), and partial sums of the gradients of weight and bias per
// program, (programs, 2, C), reduced afterwards in a fixed order. With SPLIT, x holds only the right halves, (rows, C),
// and the gradients of the left half and, from the residual connection, of the whole pixel are added into dx. A program
// takes every gridDim-th group of rows.
extern "C" __global__ void __launch_bounds__(32 * WARPS, OWN <= 3 ? 4 : 1) norm_backward(
    const x_t* __restrict__ dout, const x_t* __restrict__ x, const x_t* __restrict__ gate,
    const float* __restrict__ weight, const float* __restrict__ bias, const x_t* __restrict__ dleft,
    const x_t* __restrict__ dwhole, x_t* __restrict__ dx, x_t* __restrict__ dgate, float* __restrict__ partials,
    i64 rows, int gate_l, int height, int width, int W, i64 image, float eps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Share share;
    const Map map{height, width, W, image};
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
    float4 sums[2][OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) sums[0][i] = sums[1][i] = zero;

    const i64 step = (i64)gridDim.x * WARPS * ROWS;
    for (i64 first = ((i64)blockIdx.x * WARPS + warp) * ROWS; first < rows; first += step) {
        const i64 row = first + lane / LANES;
        const bool valid = row < rows;
        float4 v[OWN], d[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            v[i] = d[i] = zero;
            if (!valid || !share.has(i)) continue;
            v[i] = read4(x + (OP == SPLIT ? row * C + share.channel(i) : map.place(row, share.channel(i))));
            d[i] = read4(dout + row * C + share.channel(i));
        }
        const float scale = standardise(v, share, eps);
        float along = 0.f, mean = 0.f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!valid || !share.has(i)) continue;
            const int c = share.channel(i);
            const float4 w = read4f(weight + c);
            if (OP == GATE) {
                const float4 g = read4(gate + row * gate_l + c), s = sigmoid(g);
                const float4 slope = s * (g * (s * -1.f + 1.f) + 1.f);  // of silu
                write4(dgate + row * C + c, d[i] * (v[i] * w + read4f(bias + c)) * slope);
                d[i] = d[i] * (g * s);
            }
            if (PARAMS) sums[0][i] = sums[0][i] + d[i] * v[i], sums[1][i] = sums[1][i] + d[i];
            d[i] = d[i] * w;
            along += total(d[i] * v[i]), mean += total(d[i]);
        }
        along = row_sum(along) * (1.f / C), mean = row_sum(mean) * (1.f / C);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!valid || !share.has(i)) continue;
            const int c = share.channel(i);
            float4 result = (d[i] + v[i] * -along + -mean) * scale;
            if (OP == SPLIT) {
                const i64 from = row * 2 * C + c;
                result = result + read4(dwhole + from + C);
                write4(dx + from, read4(dleft + row * C + c) + read4(dwhole + from));
            }
            write4(dx + map.place(row, c), result);
        }
    }

    if (!PARAMS) return;
    __shared__ float4 shared[2][OWN * LANES];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            float4& v = sums[which][i];
#pragma unroll
            for (int mask = 16; mask >= LANES; mask /= 2) {
                v.x += __shfl_xor_sync(0xffffffffu, v.x, mask), v.y += __shfl_xor_sync(0xffffffffu, v.y, mask);
                v.z += __shfl_xor_sync(0xffffffffu, v.z, mask), v.w += __shfl_xor_sync(0xffffffffu, v.w, mask);
            }
        }
    for (int turn = 0; turn < WARPS; turn++) {  // one warp after the other, for a fixed order
        if (warp == turn && lane < LANES)
#pragma unroll
            for (int which = 0; which < 2; which++)
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    float4& to = shared[which][share.channel(i) / 4];
                    to = turn ? to + sums[which][i] : sums[which][i];
                }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < 2 * FOURS; i += 32 * WARPS)
        ((float4*)partials)[(i64)blockIdx.x * 2 * FOURS + i] = shared[i / FOURS][i % FOURS];
}

// The end of a block: x + the interleaved channels of left and right; FACTORS multiplies right by the factor of its
// image. In memory, element 2i of the result takes element i of left, and element 2i + 1 that of right. Four i per
// thread, `each` threads per image.

extern "C" __global__ void __launch_bounds__(256) mix_forward(
    const x_t* __restrict__ x, const x_t* __restrict__ left, const x_t* __restrict__ right,
    const float* __restrict__ factors, x_t* __restrict__ out, int threads, int each) {
    const int thread = blockIdx.x * 256 + threadIdx.x;
    if (thread >= threads) return;
    const i64 i = thread;
    const float f = FACTORS ? factors[thread / each] : 1.f;
    const float4 a = read4(x + 8 * i), b = read4(x + 8 * i + 4), l = read4(left + 4 * i), r = read4(right + 4 * i);
    write4(out + 8 * i, make_float4(a.x + l.x, a.y + f * r.x, a.z + l.y, a.w + f * r.y));
    write4(out + 8 * i + 4, make_float4(b.x + l.z, b.y + f * r.z, b.z + l.w, b.w + f * r.w));
}

extern "C" __global__ void __launch_bounds__(256) mix_backward(
    const x_t* __restrict__ dout, const float* __restrict__ factors, x_t* __restrict__ dleft,
    x_t* __restrict__ dright, int threads, int each) {
    const int thread = blockIdx.x * 256 + threadIdx.x;
    if (thread >= threads) return;
    const i64 i = thread;
    const float f = FACTORS ? factors[thread / each] : 1.f;
    const float4 a = read4(dout + 8 * i), b = read4(dout + 8 * i + 4);
    write4(dleft + 4 * i, make_float4(a.x, a.z, b.x, b.z));
    write4(dright + 4 * i, make_float4(f * a.y, f * a.w, f * b.y, f * b.w));
}
