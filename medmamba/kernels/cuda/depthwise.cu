// silu(depthwise 3x3 convolution + bias): x (B, H, W, C) with a pixel stride of x_l, to (B, H, W, C) contiguous.
// weight (9, C), row by row. One thread takes two channels of STRIP pixels in a row. C = CHANNELS, even.

constexpr int C = CHANNELS;

extern "C" __global__ void __launch_bounds__(256) depthwise_silu(
    const x_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, x_t* __restrict__ out,
    i64 threads, int H, int W, int strips, i64 x_b, int x_l) {
    const i64 id = (i64)blockIdx.x * 256 + threadIdx.x;
    if (id >= threads) return;
    const int c = id % (C / 2) * 2;
    const i64 rest = id / (C / 2);
    const int first = rest % strips * STRIP, row = rest / strips % H;
    const i64 b = rest / strips / H;
    x += b * x_b + c;
    out += ((b * H + row) * W + first) * C + c;
    Pair w[9], sum[STRIP];
#pragma unroll
    for (int i = 0; i < 9; i++) w[i] = {weight[i * C + c], weight[i * C + c + 1]};
#pragma unroll
    for (int i = 0; i < STRIP; i++) sum[i] = {bias[c], bias[c + 1]};
#pragma unroll
    for (int dy = 0; dy < 3; dy++) {
        const int y = row + dy - 1;
        if (y < 0 || y >= H) continue;
#pragma unroll
        for (int i = 0; i < STRIP + 2; i++) {
            const int column = first + i - 1;
            Pair v = {0.f, 0.f};
            if (column >= 0 && column < W) v = read(x + ((i64)y * W + column) * x_l);
#pragma unroll
            for (int dx = 0; dx < 3; dx++) {
                const int to = i - dx;  // the output pixel that uses this one with weight dx
                if (to >= 0 && to < STRIP) sum[to].x += v.x * w[dy * 3 + dx].x, sum[to].y += v.y * w[dy * 3 + dx].y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < STRIP; i++)
        if (first + i < W) write(out + (i64)i * C, {silu(sum[i].x), silu(sum[i].y)});
}
