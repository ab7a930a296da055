// The grouped scan over sequences, tokens contiguous in memory. A task covers some channel blocks of one group of one
// sequence (backward: of several sequences). A block never spans two groups.
#pragma once
#include "plan.h"

typedef struct {
    const Scan1d *a;
    ptrdiff_t width, stride, chunks, blocks, splits, slots;  // width: channels of a group. blocks, splits: of a group
    float *proj_parts, *parts;  // backward: partial sums of dBs and dCs by split, of dA, dD, ddelta_bias by slot
} Plan1d;

static Plan1d plan_1d(const Scan1d *a) {
    Plan1d p = {.a = a, .width = a->C / a->G, .stride = ceil_div(a->N, V) * V, .chunks = ceil_div(a->L, CHUNK)};
    p.blocks = ceil_div(p.width, V);
    return p;
}

// The channel blocks of task i: `batch` is the sequence or slot, c the first channel of a block.
typedef struct {
    ptrdiff_t batch, group, split, first, count;
} Task1d;
static Task1d task_1d(const Plan1d *p, ptrdiff_t i) {
    Task1d t = {.split = i % p->splits, .group = i / p->splits % p->a->G, .batch = i / p->splits / p->a->G};
    t.first = t.split * p->blocks / p->splits;
    t.count = (t.split + 1) * p->blocks / p->splits - t.first;
    return t;
}
static ptrdiff_t lanes_1d(const Plan1d *p, const Task1d *t, ptrdiff_t j) { return p->width - (t->first + j) * V; }
static ptrdiff_t channel_1d(const Plan1d *p, const Task1d *t, ptrdiff_t j) {
    return t->group * p->width + (t->first + j) * V;
}

typedef struct {
    vf *A2, *h, *dA, bias, D, dbias, dD;
} Block1d;

typedef struct {
    Block1d *blocks;
    vf *x, *dt, *u, *y;                          // [CHUNK]
    float *Bs, *Cs;                              // [CHUNK][stride]
    vf *states;                                  // backward: [count][chunks][N]
    vf *dy, *slope, *dinput, *dexponent, *rows;  // [CHUNK]
    vf *before, *decay;                          // [CHUNK + 1][N], [CHUNK][N]
    float *dBs, *dCs;                            // [CHUNK][stride]
} Memory1d;

static Memory1d take_1d(Scratch *s, const Plan1d *p, ptrdiff_t count, int backward) {
    ptrdiff_t N = p->a->N;
    size_t rows = (size_t)(CHUNK * p->stride) * sizeof(float);
    Memory1d m = {0};
    m.blocks = take(s, (size_t)count * sizeof *m.blocks);
    for (ptrdiff_t j = 0; j < count; j++) {
        vf *A2 = take_vectors(s, N), *h = take_vectors(s, N), *dA = take_vectors(s, backward ? N : 0);
        if (s->base) m.blocks[j] = (Block1d){.A2 = A2, .h = h, .dA = dA};
    }
    m.x = take_vectors(s, CHUNK);
    m.dt = take_vectors(s, CHUNK);
    m.u = take_vectors(s, CHUNK);
    m.y = take_vectors(s, CHUNK);
    m.rows = take_vectors(s, CHUNK);
    m.Bs = take(s, rows);
    m.Cs = take(s, rows);
    if (backward) {
        m.states = take_vectors(s, count * p->chunks * N);
        m.dy = take_vectors(s, CHUNK);
        m.slope = take_vectors(s, CHUNK);
        m.dinput = take_vectors(s, CHUNK);
        m.dexponent = take_vectors(s, CHUNK);
        m.before = take_vectors(s, (CHUNK + 1) * N);
        m.decay = take_vectors(s, CHUNK * N);
        m.dBs = take(s, rows);
        m.dCs = take(s, rows);
    }
    return m;
}

static void load_blocks_1d(Memory1d *m, const Plan1d *p, const Task1d *t, int backward) {
    const Scan1d *a = p->a;
    for (ptrdiff_t j = 0; j < t->count; j++) {
        Block1d *block = &m->blocks[j];
        ptrdiff_t c = channel_1d(p, t, j), lanes = lanes_1d(p, t, j);
        load_transposed(block->A2, a->A, FLOAT32, c * a->N, a->N, lanes, a->N);
        for (ptrdiff_t n = 0; n < a->N; n++) {
            block->A2[n] *= LOG2E;
            if (backward) block->dA[n] = (vf){0};
        }
        block->bias = load_some(a->delta_bias, FLOAT32, c, lanes);
        block->D = load_some(a->D, FLOAT32, c, lanes);
        block->dbias = block->dD = (vf){0};
    }
}

// Copies tokens first ... first + T of Bs or Cs to rows of floats.
static void load_rows(Memory1d *m, float *rows, const Plan1d *p, const void *from, ptrdiff_t b, ptrdiff_t group,
                      ptrdiff_t first, int T) {
    const Scan1d *a = p->a;
    for (ptrdiff_t n = 0; n < a->N; n += V) {
        ptrdiff_t at = ((b * a->G + group) * a->N + n) * a->L + first;
        load_transposed(m->rows, from, a->proj_type, at, a->L, a->N - n, T);
        for (int t = 0; t < T; t++) store(rows + t * p->stride + n, m->rows[t]);
    }
}

static void store_rows(Memory1d *m, const float *rows, const Plan1d *p, void *to, int64_t type, ptrdiff_t b,
                       ptrdiff_t group, ptrdiff_t first, int T) {
    const Scan1d *a = p->a;
    for (ptrdiff_t n = 0; n < a->N; n += V) {
        ptrdiff_t at = ((b * a->G + group) * a->N + n) * a->L + first;
        for (int t = 0; t < T; t++) m->rows[t] = load(rows + t * p->stride + n);
        store_transposed(m->rows, to, type, at, a->L, a->N - n, T);
    }
}

// Computes x, dt and u = dt x for one chunk of a block; also the derivative of dt if `slope` is not NULL.
static void load_inputs(Memory1d *m, const Plan1d *p, const Block1d *block, ptrdiff_t at, ptrdiff_t lanes, int T,
                        vf *slope) {
    const Scan1d *a = p->a;
    load_transposed(m->x, a->u, a->u_type, at, a->L, lanes, T);
    load_transposed(m->dt, a->delta, a->delta_type, at, a->L, lanes, T);
    for (int t = 0; t < T; t++) {
        vf dt = m->dt[t] + block->bias;
        if (slope) slope[t] = splat(1.f);
        m->dt[t] = a->softplus ? softplus(dt, slope ? slope + t : NULL) : dt;
        m->u[t] = m->dt[t] * m->x[t];
    }
}

// Runs sequence b forward. With `states`, stores the state before each chunk; otherwise writes y and the last state.
static void forward_1d_sequence(Memory1d *m, const Plan1d *p, const Task1d *task, ptrdiff_t b, vf *states) {
    const Scan1d *a = p->a;
    ptrdiff_t N = a->N;
    for (ptrdiff_t j = 0; j < task->count; j++)
        for (ptrdiff_t n = 0; n < N; n++) m->blocks[j].h[n] = (vf){0};
    for (ptrdiff_t q = 0; q < p->chunks; q++) {
        ptrdiff_t first = q * CHUNK;
        int T = (int)at_most(CHUNK, a->L - first);
        load_rows(m, m->Bs, p, a->Bs, b, task->group, first, T);
        load_rows(m, m->Cs, p, a->Cs, b, task->group, first, T);
        for (ptrdiff_t j = 0; j < task->count; j++) {
            Block1d *block = &m->blocks[j];
            ptrdiff_t at = (b * a->C + channel_1d(p, task, j)) * a->L + first, lanes = lanes_1d(p, task, j);
            if (states) memcpy(states + (j * p->chunks + q) * N, block->h, (size_t)N * sizeof(vf));
            load_inputs(m, p, block, at, lanes, T, NULL);
            for (int t = 0; t < T; t++) m->y[t] = m->x[t] * block->D;
            forward_chunk(block->A2, block->h, m->Bs, m->Cs, p->stride, m->dt, m->u, m->y, T, (int)N);
            if (!states) store_transposed(m->y, a->y, a->u_type, at, a->L, lanes, T);
        }
    }
    for (ptrdiff_t j = 0; !states && j < task->count; j++) {
        ptrdiff_t at = (b * a->C + channel_1d(p, task, j)) * N;
        store_transposed(m->blocks[j].h, a->last_state, FLOAT32, at, N, lanes_1d(p, task, j), N);
    }
}

static void forward_1d_task(const void *context, void *scratch, ptrdiff_t i) {
    const Plan1d *p = context;
    Task1d task = task_1d(p, i);
    Memory1d m = take_1d(&(Scratch){scratch, 0}, p, task.count, 0);
    unsigned mode = flush_denormals();
    load_blocks_1d(&m, p, &task, 0);
    forward_1d_sequence(&m, p, &task, task.batch, NULL);
    restore_denormals(mode);
}

static int scan_1d_forward(const Scan1d *a) {
    Plan1d p = plan_1d(a);
    p.splits = split_work(a->B * a->G, p.blocks, 1, a->threads).groups;
    Scratch size = {0};
    take_1d(&size, &p, ceil_div(p.blocks, p.splits), 0);
    return pool_run(forward_1d_task, &p, a->B * a->G * p.splits, a->threads, size.used);
}

static void backward_1d_sequence(Memory1d *m, const Plan1d *p, const Task1d *task, ptrdiff_t b) {
    const Scan1d *a = p->a;
    ptrdiff_t N = a->N, proj_size = a->B * a->G * N * a->L;
    forward_1d_sequence(m, p, task, b, m->states);
    for (ptrdiff_t j = 0; j < task->count; j++)
        for (ptrdiff_t n = 0; n < N; n++) m->blocks[j].h[n] = (vf){0};  // from here on, the gradient of the state
    for (ptrdiff_t q = p->chunks - 1; q >= 0; q--) {
        ptrdiff_t first = q * CHUNK;
        int T = (int)at_most(CHUNK, a->L - first);
        load_rows(m, m->Bs, p, a->Bs, b, task->group, first, T);
        load_rows(m, m->Cs, p, a->Cs, b, task->group, first, T);
        memset(m->dBs, 0, (size_t)(T * p->stride) * sizeof(float));
        memset(m->dCs, 0, (size_t)(T * p->stride) * sizeof(float));
        for (ptrdiff_t j = 0; j < task->count; j++) {
            Block1d *block = &m->blocks[j];
            ptrdiff_t at = (b * a->C + channel_1d(p, task, j)) * a->L + first, lanes = lanes_1d(p, task, j);
            load_inputs(m, p, block, at, lanes, T, m->slope);
            load_transposed(m->dy, a->dy, a->u_type, at, a->L, lanes, T);
            for (int t = 0; t < T; t++) m->dinput[t] = m->dexponent[t] = (vf){0};
            memcpy(m->before, m->states + (j * p->chunks + q) * N, (size_t)N * sizeof(vf));
            replay_chunk(block->A2, m->Bs, p->stride, m->dt, m->u, m->before, m->decay, T, (int)N);
            backward_chunk(
                block->A2, block->h, m->Bs, m->Cs, p->stride, m->dt, m->u, m->dy, m->before, m->decay, m->dinput,
                m->dexponent, block->dA, m->dBs, m->dCs, p->stride, T, (int)N);
            vf dbias = {0}, dD = {0};  // nested sums have far less rounding error than one long sum
            for (int t = 0; t < T; t++) {
                vf ddelta = (m->x[t] * m->dinput[t] + m->dexponent[t] * LN2) * m->slope[t];
                dbias += ddelta;
                dD += m->dy[t] * m->x[t];
                m->y[t] = m->dt[t] * m->dinput[t] + m->dy[t] * block->D;
                m->dexponent[t] = ddelta;
            }
            block->dbias += dbias;
            block->dD += dD;
            store_transposed(m->y, a->du, a->u_type, at, a->L, lanes, T);
            store_transposed(m->dexponent, a->ddelta, a->delta_type, at, a->L, lanes, T);
        }
        if (p->splits == 1) {
            store_rows(m, m->dBs, p, a->dBs, a->proj_type, b, task->group, first, T);
            store_rows(m, m->dCs, p, a->dCs, a->proj_type, b, task->group, first, T);
        } else {
            float *part = p->proj_parts + task->split * proj_size;
            store_rows(m, m->dBs, p, part, FLOAT32, b, task->group, first, T);
            store_rows(m, m->dCs, p, part + p->splits * proj_size, FLOAT32, b, task->group, first, T);
        }
    }
}

// The layout of one slot of `parts`: dA, dD, ddelta_bias, in this order.
static ptrdiff_t part_size_1d(const Scan1d *a) { return a->C * (a->N + 2); }

static void backward_1d_task(const void *context, void *scratch, ptrdiff_t i) {
    const Plan1d *p = context;
    const Scan1d *a = p->a;
    Task1d task = task_1d(p, i);
    Memory1d m = take_1d(&(Scratch){scratch, 0}, p, task.count, 1);
    unsigned mode = flush_denormals();
    load_blocks_1d(&m, p, &task, 1);
    for (ptrdiff_t b = task.batch * a->B / p->slots; b < (task.batch + 1) * a->B / p->slots; b++)
        backward_1d_sequence(&m, p, &task, b);
    float *dA = p->parts + task.batch * part_size_1d(a), *dD = dA + a->C * a->N, *dbias = dD + a->C;
    for (ptrdiff_t j = 0; j < task.count; j++) {
        ptrdiff_t c = channel_1d(p, &task, j), lanes = lanes_1d(p, &task, j);
        store_transposed(m.blocks[j].dA, dA, FLOAT32, c * a->N, a->N, lanes, a->N);
        store_some(dD, FLOAT32, c, lanes, m.blocks[j].dD);
        store_some(dbias, FLOAT32, c, lanes, m.blocks[j].dbias);
    }
    restore_denormals(mode);
}

static int scan_1d_backward(const Scan1d *a) {
    Plan1d p = plan_1d(a);
    p.slots = at_most(a->B, 4 * a->threads);
    p.splits = split_work(p.slots * a->G, p.blocks, 1, a->threads).groups;
    ptrdiff_t per_slot = part_size_1d(a), proj_size = a->B * a->G * a->N * a->L;
    Scratch size = {0};
    take_1d(&size, &p, ceil_div(p.blocks, p.splits), 1);
    float *sums = memory_take((size_t)(per_slot * (p.slots + 1)) * sizeof(float));
    p.parts = sums + per_slot;
    p.proj_parts = p.splits > 1 ? memory_take((size_t)(2 * p.splits * proj_size) * sizeof(float)) : NULL;
    int failed = !sums || (p.splits > 1 && !p.proj_parts);
    failed = failed || pool_run(backward_1d_task, &p, p.slots * a->G * p.splits, a->threads, size.used);
    if (p.splits > 1) {
        failed = failed || sum_parts(p.proj_parts, p.splits, proj_size, a->dBs, a->proj_type, a->threads);
        failed = failed || sum_parts(
                               p.proj_parts + p.splits * proj_size, p.splits, proj_size, a->dCs, a->proj_type,
                               a->threads);
    }
    failed = failed || sum_parts(p.parts, p.slots, per_slot, sums, FLOAT32, a->threads);
    if (!failed) {
        size_t C = (size_t)a->C * sizeof(float);
        memcpy(a->dA, sums, C * (size_t)a->N);
        memcpy(a->dD, sums + a->C * a->N, C);
        memcpy(a->ddelta_bias, sums + a->C * (a->N + 1), C);
    }
    memory_give(p.proj_parts);
    memory_give(sums);
    return failed;
}
