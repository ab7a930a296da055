// silu(depthwise 3x3 convolution + bias) in training, forward and backward. Compile-time constants, set by
// ../block/training.py:
//     CHANNELS  C, even
//     WIDTH     pairs of channels per program; THREADS is a multiple of it
//     STRIP     pixels of a row that a thread processes at a time, in each of ROWS rows; conv_backward takes one row
//     OCCUPANCY programs per multiprocessor to compile for
//     PARAMS    whether to compute the gradients of weight and bias
// The left half of x (B, H, W, 2C), C numbers of each pixel, is convolved; weight (C, 3, 3). A thread takes two
// channels of strips of one row. A program takes every n-th group of strips (n programs), so that it reads its weights
// once.

constexpr int C = CHANNELS;
struct alignas(2 * sizeof(x_t)) two_t { x_t x, y; };
constexpr int SUBS = THREADS / WIDTH;  // strips at a time

// The work of a program and of a thread.
struct Work {
    int block, program, programs, pair, sub, c;  // c: the first of two channels
    __device__ __forceinline__ Work(int blocks) {
        block = blockIdx.x % blocks, program = blockIdx.x / blocks, programs = gridDim.x / blocks;
        pair = threadIdx.x % WIDTH, sub = threadIdx.x / WIDTH, c = 2 * (block * WIDTH + pair);
    }
};

// The weights of this thread's channels, in reverse order if FLIP.
template <bool FLIP> __device__ __forceinline__ void read_taps(Pair* taps, const float* weight, const Work& work) {
    __shared__ float shared[18 * WIDTH];  // uncoalesced otherwise: threads would read with a stride of nine
    const int start = 18 * work.block * WIDTH;
    for (int i = threadIdx.x; i < 18 * WIDTH; i += THREADS) shared[i] = start + i < 9 * C ? weight[start + i] : 0.f;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 9; t++) {
        const int from = 18 * work.pair + (FLIP ? 8 - t : t);
        taps[t] = {shared[from], shared[from + 9]};
    }
}

// Where a thread's next strips lie: those of ROWS rows from `top` of image b, from pixel `first` on.
struct Place {
    int b, top, first;
    __device__ __forceinline__ Place(int s, int H, int strips) {
        const unsigned bands = (H + ROWS - 1) / ROWS, above = (unsigned)s / (unsigned)strips;
        b = above / bands, top = (above - b * bands) * ROWS, first = (s - above * strips) * STRIP;
    }
};

// Adds the convolution of an image, whose pixels are STEP apart, to the sums of strips.
template <int STEP> __device__ __forceinline__ void convolve(
    Pair (*sums)[STRIP], const x_t* image, const Pair* taps, const Place& place, int H, int W) {
#pragma unroll
    for (int j = 0; j < ROWS + 2; j++) {
        const int y = place.top + j - 1;
        if (y < 0 || y >= H) continue;
        const x_t* line = image + (i64)(y * W + place.first) * STEP;
#pragma unroll
        for (int i = 0; i < STRIP + 2; i++) {
            Pair v = {0.f, 0.f};
            if ((unsigned)(place.first + i - 1) < (unsigned)W) v = read(line + (i - 1) * STEP);
#pragma unroll
            for (int r = 0; r < ROWS; r++)  // the row and the pixel that use this one
#pragma unroll
                for (int dx = 0; dx < 3; dx++) {
                    const int dy = j - r, to = i - dx;
                    if (dy < 0 || dy > 2 || to < 0 || to >= STRIP) continue;
                    sums[r][to].x += v.x * taps[3 * dy + dx].x, sums[r][to].y += v.y * taps[3 * dy + dx].y;
                }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY) conv_forward(
    const x_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, x_t* __restrict__ out,
    int total, int H, int W, int strips, int blocks) {
    const Work work(blocks);
    Pair taps[9];
    read_taps<false>(taps, weight, work);
    const int c = work.c;
    if (c >= C) return;
    const Pair b = {bias[c], bias[c + 1]};
    for (int s = work.program * SUBS + work.sub; s < total; s += work.programs * SUBS) {
        const Place place(s, H, strips);
        const i64 image = (i64)place.b * H * W;
        Pair sums[ROWS][STRIP];
#pragma unroll
        for (int i = 0; i < ROWS * STRIP; i++) sums[i / STRIP][i % STRIP] = b;
        convolve<2 * C>(sums, x + image * 2 * C + c, taps, place, H, W);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (place.top + r >= H) break;
            x_t* to = out + (image + (place.top + r) * W + place.first) * C + c;
#pragma unroll
            for (int i = 0; i < STRIP; i++)
                if (place.first + i < W) write(to + i * C, {silu(sums[r][i].x), silu(sums[r][i].y)});
        }
    }
}

// Computes from dout: the gradient before silu, dpre (B, H, W, C), and partial sums of the gradients of weight and bias
// per program, (programs, 9C + C).
extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY) conv_backward(
    const x_t* __restrict__ dout, const x_t* __restrict__ x, const float* __restrict__ weight,
    const float* __restrict__ bias, x_t* __restrict__ dpre, float* __restrict__ partials, int total, int H, int W,
    int strips, int blocks) {
    const Work work(blocks);
    Pair taps[9], sums[10];  // of the gradients of the taps and the bias
    read_taps<false>(taps, weight, work);
    const int c = work.c;
    const bool mine = c < C;
    const Pair b = mine ? Pair{bias[c], bias[c + 1]} : Pair{0.f, 0.f};
#pragma unroll
    for (int t = 0; t < 10; t++) sums[t] = {0.f, 0.f};
    for (int s = work.program * SUBS + work.sub; mine && s < total; s += work.programs * SUBS) {
        const Place place(s, H, strips);
        const int first = place.first;
        const i64 pixel = ((i64)place.b * H + place.top) * W + first, at = pixel * C + c;
        Pair seen[3][STRIP + 2], d[STRIP];
#pragma unroll
        for (int i = 0; i < STRIP; i++) d[i] = first + i < W ? read(dout + at + i * C) : Pair{0.f, 0.f};
#pragma unroll
        for (int dy = 0; dy < 3; dy++) {
            const int y = place.top + dy - 1;
            const bool above = y >= 0 && y < H;
            const x_t* line = x + (pixel + (dy - 1) * W) * 2 * C + c;
#pragma unroll
            for (int i = 0; i < STRIP + 2; i++) {
                const bool inside = above && (unsigned)(first + i - 1) < (unsigned)W;
                seen[dy][i] = inside ? read(line + (i - 1) * 2 * C) : Pair{0.f, 0.f};
            }
        }
#pragma unroll
        for (int i = 0; i < STRIP; i++) {
            Pair pre = b;
#pragma unroll
            for (int t = 0; t < 9; t++) {
                const Pair v = seen[t / 3][i + t % 3];
                pre.x += v.x * taps[t].x, pre.y += v.y * taps[t].y;
            }
            const float p = sigmoid(pre.x), q = sigmoid(pre.y);
            d[i].x *= p * (1.f + pre.x * (1.f - p)), d[i].y *= q * (1.f + pre.y * (1.f - q));
            if (first + i < W) write(dpre + at + i * C, d[i]);
            if (!PARAMS) continue;
#pragma unroll
            for (int t = 0; t < 9; t++) {
                const Pair v = seen[t / 3][i + t % 3];
                sums[t].x += d[i].x * v.x, sums[t].y += d[i].y * v.y;
            }
            sums[9].x += d[i].x, sums[9].y += d[i].y;
        }
    }
    if (!PARAMS) return;
    __shared__ Pair shared[THREADS];
    partials += (i64)work.program * 10 * C;
#pragma unroll
    for (int t = 0; t < 10; t++) {
        __syncthreads();
        shared[threadIdx.x] = sums[t];
        __syncthreads();
        if (work.sub || !mine) continue;
        Pair sum = shared[work.pair];
        for (int i = 1; i < SUBS; i++) {
            const Pair other = shared[i * WIDTH + work.pair];
            sum.x += other.x, sum.y += other.y;
        }
        const int to = t < 9 ? 9 * c + t : 9 * C + c;
        partials[to] = sum.x, partials[to + (t < 9 ? 9 : 1)] = sum.y;
    }
}

// dx (B, H, W, 2C): its left half from dpre; its right half, which bypasses the convolution, from dgate.
extern "C" __global__ void __launch_bounds__(THREADS, OCCUPANCY) conv_input(
    const x_t* __restrict__ dpre, const x_t* __restrict__ dgate, const float* __restrict__ weight,
    x_t* __restrict__ dx, int total, int H, int W, int strips, int blocks) {
    const Work work(blocks);
    Pair taps[9];
    read_taps<true>(taps, weight, work);
    const int c = work.c;
    if (c >= C) return;
    for (int s = work.program * SUBS + work.sub; s < total; s += work.programs * SUBS) {
        const Place place(s, H, strips);
        const i64 image = (i64)place.b * H * W, pixel = image + place.top * W + place.first;
        x_t* to = dx + pixel * 2 * C + c;
        const x_t* from = dgate + pixel * C + c;
        Pair sums[ROWS][STRIP];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool below = place.top + r < H;
#pragma unroll
            for (int i = 0; i < STRIP; i++) {
                sums[r][i] = {0.f, 0.f};
                if (below && place.first + i < W)
                    *(two_t*)(to + (i64)r * W * 2 * C + i * 2 * C + C) = *(const two_t*)(from + (i64)r * W * C + i * C);
            }
        }
        convolve<C>(sums, dpre + image * C + c, taps, place, H, W);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (place.top + r >= H) break;
#pragma unroll
            for (int i = 0; i < STRIP; i++)
                if (place.first + i < W) write(to + (i64)r * W * 2 * C + i * 2 * C, sums[r][i]);
        }
    }
}
