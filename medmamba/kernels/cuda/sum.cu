// (outer, PARTS, inner) of X_TYPE to (outer, inner) of Y_TYPE, in float32 and in a fixed order. VEC: four adjacent
// elements per thread.

extern "C" __global__ void __launch_bounds__(256) sum_parts(
    const x_t* __restrict__ parts, y_t* __restrict__ out, i64 outer, i64 inner) {
    constexpr int STEP = VEC ? 4 : 1;
    const i64 each = inner / STEP, i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= outer * each) return;
    const x_t* from = parts + i / each * PARTS * inner + i % each * STEP;
    y_t* to = out + i * STEP;
    if (VEC) {
        typedef Several<X_TYPE, 4>::type load_t;
        float4 sum = to_floats<X_TYPE>(*(const load_t*)from);
#pragma unroll
        for (int p = 1; p < PARTS; p++) {
            const float4 v = to_floats<X_TYPE>(*(const load_t*)(from + p * inner));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        to[0] = from_float<Y_TYPE>(sum.x), to[1] = from_float<Y_TYPE>(sum.y);
        to[2] = from_float<Y_TYPE>(sum.z), to[3] = from_float<Y_TYPE>(sum.w);
    } else {
        float sum = to_float<X_TYPE>(*from);
#pragma unroll
        for (int p = 1; p < PARTS; p++) sum += to_float<X_TYPE>(from[p * inner]);
        *to = from_float<Y_TYPE>(sum);
    }
}

// The gradients of the scan's parameters: sums over images of table (B, K, N + R + 2, C), whose rows are those of A, of
// dt_weight, dt_bias and D. Writes dA (K, C, N), dweight (K, C, R), dbias (K, C), dD (K, C). Grid: K * rows * blocks of 32
// channels; eight warps share the images.
extern "C" __global__ void __launch_bounds__(256) sum_table(
    const float* __restrict__ table, float* __restrict__ dA, float* __restrict__ dweight, float* __restrict__ dbias,
    float* __restrict__ dD, int batch, int C, int blocks) {
    constexpr int ROWS = N + RANK + 2;
    const int block = blockIdx.x % blocks, j = blockIdx.x / blocks % ROWS, k = blockIdx.x / blocks / ROWS;
    const int slice = threadIdx.x / 32, c = block * 32 + threadIdx.x % 32;
    float sum = 0.f;
    if (c < C)
#pragma unroll 4
        for (int b = slice; b < batch; b += 8) sum += table[(((i64)b * DIRECTIONS + k) * ROWS + j) * C + c];
    __shared__ float sums[256];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (slice || c >= C) return;
#pragma unroll
    for (int s = 1; s < 8; s++) sum += sums[s * 32 + threadIdx.x];
    const int kc = k * C + c;
    if (j < N) dA[kc * N + j] = sum;
    else if (j < N + RANK) dweight[kc * RANK + j - N] = sum;
    else (j == N + RANK ? dbias : dD)[kc] = sum;
}

// Sums up to three matrices (count, columns) over their rows, in a fixed order: eight warps share the rows of 32 columns.
extern "C" __global__ void __launch_bounds__(256) sum_rows(
    const float* rows0, float* out0, int count0, int columns0, const float* rows1, float* out1, int count1, int columns1,
    const float* rows2, float* out2, int count2, int columns2) {
    const float* const rows[3] = {rows0, rows1, rows2};
    float* const outs[3] = {out0, out1, out2};
    const int counts[3] = {count0, count1, count2}, widths[3] = {columns0, columns1, columns2};
    __shared__ float sums[256];
    int block = blockIdx.x;
#pragma unroll
    for (int m = 0; m < 3; block -= (widths[m] + 31) / 32, m++) {
        if (block < 0 || block >= (widths[m] + 31) / 32) continue;
        const int slice = threadIdx.x / 32, column = block * 32 + threadIdx.x % 32;
        Sum sum;
        if (column < widths[m])
            for (int i = slice; i < counts[m]; i += 8) sum.add(rows[m][(i64)i * widths[m] + column]);
        sums[threadIdx.x] = sum.total;
        __syncthreads();
        if (slice || column >= widths[m]) continue;
        for (int s = 1; s < 8; s++) sum.add(sums[s * 32 + threadIdx.x]);
        outs[m][column] = sum.total;
    }
}
