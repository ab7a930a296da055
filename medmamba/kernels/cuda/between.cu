// The end of one block and the beginning of the next for networks of few channels: everything between the scan of one
// and the depthwise convolution of the other, with both matrix products, on tensor cores. C = CHANNELS, a multiple of 32.
//
//     X_TYPE  of all maps and matrices: 1 half, 2 bfloat16; norms and the affine are in float32
//     MIX     y   = silu(gate) * layer_norm(sum over directions of parts), rounded
//             out = x + the interleaved channels of relu(left) and y * project (C -> C/2); otherwise out is x, not written
//     SPLIT   next_left = out[:C/2] * scale + shift; wide = layer_norm(out[C/2:]), rounded, * expand (C/2 -> 2C)
//     TILES   of 16 pixels per program
//
// parts (B, 4, L, C), gate with a pixel stride of gate_l, left and next_left (B, L, C/2), x and out (B, L, C), wide
// (B, L, 2C). C / 32 warps share a tile; each computes 16 channels of the first product and 64 of the second. The
// channels of a factor are taken in an order in which a lane reads four adjacent ones, see `arranged_linear` in
// ../block/between.py.

constexpr int C = CHANNELS, HALF = C / 2;
constexpr int SHARE = C / 32;  // warps per tile
constexpr int PITCH = HALF + 4;

__device__ __forceinline__ unsigned packed(float low, float high) {
    return (unsigned)from_float<X_TYPE>(low) | (unsigned)from_float<X_TYPE>(high) << 16;
}

__device__ __forceinline__ float sum4(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ float4 minus(float4 v, float m) { return make_float4(v.x - m, v.y - m, v.z - m, v.w - m); }

// Sum over the four lanes that share a pixel.
__device__ __forceinline__ float lanes_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Layer norm of COUNT fours per lane, four lanes to a pixel.
template <int COUNT> __device__ __forceinline__ void normalise4(
    float4* v, int t, const float* weight, const float* bias, float eps) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += sum4(v[i]);
    const float mean = lanes_sum(sum) / (16 * COUNT);
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = minus(v[i], mean), sum += sum4(v[i] * v[i]);
    const float scale = rsqrtf(lanes_sum(sum) / (16 * COUNT) + eps);
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = v[i] * scale * read4f(weight + 16 * i + 4 * t) + read4f(bias + 16 * i + 4 * t);
}

extern "C" __global__ void __launch_bounds__(32 * SHARE * TILES) between(
    const x_t* __restrict__ parts, const x_t* __restrict__ gate, const float* __restrict__ weight,
    const float* __restrict__ bias, const uint4* __restrict__ project, const x_t* __restrict__ x,
    const x_t* __restrict__ left, x_t* __restrict__ out, const float* __restrict__ scale, const float* __restrict__ shift,
    const float* __restrict__ next_weight, const float* __restrict__ next_bias, const uint4* __restrict__ expand,
    x_t* __restrict__ next_left, x_t* __restrict__ wide, i64 pixels, int L, int gate_l, float eps, float next_eps) {
    __shared__ float4 rows4[SPLIT ? TILES : 1][16][PITCH / 4];  // the right half of out
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = threadIdx.x / 32 % SHARE, tile = threadIdx.x / 32 / SHARE;
    const i64 first = ((i64)blockIdx.x * TILES + tile) * 16 + g;
    i64 pixel[2];
#pragma unroll
    for (int i = 0; i < 2; i++) pixel[i] = first + 8 * i < pixels ? first + 8 * i : pixels - 1;

    float sum[2][4] = {};
    if (MIX) {
        unsigned y[C / 16][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 v[C / 16];
            const x_t* from = parts + (pixel[i] / L * DIRECTIONS * L + pixel[i] % L) * C + 4 * t;
#pragma unroll
            for (int k = 0; k < C / 16; k++) {
                v[k] = read4(from + 16 * k);
#pragma unroll
                for (int d = 1; d < DIRECTIONS; d++) v[k] = v[k] + read4(from + (i64)d * L * C + 16 * k);
            }
            normalise4<C / 16>(v, t, weight, bias, eps);
#pragma unroll
            for (int k = 0; k < C / 16; k++) {
                const float4 z = read4(gate + pixel[i] * gate_l + 16 * k + 4 * t);
                y[k][i] = packed(v[k].x * silu(z.x), v[k].y * silu(z.y));
                y[k][2 + i] = packed(v[k].z * silu(z.z), v[k].w * silu(z.w));
            }
        }
#pragma unroll
        for (int k = 0; k < C / 16; k++) {
            const uint4 b = project[(warp * (C / 16) + k) * 32 + lane];
            multiply(sum[0], y[k], uint2{b.x, b.y});
            multiply(sum[1], y[k], uint2{b.z, b.w});
        }
    }
    const int c = 32 * warp + 8 * t;  // of eight channels of out, which hold four of each branch
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 low = read4(x + pixel[i] * C + c), high = read4(x + pixel[i] * C + c + 4);
        const bool inside = first + 8 * i < pixels;
        if (MIX) {
            const float4 l = read4(left + pixel[i] * HALF + c / 2);
            low = low + make_float4(relu(l.x), sum[0][2 * i], relu(l.y), sum[0][2 * i + 1]);
            high = high + make_float4(relu(l.z), sum[1][2 * i], relu(l.w), sum[1][2 * i + 1]);
            if (inside) write4(out + pixel[i] * C + c, low), write4(out + pixel[i] * C + c + 4, high);
        }
        if (!SPLIT) continue;
        if (c >= HALF) {
            float4* to = &rows4[tile][g + 8 * i][(c - HALF) / 4];
            to[0] = low, to[1] = high;
        } else if (inside) {
            write4(next_left + pixel[i] * HALF + c, low * read4f(scale + c) + read4f(shift + c));
            write4(next_left + pixel[i] * HALF + c + 4, high * read4f(scale + c + 4) + read4f(shift + c + 4));
        }
    }
    if (!SPLIT) return;
    __syncthreads();
    unsigned a[C / 32][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 v[C / 32];
#pragma unroll
        for (int k = 0; k < C / 32; k++) v[k] = rows4[tile][g + 8 * i][4 * k + t];
        normalise4<C / 32>(v, t, next_weight, next_bias, next_eps);
#pragma unroll
        for (int k = 0; k < C / 32; k++) a[k][i] = packed(v[k].x, v[k].y), a[k][2 + i] = packed(v[k].z, v[k].w);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int group = 4 * warp + n;  // of 16 channels of wide
        float all[2][4] = {};
#pragma unroll
        for (int k = 0; k < C / 32; k++) {
            const uint4 b = expand[(group * (C / 32) + k) * 32 + lane];
            multiply(all[0], a[k], uint2{b.x, b.y});
            multiply(all[1], a[k], uint2{b.z, b.w});
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (first + 8 * i < pixels)
                write4(wide + pixel[i] * (2 * C) + 16 * group + 4 * t,
                       make_float4(all[0][2 * i], all[0][2 * i + 1], all[1][2 * i], all[1][2 * i + 1]));
    }
}
