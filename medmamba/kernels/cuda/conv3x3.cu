// 3x3 convolution with bias on tensor cores, for maps of few channels. It enlarges one input and appends another as it
// reads them, so that neither the enlarged map nor the joined one is ever written.
//
//     X_TYPE   of all maps and weights: 1 half, 2 bfloat16
//     FIRST    channels of x, a multiple of CHUNK
//     UP       whether x has half the height and width, and each pixel stands for 2x2
//     SECOND   channels of skip, which follow those of x: a multiple of CHUNK, or 0 without skip
//     CHUNK    channels of the input in shared memory at a time, 16 or 32
//     OUT      channels of the output
//     COLUMNS  of them per program: a multiple of 16, or 8 with MAPS
//     ROWS     of pixels per program, a multiple of WARPS
//     RELU     whether to apply it
//     MAPS     write (B, OUT, H, W) instead of (B, H, W, OUT)
//
// A program takes ROWS x 16 pixels; a warp takes ROWS / WARPS of the rows, each a tile of 16 pixels in the sense of the
// tensor cores. `weight` lies in the order in which lanes take it, see `arranged` in ../block/convolution.py.

constexpr int WARPS = 4, TW = 16;
constexpr int TILES = ROWS / WARPS, PARTS = COLUMNS / 8;
constexpr int PITCH = CHUNK + 8;  // of a pixel in shared memory: eight pixels in a row lie in different banks
constexpr int CHUNKS = (FIRST + SECOND) / CHUNK, BUFFERS = CHUNKS > 1 ? 2 : 1;
constexpr int AREA = (ROWS + 2) * (TW + 2);
constexpr int BLOCKS_OUT = (OUT + 7) / 8;  // of eight output channels

extern "C" __global__ void __launch_bounds__(32 * WARPS) conv3x3(
    const x_t* __restrict__ x, const x_t* __restrict__ skip, const uint2* __restrict__ weight,
    const x_t* __restrict__ bias, x_t* __restrict__ out, int H, int W, int down, int across) {
    DYNAMIC_SHARED(shared4);
    x_t* shared = (x_t*)shared4;  // (BUFFERS, AREA, PITCH)
    constexpr int BLOCKS = (OUT + COLUMNS - 1) / COLUMNS;
    const int block = blockIdx.x % BLOCKS, tile = blockIdx.x / BLOCKS;
    const int left = tile % across * TW, top = tile / across % down * ROWS;
    const i64 b = tile / across / down;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    weight += block * PARTS * 32 + lane;

    auto fetch = [&](int chunk) {  // the pixels of the program and those around them; zeros outside the image
        x_t* to = shared + chunk % BUFFERS * (AREA * PITCH);
        const int channel = chunk * CHUNK;
        const bool second = SECOND && channel >= FIRST;
        for (int i = tid; i < AREA * (CHUNK / 8); i += 32 * WARPS) {
            const int pixel = i / (CHUNK / 8), piece = i % (CHUNK / 8) * 8;
            const int row = top + pixel / (TW + 2) - 1, column = left + pixel % (TW + 2) - 1;
            x_t* at = to + pixel * PITCH + piece;
            if ((unsigned)row >= (unsigned)H || (unsigned)column >= (unsigned)W) {
                *(uint4*)at = uint4{0, 0, 0, 0};
                continue;
            }
            const x_t* from;
            if (second) from = skip + ((b * H + row) * W + column) * SECOND + (channel - FIRST);
            else if (UP) from = x + ((b * (H / 2) + row / 2) * (W / 2) + column / 2) * FIRST + channel;
            else from = x + ((b * H + row) * W + column) * FIRST + channel;
            copy_async<16>(at, from + piece);
        }
    };

    float sum[TILES][PARTS][4];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < PARTS; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][j][i] = 0.f;

    fetch(0);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < CHUNKS) fetch(chunk + 1);
        const x_t* in = shared + chunk % BUFFERS * (AREA * PITCH) + (warp * TILES * (TW + 2) + lane % 16) * PITCH + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
            for (int dx = 0; dx < 3; dx++) {
                uint2 taps[3][PARTS];
                const uint2* here = weight + (i64)((chunk * (CHUNK / 16) + k) * 9 + dx) * (BLOCKS_OUT * 32);
#pragma unroll
                for (int dy = 0; dy < 3; dy++)
#pragma unroll
                    for (int j = 0; j < PARTS; j++) taps[dy][j] = here[(dy * 3 * BLOCKS_OUT + j) * 32];
#pragma unroll
                for (int row = 0; row < TILES + 2; row++) {  // each row of pixels serves up to three rows of the output
                    unsigned a[4];
                    load_tile(a, in + (row * (TW + 2) + dx) * PITCH + 16 * k);
#pragma unroll
                    for (int dy = 0; dy < 3; dy++)
                        if (row - dy >= 0 && row - dy < TILES)
#pragma unroll
                            for (int j = 0; j < PARTS; j++) multiply(sum[row - dy >= 0 ? row - dy : 0][j], a, taps[dy][j]);
                }
            }
    }

    auto ended = [&](float v) { return RELU ? relu(v) : v; };
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = top + warp * TILES + m, column = left + lane / 4 + 8 * half;
            if (row >= H || column >= W) continue;
            if (MAPS) {
#pragma unroll
                for (int j = 0; j < PARTS; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int c = block * COLUMNS + 8 * j + lane % 4 * 2 + i;
                        if (c < OUT)
                            out[((b * OUT + c) * H + row) * W + column] =
                                from_float<X_TYPE>(ended(sum[m][j][2 * half + i] + to_float<X_TYPE>(bias[c])));
                    }
            } else
#pragma unroll
                for (int j = 0; j < PARTS; j += 2) {  // a lane has four adjacent channels, see `arranged`
                    const int c = block * COLUMNS + 8 * j + lane % 4 * 4;
                    const float4 shift = read4(bias + c);
                    const float *low = sum[m][j] + 2 * half, *high = sum[m][j + 1 < PARTS ? j + 1 : j] + 2 * half;
                    write4(out + ((b * H + row) * W + column) * OUT + c,
                           make_float4(ended(low[0] + shift.x), ended(low[1] + shift.y), ended(high[0] + shift.z), ended(high[1] + shift.w)));
                }
        }
}
