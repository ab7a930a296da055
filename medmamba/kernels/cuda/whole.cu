// What a whole block in training does to its parameters: one pass over all of them before the forward pass, one over
// their gradients after the backward pass. Compile-time constants, set by ../block/plan.py:
//     X_TYPE     of the maps and of the products with them
//     P_TYPE     of the parameters and their gradients
//     CHANNELS   C, of the scan branch; HALF  H, of a branch of the block: multiples of 4
//     RANK, STATES  R and N
//     LAST       whether the kernels of the 3x3 convolutions lie channels-last, as (out, 3, 3, in)
// CAST: parameters that are of the type of the maps are used as they are, and so are their gradients.

#define CAST (X_TYPE != P_TYPE)
constexpr int C = CHANNELS, H = HALF;
constexpr int IN = 2 * C * H, OUT = C * H, SPATIAL = 9 * H * H, POINT = H * H;  // numbers of each matrix
constexpr int ROWS = RANK + 2 * N, PADDED = RP + 2 * N;                         // per direction, of x_proj

__device__ __forceinline__ float4 read4p(const p_t* from) {
    return to_floats<P_TYPE>(*(const Several<P_TYPE, 4>::type*)from);
}

__device__ __forceinline__ void write4p(p_t* to, float4 v) {
    to[0] = from_float<P_TYPE>(v.x), to[1] = from_float<P_TYPE>(v.y);
    to[2] = from_float<P_TYPE>(v.z), to[3] = from_float<P_TYPE>(v.w);
}

// exp(x) to float32 accuracy; a fast exponential alone loses bits in rounding x * log2(e).
__device__ __forceinline__ float exact_exp(float x) {
    const float high = x * LOG2E, low = fmaf(x, LOG2E, -high) + x * 1.9259630e-8f;
    return exp2f(high) * fmaf(low, 0.69314718f, 1.f);
}

// Copies four numbers at i to the type of the maps, if i lies within the matrix of SIZE numbers; else moves on.
template <int SIZE> __device__ __forceinline__ bool copied(const p_t* from, x_t*& to, int& i) {
    if (i < SIZE) {
        write4(to + i, read4p(from + i));
        return true;
    }
    i -= SIZE, to += SIZE;
    return false;
}

// A 3x3 kernel (out, in, 3, 3), or LAST, to (out, 3, 3, in).
__device__ __forceinline__ bool laid_out(const p_t* from, x_t*& to, int& i) {
    if (LAST) return copied<SPATIAL>(from, to, i);
    if (i < SPATIAL) {
        const p_t* at = from + (i / (9 * H) * H + i % H) * 9 + i / H % 9;
        write4(to + i, make_float4(to_float<P_TYPE>(at[0]), to_float<P_TYPE>(at[9]), to_float<P_TYPE>(at[18]),
                                   to_float<P_TYPE>(at[27])));
        return true;
    }
    i -= SPATIAL, to += SPATIAL;
    return false;
}

// Writes weights: x_proj with its codes padded to RP rows, both 3x3 kernels, with CAST also in_proj, out_proj and the
// 1x1 kernel; and numbers: A = -exp(A_log) (4, C, N), dt_weight padded (4, C, RP).
extern "C" __global__ void __launch_bounds__(256) prepare_block(
    const p_t* __restrict__ x_proj, const p_t* __restrict__ spatial0, const p_t* __restrict__ spatial1,
    const p_t* __restrict__ in_proj, const p_t* __restrict__ out_proj, const p_t* __restrict__ point,
    const p_t* __restrict__ A_log, const p_t* __restrict__ dt_weight, x_t* weights, float* __restrict__ numbers) {
    constexpr int CODES = DIRECTIONS * PADDED * C, RATES = DIRECTIONS * C * N, STEPS = DIRECTIONS * C * RP;
    int i = 4 * (blockIdx.x * 256 + threadIdx.x);
    if (i < CODES) {
        const int row = i / C, j = row % PADDED, from = j < RP ? j : j - RP + RANK;
        const bool padding = j >= RANK && j < RP;
        write4(weights + i, padding ? make_float4(0.f, 0.f, 0.f, 0.f)
                                    : read4p(x_proj + (row / PADDED * ROWS + from) * C + i % C));
        return;
    }
    i -= CODES, weights += CODES;
    if (laid_out(spatial0, weights, i) || laid_out(spatial1, weights, i)) return;
    if (CAST && (copied<IN>(in_proj, weights, i) || copied<OUT>(out_proj, weights, i) || copied<POINT>(point, weights, i)))
        return;
    if (i < RATES) {
        const float4 v = read4p(A_log + i);
        *(float4*)(numbers + i) = make_float4(-exact_exp(v.x), -exact_exp(v.y), -exact_exp(v.z), -exact_exp(v.w));
        return;
    }
    i -= RATES, numbers += RATES;
    if (i < STEPS) {
        const int row = i / RP, r = i % RP;
#pragma unroll
        for (int n = 0; n < 4; n++)
            numbers[i + n] = r + n < RANK ? to_float<P_TYPE>(dt_weight[row * RANK + r + n]) : 0.f;
    }
}

// The column sums of 32 columns of (rows, columns), for threads of the first warp; eight warps share the rows.
__device__ __forceinline__ float column_sum(const float* from, int rows, i64 columns, bool mine) {
    const int slice = threadIdx.x / 32;
    float sum = 0.f;
    if (mine)
#pragma unroll 4
        for (int row = slice; row < rows; row += 8) sum += from[row * columns];
    __shared__ float sums[256];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int s = 1; s < 8 && slice == 0; s++) sum += sums[s * 32 + threadIdx.x];
    return sum;
}

// Sums partials (programs, COLUMNS) of the first `programs`, if this block is one of those for them; else moves on.
template <int COLUMNS, int WRITTEN> __device__ __forceinline__ bool summed(
    const float* from, int programs, p_t*& to, int& block) {
    constexpr int BLOCKS = (WRITTEN + 31) / 32;
    if (block < BLOCKS) {
        const int c = block * 32 + threadIdx.x % 32;
        if (!from) return true;
        const float sum = column_sum(from + c, programs, COLUMNS, c < WRITTEN);
        if (threadIdx.x < 32 && c < WRITTEN) to[c] = from_float<P_TYPE>(sum);
        return true;
    }
    block -= BLOCKS, to += WRITTEN;
    return false;
}

__device__ constexpr int each(int numbers) { return (numbers + 1023) / 1024; }  // blocks of 256 threads that take four numbers

// Converts SIZE numbers of the type of the maps.
template <int SIZE> __device__ __forceinline__ bool converted(const x_t* from, p_t*& to, int& block) {
    if (block < each(SIZE)) {
        const int i = 4 * (block * 256 + threadIdx.x);
        if (from && i < SIZE) write4p(to + i, read4(from + i));
        return true;
    }
    block -= each(SIZE), to += SIZE;
    return false;
}

// The gradient of a 3x3 kernel, (out, 3, 3, in), laid out as the kernel.
__device__ __forceinline__ bool laid_back(const x_t* from, p_t*& to, int& block) {
    if (LAST) return converted<SPATIAL>(from, to, block);
    if (block < each(SPATIAL)) {
        const int i = 4 * (block * 256 + threadIdx.x);
        if (from && i < SPATIAL)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int at = i + n, tap = at % 9, in = at / 9 % H, out = at / (9 * H);
                to[at] = from_float<P_TYPE>(to_float<X_TYPE>(from[(out * 9 + tap) * H + in]));
            }
        return true;
    }
    block -= each(SPATIAL), to += SPATIAL;
    return false;
}

// Weight and bias of a batch norm, whose sums (2, H) are of bias and weight, and the bias of the layer before it: zero.
template <bool BEFORE> __device__ __forceinline__ bool of_norm(const float* sums, p_t*& to, int& block) {
    if (block == 0) {
        for (int c = threadIdx.x; c < H; c += 256) {
            if (BEFORE) to[c] = from_float<P_TYPE>(0.f);
            p_t* own = to + (BEFORE ? H : 0);
            own[c] = from_float<P_TYPE>(sums[H + c]), own[H + c] = from_float<P_TYPE>(sums[c]);
        }
        return true;
    }
    block--, to += (BEFORE ? 3 : 2) * H;
    return false;
}

// Writes the gradients of all parameters, in the order of `Block` in ../block/whole.py and, without CAST, less those of
// in_proj, out_proj and the 1x1 kernel. Of null pointers nothing is written. table: (batch, 4, N + RP + 2, C), see
// sum.cu; codes: of the padded x_proj; partials: of the kernels of train.cu, train_conv.cu and batch.cu; sums (3, 2, H):
// of the batch norms. All sums are in a fixed order.
extern "C" __global__ void __launch_bounds__(256) finish_block(
    const float* __restrict__ table, const float* __restrict__ A, const float* __restrict__ norm,
    const float* __restrict__ depthwise, const float* __restrict__ gate, const float* __restrict__ sums,
    const float* __restrict__ bias, const x_t* __restrict__ codes, const x_t* __restrict__ spatial0,
    const x_t* __restrict__ spatial1, const x_t* __restrict__ in_proj, const x_t* __restrict__ out_proj,
    const x_t* __restrict__ point, p_t* to, int batch, int norms, int depthwises, int gates, int biases) {
    constexpr int GROUPS = (C + 31) / 32, TABLE = DIRECTIONS * (N + RP + 2) * GROUPS, CODES = DIRECTIONS * ROWS * C;
    int block = blockIdx.x;
    if (summed<2 * H, 2 * H>(norm, norms, to, block)) return;
    if (CAST && converted<IN>(in_proj, to, block)) return;
    if (summed<10 * C, 10 * C>(depthwise, depthwises, to, block)) return;
    if (block < each(CODES)) {
        const int i = 4 * (block * 256 + threadIdx.x), row = i / C, j = row % ROWS;
        if (codes && i < CODES)
            write4p(to + i, read4(codes + (row / ROWS * PADDED + (j < RANK ? j : j - RANK + RP)) * C + i % C));
        return;
    }
    block -= each(CODES), to += CODES;
    if (block < TABLE) {
        const int j = block / GROUPS % (N + RP + 2), k = block / GROUPS / (N + RP + 2);
        const int c = block % GROUPS * 32 + threadIdx.x % 32, kc = k * C + c;
        const i64 images = (i64)DIRECTIONS * (N + RP + 2) * C;
        const float sum = column_sum(table + (k * (N + RP + 2) + j) * C + c, batch, images, c < C);
        if (threadIdx.x >= 32 || c >= C) return;
        p_t *weight = to, *shift = weight + DIRECTIONS * C * RANK, *rates = shift + DIRECTIONS * C;
        if (j < N) rates[kc * N + j] = from_float<P_TYPE>(sum * A[kc * N + j]);  // of A_log
        else if (j < N + RANK) weight[kc * RANK + j - N] = from_float<P_TYPE>(sum);
        else if (j == N + RP) shift[kc] = from_float<P_TYPE>(sum);
        else if (j == N + RP + 1) rates[DIRECTIONS * C * N + kc] = from_float<P_TYPE>(sum);  // of D
        return;
    }
    block -= TABLE, to += DIRECTIONS * C * (RANK + N + 2);
    if (summed<2 * C, 2 * C>(gate, gates, to, block)) return;
    if (CAST && converted<OUT>(out_proj, to, block)) return;
    if (of_norm<false>(sums, to, block) || laid_back(spatial0, to, block)) return;
    if (of_norm<true>(sums + 2 * H, to, block) || laid_back(spatial1, to, block)) return;
    if (of_norm<true>(sums + 4 * H, to, block)) return;
    if (CAST && converted<POINT>(point, to, block)) return;
    summed<2 * H, H>(bias, biases, to, block);
}
