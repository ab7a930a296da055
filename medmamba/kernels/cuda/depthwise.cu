// silu(depthwise 3x3 convolution + bias): x (B, H, W, C) with pixels STEP apart, to (B, H, W, C) contiguous.
// weight (9, C), row by row. One thread takes two channels of STRIP pixels in each of ROWS rows. C = CHANNELS, even.
// What bounds it is the number of instructions: distances between pixels are constants, so that a load takes one.

constexpr int C = CHANNELS;

extern "C" __global__ void __launch_bounds__(256) depthwise_silu(
    const x_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, x_t* __restrict__ out,
    unsigned threads, int H, int W, int strips, int bands, i64 x_b) {
    const unsigned id = blockIdx.x * 256u + threadIdx.x;
    if (id >= threads) return;
    const int c = id % (C / 2) * 2;
    const unsigned rest = id / (C / 2), above = rest / strips, b = above / bands;
    const int first = (rest - above * strips) * STRIP, top = (above - b * bands) * ROWS;
    x += (i64)b * x_b + c;
    out += (i64)b * H * W * C + c;
    Pair w[9], sum[ROWS][STRIP];
#pragma unroll
    for (int i = 0; i < 9; i++) w[i] = *(const Pair*)(weight + i * C + c);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < STRIP; i++) sum[r][i] = {bias[c], bias[c + 1]};
#pragma unroll
    for (int j = 0; j < ROWS + 2; j++) {
        const int y = top + j - 1;
        if (y < 0 || y >= H) continue;
        const x_t* line = x + (i64)(y * W + first) * STEP;
#pragma unroll
        for (int i = 0; i < STRIP + 2; i++) {
            Pair v = {0.f, 0.f};
            if ((unsigned)(first + i - 1) < (unsigned)W) v = read(line + (i - 1) * STEP);
#pragma unroll
            for (int r = 0; r < ROWS; r++)  // the row and the pixel that use this one
#pragma unroll
                for (int dx = 0; dx < 3; dx++) {
                    const int dy = j - r, to = i - dx;
                    if (dy < 0 || dy > 2 || to < 0 || to >= STRIP) continue;
                    sum[r][to].x += v.x * w[dy * 3 + dx].x, sum[r][to].y += v.y * w[dy * 3 + dx].y;
                }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (top + r >= H) break;
        x_t* to = out + (i64)((top + r) * W + first) * C;
#pragma unroll
        for (int i = 0; i < STRIP; i++)
            if (first + i < W) write(to + i * C, {silu(sum[r][i].x), silu(sum[r][i].y)});
    }
}
