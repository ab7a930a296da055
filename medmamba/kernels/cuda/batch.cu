// Batch norm in training, with or without ReLU, forward and backward. Feature maps are rows of C numbers, one row per
// pixel of the batch. Compile-time constants, set by ../block/training_conv.py:
//     CHANNELS  C, a multiple of 4
//     THREADS   a multiple of C / 4: a thread takes four channels of every n-th row
//     RELU      whether ReLU follows
// Sums over all rows take two steps in a fixed order: each program writes its sums to partials (programs, 2, C), and a
// second kernel adds these. The statistics of a batch are kept as stats (4, C):

#define MEAN 0
#define RSTD 1   // 1 / deviation
#define SCALE 2  // the result is x * scale + shift
#define SHIFT 3

constexpr int C = CHANNELS, FOURS = C / 4;
constexpr int SUBS = THREADS / FOURS;  // rows at a time
constexpr int SLICES = 16;             // slices of partials that are summed in parallel, for 32 channels each

__device__ __forceinline__ float4 operator-(float4 a, float4 b) { return a + b * -1.f; }

__device__ __forceinline__ float4 positive(float4 v) {
    return make_float4(relu(v.x), relu(v.y), relu(v.z), relu(v.w));
}

// v where the input of ReLU is positive, else 0.
__device__ __forceinline__ float4 passed(float4 v, float4 given) {
    return make_float4(given.x > 0.f ? v.x : 0.f, given.y > 0.f ? v.y : 0.f, given.z > 0.f ? v.z : 0.f,
                       given.w > 0.f ? v.w : 0.f);
}

// Adds the sums of all threads that share channels.
__device__ __forceinline__ void add_threads(float4 a, float4 b, float* partials) {
    __shared__ float4 shared[2][THREADS];
    shared[0][threadIdx.x] = a, shared[1][threadIdx.x] = b;
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * FOURS; i += THREADS) {
        float4 sum = shared[i / FOURS][i % FOURS];
        for (int s = 1; s < SUBS; s++) sum = sum + shared[i / FOURS][s * FOURS + i % FOURS];
        ((float4*)partials)[(i64)blockIdx.x * 2 * FOURS + i] = sum;
    }
}

// Adds the partials of all programs: thread (slice, c) of 32 channels; the result is for slice 0.
__device__ __forceinline__ Pair add_programs(const float* partials, int programs) {
    const int c = blockIdx.x * 32 + threadIdx.x % 32, slice = threadIdx.x / 32;
    Pair sum = {0.f, 0.f};
    if (c < C)
#pragma unroll 4
        for (int p = slice; p < programs; p += SLICES)
            sum.x += partials[(i64)p * 2 * C + c], sum.y += partials[(i64)p * 2 * C + C + c];
    __shared__ Pair shared[SLICES * 32];
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int s = 1; s < SLICES && slice == 0; s++)
        sum.x += shared[s * 32 + threadIdx.x].x, sum.y += shared[s * 32 + threadIdx.x].y;
    return sum;
}

// The rows of this thread: the first, and the step between rows.
__device__ __forceinline__ i64 first_row() { return (i64)blockIdx.x * SUBS + threadIdx.x / FOURS; }
__device__ __forceinline__ i64 row_step() { return (i64)gridDim.x * SUBS; }

// Sums and sums of squares of x minus its first row, which is near the mean, to avoid cancellation.
extern "C" __global__ void __launch_bounds__(THREADS) batch_sums(
    const x_t* __restrict__ x, float* __restrict__ partials, i64 rows) {
    x += threadIdx.x % FOURS * 4;
    const float4 origin = read4(x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f), squares = sum;
#pragma unroll 4
    for (i64 row = first_row(); row < rows; row += row_step()) {
        const float4 v = read4(x + row * C) - origin;
        sum = sum + v, squares = squares + v * v;
    }
    add_threads(sum, squares, partials);
}

// Computes stats and updates the running statistics with `momentum` and the unbiased variance. `before`, if given, is a
// bias that was not added to x: batch norm would cancel it, so only the running mean includes it. Counts the batch in
// `tracked`, if given.
extern "C" __global__ void __launch_bounds__(32 * SLICES) batch_stats(
    const float* __restrict__ partials, const x_t* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, const float* __restrict__ before, float* __restrict__ running_mean,
    float* __restrict__ running_var, float* __restrict__ stats, i64* __restrict__ tracked, int programs, i64 rows,
    float momentum, float eps) {
    if (tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*tracked;
    const Pair sums = add_programs(partials, programs);
    const int c = blockIdx.x * 32 + threadIdx.x % 32;
    if (threadIdx.x >= 32 || c >= C) return;
    const float offset = sums.x / rows, mean = to_float<X_TYPE>(x[c]) + offset;
    const float variance = relu(sums.y / rows - offset * offset);
    const float rstd = 1.f / sqrtf(variance + eps), scale = rstd * weight[c];
    stats[MEAN * C + c] = mean, stats[RSTD * C + c] = rstd;
    stats[SCALE * C + c] = scale, stats[SHIFT * C + c] = bias[c] - mean * scale;
    const float whole = before ? mean + before[c] : mean;
    running_mean[c] += momentum * (whole - running_mean[c]);
    running_var[c] += momentum * (variance * ((float)rows / (rows - 1)) - running_var[c]);
}

// y = x * scale + shift; no scale: 1. y may be x.
extern "C" __global__ void __launch_bounds__(256) batch_apply(
    const x_t* x, const float* __restrict__ scale, const float* __restrict__ shift, x_t* y, i64 fours) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= fours) return;
    const int c = i % FOURS * 4;
    float4 v = read4(x + 4 * i);
    if (scale) v = v * read4f(scale + c);
    v = v + read4f(shift + c);
    write4(y + 4 * i, RELU ? positive(v) : v);
}

// Sums of dy, where ReLU passed it, and of dy times the standardised x.
extern "C" __global__ void __launch_bounds__(THREADS) batch_gradient_sums(
    const x_t* __restrict__ x, const x_t* __restrict__ dy, const float* __restrict__ stats,
    float* __restrict__ partials, i64 rows) {
    const int c = threadIdx.x % FOURS * 4;
    const float4 mean = read4f(stats + MEAN * C + c), rstd = read4f(stats + RSTD * C + c);
    const float4 scale = read4f(stats + SCALE * C + c), shift = read4f(stats + SHIFT * C + c);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f), along = sum;
#pragma unroll 4
    for (i64 row = first_row(); row < rows; row += row_step()) {
        const float4 v = read4(x + row * C + c);
        float4 d = read4(dy + row * C + c);
        if (RELU) d = passed(d, v * scale + shift);
        sum = sum + d, along = along + d * ((v - mean) * rstd);
    }
    add_threads(sum, along, partials);
}

// Sums of dy where y, the output of ReLU, is positive; also writes that dy.
extern "C" __global__ void __launch_bounds__(THREADS) relu_gradient(
    const x_t* __restrict__ y, const x_t* __restrict__ dy, x_t* __restrict__ dx, float* __restrict__ partials, i64 rows) {
    const int c = threadIdx.x % FOURS * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (i64 row = first_row(); row < rows; row += row_step()) {
        const float4 d = passed(read4(dy + row * C + c), read4(y + row * C + c));
        write4(dx + row * C + c, d);
        sum = sum + d;
    }
    add_threads(sum, sum, partials);
}

extern "C" __global__ void __launch_bounds__(32 * SLICES) add_partials(
    const float* __restrict__ partials, float* __restrict__ sums, int programs) {
    const Pair found = add_programs(partials, programs);
    const int c = blockIdx.x * 32 + threadIdx.x % 32;
    if (threadIdx.x < 32 && c < C) sums[c] = found.x, sums[C + c] = found.y;
}

// dx from dy and the result of `batch_gradient_sums`, sums (2, C).
extern "C" __global__ void __launch_bounds__(256) batch_gradient(
    const x_t* __restrict__ x, const x_t* __restrict__ dy, const float* __restrict__ stats,
    const float* __restrict__ sums, x_t* __restrict__ dx, i64 fours) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= fours) return;
    const int c = i % FOURS * 4;
    const float each = (float)FOURS / fours;  // 1 / rows
    const float4 scale = read4f(stats + SCALE * C + c), v = read4(x + 4 * i);
    const float4 standard = (v - read4f(stats + MEAN * C + c)) * read4f(stats + RSTD * C + c);
    float4 d = read4(dy + 4 * i);
    if (RELU) d = passed(d, v * scale + read4f(stats + SHIFT * C + c));
    write4(dx + 4 * i, (d - (read4f(sums + c) + standard * read4f(sums + C + c)) * each) * scale);
}
