// Runs the CUDA kernels of medmamba/kernels/cuda on a CPU, one thread of the GPU after the other, for tests.
//
// Every thread of a block is a fiber of its own. One that waits, for its block or for its warp, gives way to the next.
// Blocks run one after the other, so `__shared__` is `static`.
#define EMULATED
// C headers alone: a C++ library would have to be built first.
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define DYNAMIC_SHARED(name) float4* name = (float4*)emulator::dynamic

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline float half_to_float(unsigned short v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
inline unsigned short float_to_half(float f) { _Float16 h = (_Float16)f; unsigned short v; memcpy(&v, &h, 2); return v; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
struct Barrier { int waiting = 0, round = 0; };
constexpr int MOST = 1024;
constexpr size_t STACK = 256 * 1024;
static char* dynamic;
static ucontext_t fibers[MOST];
static bool done[MOST];
static char* stacks[MOST];
static Barrier warps[MOST / 32], block;
static float lanes[MOST];
static ucontext_t scheduler;
static int current;
static void (*body)();

inline void give_way() {
    int mine = current;
    swapcontext(&fibers[mine], &scheduler);
    threadIdx.x = mine;
}

inline void wait(Barrier& barrier, int count) {
    int round = barrier.round;
    if (++barrier.waiting == count) barrier.waiting = 0, barrier.round++;
    else
        for (int spins = 0; barrier.round == round; give_way())
            if (++spins > 1000000) { fprintf(stderr, "deadlock: thread %d waits alone\n", current); abort(); }
}

static void fiber() {
    threadIdx.x = current;
    body();
    done[current] = true;
    swapcontext(&fibers[current], &scheduler);
}

static void run_block(int threads) {
    for (Barrier& warp : warps) warp = {};
    block = {};
    for (int i = 0; i < threads; i++) {
        done[i] = false;
        if (!stacks[i]) stacks[i] = (char*)malloc(STACK);
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i];
        fibers[i].uc_stack.ss_size = STACK;
        fibers[i].uc_link = nullptr;
        makecontext(&fibers[i], fiber, 0);
    }
    for (int left = threads; left;) {
        left = 0;
        for (int i = 0; i < threads; i++)
            if (!done[i]) current = i, threadIdx.x = i, swapcontext(&scheduler, &fibers[i]), left += !done[i];
    }
}

template <int... I> struct Numbers {};
template <int COUNT, int... I> struct Count : Count<COUNT - 1, COUNT - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Numbers<I...> type; };

template <class... A> struct Call {
    static void (*function)(A...);
    static void** arguments;
    template <int... I> static void unpack(Numbers<I...>) { function(*(A*)arguments[I]...); }
    static void go() { unpack(typename Count<sizeof...(A)>::type()); }
};
template <class... A> void (*Call<A...>::function)(A...);
template <class... A> void** Call<A...>::arguments;

template <class... A> void launch(void (*kernel)(A...), void** arguments, int grid, int threads, size_t shared) {
    dynamic = (char*)aligned_alloc(16, (shared + 31) / 16 * 16);
    memset(dynamic, 0xff, shared);  // garbage, as on a GPU
    Call<A...>::function = kernel, Call<A...>::arguments = arguments;
    body = Call<A...>::go;
    blockDim = {threads, 1, 1}, gridDim = {grid, 1, 1};
    for (int i = 0; i < grid; i++) blockIdx = {i, 0, 0}, run_block(threads);
    free(dynamic);
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, blockDim.x); }
inline void __syncwarp() { emulator::wait(emulator::warps[threadIdx.x / 32], min(32, blockDim.x - threadIdx.x / 32 * 32)); }
inline float shuffle(float v, int from) {
    emulator::lanes[threadIdx.x] = v;
    __syncwarp();
    float other = emulator::lanes[threadIdx.x / 32 * 32 + from];
    __syncwarp();
    return other;
}
inline float __shfl_xor_sync(unsigned, float v, int mask) { return shuffle(v, threadIdx.x % 32 ^ mask); }
inline float __shfl_sync(unsigned, float v, int from) { return shuffle(v, from % 32); }
inline float __shfl_up_sync(unsigned, float v, int by) {
    int lane = threadIdx.x % 32;
    return shuffle(v, lane < by ? lane : lane - by);
}
inline float __shfl_down_sync(unsigned, float v, int by) {
    int lane = threadIdx.x % 32;
    return shuffle(v, lane + by > 31 ? lane : lane + by);
}
