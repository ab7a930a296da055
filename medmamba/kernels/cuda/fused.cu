// The operations around the scan at inference, each in one pass over memory. One warp per pixel; C = CHANNELS, a
// multiple of 4; WARPS warps per block.

constexpr int C = CHANNELS;
constexpr int PAIRS = (C / 2 + 31) / 32;  // pairs of channels per lane

#define PIXEL ((i64)blockIdx.x * WARPS + threadIdx.x / 32)

// silu(gate) * layer_norm(sum over directions of parts): parts (B, K, L, C), gate and out (B, L, C); gate has a
// pixel stride of gate_l.
extern "C" __global__ void __launch_bounds__(32 * WARPS) merge_gate(
    const x_t* __restrict__ parts, const x_t* __restrict__ gate, const float* __restrict__ weight,
    const float* __restrict__ bias, x_t* __restrict__ out, i64 pixels, int L, int gate_l, float eps) {
    const i64 pixel = PIXEL;
    if (pixel >= pixels) return;
    const int lane = threadIdx.x % 32;
    auto index = [&](int i) { return lane + 32 * i; };
    parts += (pixel / L * DIRECTIONS * L + pixel % L) * C;
    gate += pixel * gate_l;
    Pair v[PAIRS], g[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        v[i] = g[i] = {0.f, 0.f};
        if (index(i) < C / 2) {
            g[i] = read(gate + 2 * index(i));
#pragma unroll
            for (int k = 0; k < DIRECTIONS; k++) {
                const Pair part = read(parts + (i64)k * L * C + 2 * index(i));
                v[i].x += part.x, v[i].y += part.y;
            }
        }
    }
    normalise<PAIRS>(v, index, C / 2, weight, bias, eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (index(i) < C / 2)
            write(out + pixel * C + 2 * index(i), {v[i].x * silu(g[i].x), v[i].y * silu(g[i].y)});
}

// The end of one block and the beginning of the next.
//     MIX    out = x + the interleaved channels of relu(left) and right; otherwise out is x and not written
//     SPLIT  next_left = out[:C/2] * scale + shift, next_right = layer_norm(out[C/2:])
extern "C" __global__ void __launch_bounds__(32 * WARPS) mix_split(
    const x_t* __restrict__ x, const x_t* __restrict__ left, const x_t* __restrict__ right,
    const float* __restrict__ scale, const float* __restrict__ shift, const float* __restrict__ weight,
    const float* __restrict__ bias, x_t* __restrict__ out, x_t* __restrict__ next_left, x_t* __restrict__ next_right,
    i64 pixels, float eps) {
    const i64 pixel = PIXEL;
    if (pixel >= pixels) return;
    const int lane = threadIdx.x % 32;
    constexpr int HALF = C / 2, HALF_PAIRS = (C / 4 + 31) / 32;
    auto index = [&](int i) { return lane + 32 * i; };  // of a pair within its half
    Pair v[2][HALF_PAIRS];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < HALF_PAIRS; i++) {
            v[half][i] = {0.f, 0.f};
            if (index(i) >= C / 4) continue;
            const int pair = half * (C / 4) + index(i);
            Pair u = read(x + pixel * C + 2 * pair);
            if (MIX) {
                u.x += relu(to_float<X_TYPE>(left[pixel * HALF + pair]));
                u.y += to_float<X_TYPE>(right[pixel * HALF + pair]);
                write(out + pixel * C + 2 * pair, u);
            }
            v[half][i] = u;
        }
    if (!SPLIT) return;
    normalise<HALF_PAIRS>(v[1], index, C / 4, weight, bias, eps);
#pragma unroll
    for (int i = 0; i < HALF_PAIRS; i++)
        if (index(i) < C / 4) {
            const float2 a = *(const float2*)(scale + 2 * index(i)), b = *(const float2*)(shift + 2 * index(i));
            write(next_left + pixel * HALF + 2 * index(i), {v[0][i].x * a.x + b.x, v[0][i].y * a.y + b.y});
            write(next_right + pixel * HALF + 2 * index(i), v[1][i]);
        }
}

// layer_norm over the C channels of a pixel, or, with GATHER, over the C / 4 channels of each pixel of a 2x2 patch, in
// the order (0,0), (1,0), (0,1), (1,1): (B, H, W, C / 4) to (B, H / 2, W / 2, C). height, width: of the result.
extern "C" __global__ void __launch_bounds__(32 * WARPS) gather_norm(
    const x_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, x_t* __restrict__ out,
    i64 pixels, int height, int width, int W, i64 x_b, float eps) {
    const i64 pixel = PIXEL;
    if (pixel >= pixels) return;
    const int lane = threadIdx.x % 32;
    auto index = [&](int i) { return lane + 32 * i; };
    Pair v[PAIRS];
    if (GATHER) x += pixel / (height * width) * x_b + ((i64)(pixel / width % height) * 2 * W + pixel % width * 2) * (C / 4);
    else x += pixel * C;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        v[i] = {0.f, 0.f};
        const int c = 2 * index(i), part = c / (C / 4);
        if (c < C) v[i] = read(GATHER ? x + ((i64)(part & 1) * W + part / 2) * (C / 4) + c % (C / 4) : x + c);
    }
    normalise<PAIRS>(v, index, C / 2, weight, bias, eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
        if (index(i) < C / 2) write(out + pixel * C + 2 * index(i), v[i]);
}
