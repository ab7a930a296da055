// The gradients of the four-direction scan. Chunk by chunk, from the last token to the first, a task recomputes the
// states of the chunk from the one that the forward pass saved before it, then propagates gradients back through them.
#pragma once
#include "scan_2d.h"

// The gradients of a block's parameters, summed over tokens and images.
typedef struct {
    vf *dweight, *dA, dbias;
} Grads2d;

typedef struct {
    vf *x, *dy, *dx;  // [count][L]
    Block2d *blocks;  // here h is the gradient of the state
    Grads2d *grads;   // [4][count]
    vf *dD;           // [count]
    vf *x_chunk, *dy_chunk, *dt, *u, *slope, *dinput, *dexponent;  // [CHUNK]
    vf *before, *decay;                                            // [CHUNK + 1][N], [CHUNK][N]
    vf *dcode;  // [R][CHUNK / V]: lane = token
    float *P, *dP;
    int32_t *pixels;
} Backward2d;

static Backward2d take_backward_2d(Scratch *s, const Plan2d *p, ptrdiff_t count) {
    const Scan2d *a = p->a;
    Backward2d m = {
        .x = take_vectors(s, count * p->L),
        .dy = take_vectors(s, count * p->L),
        .dx = take_vectors(s, count * p->L),
        .blocks = take_blocks(s, a, count),
        .grads = take(s, 4 * (size_t)count * sizeof(Grads2d)),
        .dD = take_vectors(s, count),
        .x_chunk = take_vectors(s, CHUNK),
        .dy_chunk = take_vectors(s, CHUNK),
        .dt = take_vectors(s, CHUNK),
        .u = take_vectors(s, CHUNK),
        .slope = take_vectors(s, CHUNK),
        .dinput = take_vectors(s, CHUNK),
        .dexponent = take_vectors(s, CHUNK),
        .before = take_vectors(s, (CHUNK + 1) * a->N),
        .decay = take_vectors(s, CHUNK * a->N),
        .dcode = take_vectors(s, a->R * (CHUNK / V)),
        .P = take(s, (size_t)(CHUNK * p->stride) * sizeof(float)),
        .dP = take(s, (size_t)(CHUNK * p->stride) * sizeof(float)),
        .pixels = take(s, CHUNK * sizeof(int32_t)),
    };
    for (ptrdiff_t j = 0; j < 4 * count; j++) {
        vf *dweight = take_vectors(s, a->R), *dA = take_vectors(s, a->N);
        if (!s->base) continue;
        m.grads[j] = (Grads2d){.dweight = dweight, .dA = dA};
        for (ptrdiff_t r = 0; r < a->R; r++) dweight[r] = (vf){0};
        for (ptrdiff_t n = 0; n < a->N; n++) dA[n] = (vf){0};
    }
    for (ptrdiff_t j = 0; s->base && j < count; j++) m.dD[j] = (vf){0};
    return m;
}

// Processes `count` columns, from r on, of the projection from code to step size. Each addition waits for the previous
// one, so several sums are accumulated in parallel; `count` is constant after inlining.
INLINE void project_backward_columns(
    int count, Backward2d *m, const Plan2d *p, const vf *dpre, const vf *by_token, Grads2d *grads, const float *weight,
    ptrdiff_t lanes, ptrdiff_t r, int T) {
    ptrdiff_t R = p->a->R;
    vf sum[4];
    UNROLL for (int i = 0; i < count; i++) sum[i] = (vf){0};
    for (int t = 0; t < T; t++)
        UNROLL for (int i = 0; i < count; i++) sum[i] += dpre[t] * m->P[t * p->stride + r + i];
    // Nested sums have far less rounding error than one long sum.
    UNROLL for (int i = 0; i < count; i++) grads->dweight[r + i] += sum[i];
    for (int tile = 0; tile * V < T; tile++) {
        UNROLL for (int i = 0; i < count; i++) sum[i] = m->dcode[(r + i) * (CHUNK / V) + tile];
        for (ptrdiff_t c = 0; c < lanes; c++)
            UNROLL for (int i = 0; i < count; i++) sum[i] += by_token[tile * V + c] * weight[c * R + r + i];
        UNROLL for (int i = 0; i < count; i++) m->dcode[(r + i) * (CHUNK / V) + tile] = sum[i];
    }
}

// Computes the gradients of code, weight and bias from dpre [T], that of a block's step sizes before the softplus.
static void project_backward(
    Backward2d *m, const Plan2d *p, const vf *dpre, Grads2d *grads, const float *weight, ptrdiff_t lanes, int T) {
    vf dbias = {0}, by_token[CHUNK];  // [tile of V tokens][channel]: lane = token
    for (int t = 0; t < T; t++) dbias += dpre[t];
    grads->dbias += dbias;
    for (int tile = 0; tile < T; tile += V) {
        for (int i = 0; i < V; i++) by_token[tile + i] = tile + i < T ? dpre[tile + i] : (vf){0};
        transpose(by_token + tile);
    }
    ptrdiff_t r = 0, R = p->a->R;
    lanes = at_most(lanes, V);
    for (; r + 4 <= R; r += 4) project_backward_columns(4, m, p, dpre, by_token, grads, weight, lanes, r, T);
    if (R - r == 3) project_backward_columns(3, m, p, dpre, by_token, grads, weight, lanes, r, T);
    if (R - r == 2) project_backward_columns(2, m, p, dpre, by_token, grads, weight, lanes, r, T);
    if (R - r == 1) project_backward_columns(1, m, p, dpre, by_token, grads, weight, lanes, r, T);
}

static void backward_2d_image(Backward2d *m, const Plan2d *p, ptrdiff_t b, const Task2d *task) {
    const Scan2d *a = p->a;
    ptrdiff_t L = p->L, N = a->N, R = a->R, first = task->first, count = task->count;
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        vf skip = task->part ? (vf){0} : skip_sum(a, c), dD = {0};
        for (ptrdiff_t l = 0; l < L; l++) {
            ptrdiff_t i = (b * L + l) * a->C + c;
            vf x = load_some(a->x, a->x_type, i, a->C - c), dy = load_some(a->dy, a->x_type, i, a->C - c);
            m->x[j * L + l] = x;
            m->dy[j * L + l] = dy;
            m->dx[j * L + l] = dy * skip;
            dD += dy * x;
            if (l % CHUNK == CHUNK - 1 || l == L - 1) {
                m->dD[j] += dD;
                dD = (vf){0};
            }
        }
    }
    for (int k = (int)task->part; k < 4; k += (int)p->split.parts) {
        for (ptrdiff_t j = 0; j < count; j++) load_block(&m->blocks[j], a, k, (first + j) * V);
        for (ptrdiff_t q = p->chunks - 1; q >= 0; q--) {
            int T = (int)at_most(CHUNK, L - q * CHUNK);
            token_pixels(k, a->H, a->W, q * CHUNK, T, m->pixels);
            load_proj(m->P, p, b, k, m->pixels, T);
            memset(m->dP, 0, (size_t)(T * p->stride) * sizeof(float));
            memset(m->dcode, 0, (size_t)(R * (CHUNK / V)) * sizeof(vf));
            for (ptrdiff_t j = 0; j < count; j++) {
                Block2d *block = &m->blocks[j];
                Grads2d *grads = &m->grads[k * count + j];
                ptrdiff_t c = (first + j) * V;
                vf *dx = m->dx + j * L;
                project_steps(m->dt, m->P, p->stride, block->weight, block->bias, T, (int)R);
                for (int t = 0; t < T; t++) {
                    m->x_chunk[t] = m->x[j * L + m->pixels[t]];
                    m->dy_chunk[t] = m->dy[j * L + m->pixels[t]];
                    m->dt[t] = softplus(m->dt[t], &m->slope[t]);
                    m->u[t] = m->dt[t] * m->x_chunk[t];
                    m->dinput[t] = m->dexponent[t] = (vf){0};
                }
                for (ptrdiff_t n = 0; n < N; n++)
                    m->before[n] = load_some(
                        a->states, FLOAT32, (((b * 4 + k) * p->chunks + q) * N + n) * a->C + c, a->C - c);
                replay_chunk(block->A2, m->P + R, p->stride, m->dt, m->u, m->before, m->decay, T, (int)N);
                backward_chunk(
                    block->A2, block->h, m->P + R, m->P + R + N, p->stride, m->dt, m->u, m->dy_chunk, m->before,
                    m->decay, m->dinput, m->dexponent, grads->dA, m->dP + R, m->dP + R + N, p->stride, T, (int)N);
                for (int t = 0; t < T; t++) {
                    dx[m->pixels[t]] += m->dt[t] * m->dinput[t];
                    m->dexponent[t] = (m->x_chunk[t] * m->dinput[t] + m->dexponent[t] * LN2) * m->slope[t];
                }
                project_backward(
                    m, p, m->dexponent, grads, a->dt_weight + (k * a->C + c) * R, a->C - c, T);
            }
            for (int t = 0; t < T; t++) {
                float *row = m->dP + t * p->stride;
                for (ptrdiff_t r = 0; r < R; r++) row[r] = m->dcode[r * (CHUNK / V) + t / V][t % V];
                ptrdiff_t to = ((b * L + m->pixels[t]) * 4 + k) * p->S;
                for (ptrdiff_t i = 0; i < p->S; i += V) {
                    if (p->split.groups == 1)
                        store_some(a->dproj, a->proj_type, to + i, p->S - i, load(row + i));
                    else
                        store_some(
                            p->dproj_by_group + task->group * a->B * L * 4 * p->S, FLOAT32, to + i, p->S - i,
                            load(row + i));
                }
            }
        }
    }
    for (ptrdiff_t j = 0; j < count; j++) store_sum(p, task->part, a->dx, b, (first + j) * V, m->dx + j * L);
}

// The layout of one slot of `grads_by_slot`: dA, ddt_weight, ddt_bias, dD, in this order.
static ptrdiff_t part_size_2d(const Scan2d *a) { return 4 * a->C * (a->N + a->R + 1) + a->C; }

static void backward_2d_task(const void *context, void *scratch, ptrdiff_t i) {
    const Plan2d *p = context;
    const Scan2d *a = p->a;
    Task2d task = task_2d(p, i);
    ptrdiff_t slot = task.image, count = task.count;
    Backward2d m = take_backward_2d(&(Scratch){scratch, 0}, p, count);
    unsigned mode = flush_denormals();
    for (ptrdiff_t b = slot * a->B / p->slots; b < (slot + 1) * a->B / p->slots; b++)
        backward_2d_image(&m, p, b, &task);
    float *dA = p->grads_by_slot + slot * part_size_2d(a), *dweight = dA + 4 * a->C * a->N;
    float *dbias = dweight + 4 * a->C * a->R, *dD = dbias + 4 * a->C;
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (task.first + j) * V, lanes = a->C - c;
        for (int k = (int)task.part; k < 4; k += (int)p->split.parts) {
            const Grads2d *grads = &m.grads[k * count + j];
            ptrdiff_t row = k * a->C + c;
            store_transposed(grads->dA, dA, FLOAT32, row * a->N, a->N, lanes, a->N);
            store_transposed(grads->dweight, dweight, FLOAT32, row * a->R, a->R, lanes, a->R);
            store_some(dbias, FLOAT32, row, lanes, grads->dbias);
        }
        if (!task.part) store_some(dD, FLOAT32, c, lanes, m.dD[j]);
    }
    restore_denormals(mode);
}

static float *take_floats_if(int wanted, ptrdiff_t count, int *failed) {
    float *floats = wanted ? memory_take((size_t)count * sizeof(float)) : NULL;
    *failed |= wanted && !floats;
    return floats;
}

static int scan_2d_backward(const Scan2d *a) {
    Plan2d p = plan_2d(a);
    p.slots = at_most(a->B, 4 * a->threads);
    p.split = split_work(p.slots, p.blocks, 4, a->threads);
    ptrdiff_t groups = p.split.groups, parts = p.split.parts;
    ptrdiff_t grads_size = part_size_2d(a), proj_size = a->B * p.L * 4 * p.S, x_size = a->B * p.L * a->C;
    Scratch size = {0};
    take_backward_2d(&size, &p, ceil_div(p.blocks, groups));
    int failed = 0;
    float *grads = take_floats_if(1, grads_size * (p.slots + 1), &failed);
    p.grads_by_slot = grads + grads_size;
    p.dproj_by_group = take_floats_if(groups > 1, groups * proj_size, &failed);
    p.sums_by_part = take_floats_if(parts > 1, parts * x_size, &failed);
    failed = failed || pool_run(backward_2d_task, &p, p.slots * groups * parts, a->threads, size.used);
    if (groups > 1)
        failed = failed || sum_parts(p.dproj_by_group, groups, proj_size, a->dproj, a->proj_type, a->threads);
    if (parts > 1) failed = failed || sum_parts(p.sums_by_part, parts, x_size, a->dx, a->x_type, a->threads);
    failed = failed || sum_parts(p.grads_by_slot, p.slots, grads_size, grads, FLOAT32, a->threads);
    if (!failed) {
        const float *from = grads;
        size_t C = (size_t)a->C * 4 * sizeof(float);
        memcpy(a->dA, from, C * (size_t)a->N);
        memcpy(a->ddt_weight, from += 4 * a->C * a->N, C * (size_t)a->R);
        memcpy(a->ddt_bias, from += 4 * a->C * a->R, C);
        from += 4 * a->C;
        for (int k = 0; k < 4; k++) memcpy(a->dD + k * a->C, from, C / 4);
    }
    memory_give(p.sums_by_part);
    memory_give(p.dproj_by_group);
    memory_give(grads);
    return failed;
}
