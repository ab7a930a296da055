// The four-direction scan. A task covers some channel blocks of one image (backward: of several images) and all
// directions, or only some of them if there would be too few tasks. It copies its channels of x once and accumulates y
// in a buffer of its own; a direction is an order in which these buffers are read.
#pragma once
#include "plan.h"

// The pixel indices of tokens first, first + 1, ... in direction k: row-major, column-major, and both reversed.
static void token_pixels(int k, ptrdiff_t H, ptrdiff_t W, ptrdiff_t first, int T, int32_t *pixels) {
    for (int t = 0; t < T; t++) {
        ptrdiff_t token = k < 2 ? first + t : H * W - 1 - first - t;
        pixels[t] = (int32_t)(k % 2 ? token % H * W + token / H : token);
    }
}

typedef struct {
    const Scan2d *a;
    ptrdiff_t L, S, stride, chunks, blocks, slots;
    Split split;
    float *sums_by_part;    // of y or dx
    float *dproj_by_group;  // backward
    float *grads_by_slot;   // backward: of all parameters
} Plan2d;

typedef struct {
    ptrdiff_t image, group, part, first, count;  // image or slot; first channel block and number of blocks
} Task2d;

static Task2d task_2d(const Plan2d *p, ptrdiff_t i) {
    ptrdiff_t groups = p->split.groups, parts = p->split.parts;
    Task2d t = {.image = i / parts / groups, .group = i / parts % groups, .part = i % parts};
    t.first = t.group * p->blocks / groups;
    t.count = (t.group + 1) * p->blocks / groups - t.first;
    return t;
}

// Writes channels c ... of y or dx for image b, or the share of this part.
static void store_sum(const Plan2d *p, ptrdiff_t part, void *out, ptrdiff_t b, ptrdiff_t c, const vf *sum) {
    ptrdiff_t C = p->a->C, size = p->a->B * p->L * C, whole = p->split.parts == 1;
    void *to = whole ? out : p->sums_by_part + part * size;
    for (ptrdiff_t l = 0; l < p->L; l++)
        store_some(to, whole ? p->a->x_type : FLOAT32, (b * p->L + l) * C + c, C - c, sum[l]);
}

static Plan2d plan_2d(const Scan2d *a) {
    Plan2d p = {.a = a, .L = a->H * a->W, .S = a->R + 2 * a->N, .blocks = ceil_div(a->C, V)};
    p.stride = ceil_div(p.S, V) * V;
    p.chunks = ceil_div(p.L, CHUNK);
    return p;
}

// The parameters of one direction for one channel block.
typedef struct {
    vf *weight, *A2, *h, bias, D;
} Block2d;

static void load_block(Block2d *block, const Scan2d *a, int k, ptrdiff_t c) {
    ptrdiff_t row = k * a->C + c, lanes = a->C - c;
    load_transposed(block->weight, a->dt_weight, FLOAT32, row * a->R, a->R, lanes, a->R);
    load_transposed(block->A2, a->A, FLOAT32, row * a->N, a->N, lanes, a->N);
    for (ptrdiff_t n = 0; n < a->N; n++) {
        block->A2[n] *= LOG2E;
        block->h[n] = (vf){0};
    }
    block->bias = load_some(a->dt_bias, FLOAT32, row, lanes);
    block->D = load_some(a->D, FLOAT32, row, lanes);
}

static Block2d *take_blocks(Scratch *s, const Scan2d *a, ptrdiff_t count) {
    Block2d *blocks = take(s, (size_t)count * sizeof *blocks);
    for (ptrdiff_t j = 0; j < count; j++) {
        vf *weight = take_vectors(s, a->R), *A2 = take_vectors(s, a->N), *h = take_vectors(s, a->N);
        if (s->base) blocks[j] = (Block2d){.weight = weight, .A2 = A2, .h = h};
    }
    return blocks;
}

// Copies the projections of the tokens in direction k to rows of floats.
static void load_proj(float *P, const Plan2d *p, ptrdiff_t b, int k, const int32_t *pixels, int T) {
    ptrdiff_t end = p->a->B * p->L * 4 * p->S;
    for (int t = 0; t < T; t++) {
        ptrdiff_t first = ((b * p->L + pixels[t]) * 4 + k) * p->S;
        // The last vector of a row may hold the start of the next one.
        for (ptrdiff_t i = 0; i < p->S; i += V)
            store(P + t * p->stride + i, load_some(p->a->proj, p->a->proj_type, first + i, end - first - i));
    }
}

static vf skip_sum(const Scan2d *a, ptrdiff_t c) {
    vf sum = {0};
    for (int k = 0; k < 4; k++) sum += load_some(a->D, FLOAT32, k * a->C + c, a->C - c);
    return sum;
}

// --- forward --------------------------------------------------------------------------------------------------------

typedef struct {
    vf *x, *y;  // [count][L]
    Block2d *blocks;
    vf *dt, *u, *y_chunk;  // [CHUNK]
    float *P;
    int32_t *pixels;
} Forward2d;

static Forward2d take_forward_2d(Scratch *s, const Plan2d *p, ptrdiff_t count) {
    return (Forward2d){
        .x = take_vectors(s, count * p->L),
        .y = take_vectors(s, count * p->L),
        .blocks = take_blocks(s, p->a, count),
        .dt = take_vectors(s, CHUNK),
        .u = take_vectors(s, CHUNK),
        .y_chunk = take_vectors(s, CHUNK),
        .P = take(s, (size_t)(CHUNK * p->stride) * sizeof(float)),
        .pixels = take(s, CHUNK * sizeof(int32_t)),
    };
}

static void forward_2d_task(const void *context, void *scratch, ptrdiff_t i) {
    const Plan2d *p = context;
    const Scan2d *a = p->a;
    Task2d task = task_2d(p, i);
    ptrdiff_t b = task.image, first = task.first, count = task.count, L = p->L;
    Forward2d m = take_forward_2d(&(Scratch){scratch, 0}, p, count);
    unsigned mode = flush_denormals();
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        vf skip = task.part ? (vf){0} : skip_sum(a, c);
        for (ptrdiff_t l = 0; l < L; l++) {
            vf x = load_some(a->x, a->x_type, (b * L + l) * a->C + c, a->C - c);
            m.x[j * L + l] = x;
            m.y[j * L + l] = x * skip;
        }
    }
    for (int k = (int)task.part; k < 4; k += (int)p->split.parts) {
        for (ptrdiff_t j = 0; j < count; j++) load_block(&m.blocks[j], a, k, (first + j) * V);
        for (ptrdiff_t q = 0; q < p->chunks; q++) {
            int T = (int)at_most(CHUNK, L - q * CHUNK);
            token_pixels(k, a->H, a->W, q * CHUNK, T, m.pixels);
            load_proj(m.P, p, b, k, m.pixels, T);
            for (ptrdiff_t j = 0; j < count; j++) {
                Block2d *block = &m.blocks[j];
                ptrdiff_t c = (first + j) * V;
                const vf *x = m.x + j * L;
                vf *y = m.y + j * L;
                for (ptrdiff_t n = 0; a->states && n < a->N; n++)
                    store_some(
                        a->states, FLOAT32, (((b * 4 + k) * p->chunks + q) * a->N + n) * a->C + c, a->C - c,
                        block->h[n]);
                project_steps(m.dt, m.P, p->stride, block->weight, block->bias, T, (int)a->R);
                for (int t = 0; t < T; t++) {
                    m.dt[t] = softplus(m.dt[t], NULL);
                    m.u[t] = m.dt[t] * x[m.pixels[t]];
                    m.y_chunk[t] = y[m.pixels[t]];
                }
                forward_chunk(
                    block->A2, block->h, m.P + a->R, m.P + a->R + a->N, p->stride, m.dt, m.u, m.y_chunk, T, (int)a->N);
                for (int t = 0; t < T; t++) y[m.pixels[t]] = m.y_chunk[t];
            }
        }
    }
    for (ptrdiff_t j = 0; j < count; j++) store_sum(p, task.part, a->y, b, (first + j) * V, m.y + j * L);
    restore_denormals(mode);
}

static int scan_2d_forward(const Scan2d *a) {
    Plan2d p = plan_2d(a);
    p.split = split_work(a->B, p.blocks, 4, a->threads);
    ptrdiff_t parts = p.split.parts, y_size = a->B * p.L * a->C;
    Scratch size = {0};
    take_forward_2d(&size, &p, ceil_div(p.blocks, p.split.groups));
    if (parts > 1 && !(p.sums_by_part = memory_take((size_t)(parts * y_size) * sizeof(float)))) return 1;
    int failed = pool_run(forward_2d_task, &p, a->B * p.split.groups * parts, a->threads, size.used);
    if (parts > 1) failed = failed || sum_parts(p.sums_by_part, parts, y_size, a->y, a->x_type, a->threads);
    memory_give(p.sums_by_part);
    return failed;
}
