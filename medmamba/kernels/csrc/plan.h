// Partitions the work into tasks; small helpers shared by both scans.
#pragma once
#include <stdlib.h>

#include "chunk.h"
#include "pool.h"

INLINE ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
INLINE ptrdiff_t at_most(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

// A task covers one group of the channel blocks of one image (or slot of images), in one part of the directions.
typedef struct {
    ptrdiff_t groups, parts;
} Split;

// Returns the smallest number of tasks with which the threads finish earliest. Fewer groups are cheaper, because each
// group reads the projections of all tokens; more parts write more partial sums, which have to be added up.
static Split split_work(ptrdiff_t batch, ptrdiff_t blocks, ptrdiff_t directions, ptrdiff_t threads) {
    Split best = {1, 1};
    ptrdiff_t shortest = PTRDIFF_MAX;
    for (ptrdiff_t parts = 1; parts <= directions; parts *= 2) {
        for (ptrdiff_t groups = 1; groups <= blocks; groups++) {
            ptrdiff_t rounds = ceil_div(batch * groups * parts, threads);
            ptrdiff_t length = rounds * ceil_div(blocks, groups) * (directions / parts);
            if (length < shortest) {
                shortest = length;
                best = (Split){groups, parts};
            }
        }
    }
    return best;
}

// Allocates from a task's scratch memory; if base is NULL, only counts the bytes.
typedef struct {
    char *base;
    size_t used;
} Scratch;
INLINE void *take(Scratch *s, size_t bytes) {
    void *p = s->base ? s->base + s->used : NULL;
    s->used += (bytes + 63) / 64 * 64;
    return p;
}
INLINE vf *take_vectors(Scratch *s, ptrdiff_t count) { return take(s, (size_t)count * sizeof(vf)); }

// Flushes denormals to zero: each costs about a hundred cycles, and they contribute nothing noticeable.
#if defined(__SSE2__)
#include <xmmintrin.h>
INLINE unsigned flush_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) { (void)before; }
#endif

// out[i] = sum over parts p of in[p * count + i], in a fixed order, so results are reproducible from run to run.
typedef struct {
    const float *in;
    void *out;
    int64_t type;
    ptrdiff_t parts, count;
} Sum;
enum { SUM_PIECE = 1 << 14 };
static void sum_task(const void *context, void *scratch, ptrdiff_t piece) {
    (void)scratch;
    const Sum *s = context;
    ptrdiff_t end = at_most((piece + 1) * SUM_PIECE, s->count);
    for (ptrdiff_t i = piece * SUM_PIECE; i < end; i += V) {
        vf v = {0};
        for (ptrdiff_t p = 0; p < s->parts; p++) v += load_some(s->in + p * s->count, FLOAT32, i, end - i);
        store_some(s->out, s->type, i, end - i, v);
    }
}
static int sum_parts(const float *in, ptrdiff_t parts, ptrdiff_t count, void *out, int64_t type, ptrdiff_t threads) {
    Sum s = {in, out, type, parts, count};
    return pool_run(sum_task, &s, ceil_div(count, SUM_PIECE), threads, 0);
}
