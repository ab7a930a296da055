// Gathers the PATCH x PATCH patches of images (B, channels, H, W) into rows (B, height, width, channels * PATCH * PATCH),
// which a matrix product multiplies by the weights of a convolution. A patch is read in RUNS runs of RUN adjacent numbers:
// of all channels if the channels of a pixel are adjacent in memory, else of one channel. One thread copies VEC numbers,
// 4 or 1. An odd last row or column of x is dropped. x_b, x_c, x_h: distances of images, channels and rows.

extern "C" __global__ void __launch_bounds__(256) gather_patches(
    const x_t* __restrict__ x, y_t* __restrict__ out, unsigned threads, int height, int width, i64 x_b, i64 x_c, i64 x_h) {
    constexpr unsigned PARTS = RUN / VEC;
    const unsigned id = blockIdx.x * 256u + threadIdx.x;
    if (id >= threads) return;
    const unsigned part = id % PARTS, run = id / PARTS % RUNS, patch = id / (PARTS * RUNS);
    const unsigned above = patch / width, column = patch - above * width, b = above / height, row = above - b * height;
    x += b * x_b + run / PATCH * x_c + (row * PATCH + run % PATCH) * x_h + column * RUN + part * VEC;
    out += (i64)id * VEC;
    if constexpr (VEC == 1) *out = from_float<Y_TYPE>(to_float<X_TYPE>(*x));
    else {
        const float4 v = to_floats<X_TYPE>(*(const Several<X_TYPE, 4>::type*)x);
        if constexpr (Y_TYPE == 0) *(float4*)out = v;
        else *(uint2*)out = uint2{from_floats<Y_TYPE>(v.x, v.y), from_floats<Y_TYPE>(v.z, v.w)};
    }
}
