// The four-direction scan. A task has some channel blocks of one image (backward: of some images) and all directions: it
// copies its channels of x once, and adds up y in a copy of its own. Directions are orders of reading these copies.
#pragma once
#include "plan.h"

// Pixels of tokens first, first + 1, ... of direction k: row-major, column-major, and both from the end.
static void token_pixels(int k, ptrdiff_t H, ptrdiff_t W, ptrdiff_t first, int T, int32_t *pixels) {
    for (int t = 0; t < T; t++) {
        ptrdiff_t token = k < 2 ? first + t : H * W - 1 - first - t;
        pixels[t] = (int32_t)(k % 2 ? token % H * W + token / H : token);
    }
}

typedef struct {
    const Scan2d *a;
    ptrdiff_t L, S, stride, chunks, blocks, groups, slots;
    float *dproj_parts, *parts;  // backward: partial sums of dproj by group, of all other gradients by slot
} Plan2d;

static Plan2d plan_2d(const Scan2d *a) {
    Plan2d p = {.a = a, .L = a->H * a->W, .S = a->R + 2 * a->N, .blocks = ceil_div(a->C, V)};
    p.stride = ceil_div(p.S, V) * V;
    p.chunks = ceil_div(p.L, CHUNK);
    return p;
}

// What a channel block needs of the parameters of one direction.
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

// What the tokens project in direction k, as rows of floats.
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
    ptrdiff_t b = i / p->groups, group = i % p->groups, L = p->L;
    ptrdiff_t first = group * p->blocks / p->groups, count = (group + 1) * p->blocks / p->groups - first;
    Forward2d m = take_forward_2d(&(Scratch){scratch, 0}, p, count);
    unsigned mode = flush_denormals();
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        vf skip = skip_sum(a, c);
        for (ptrdiff_t l = 0; l < L; l++) {
            vf x = load_some(a->x, a->x_type, (b * L + l) * a->C + c, a->C - c);
            m.x[j * L + l] = x;
            m.y[j * L + l] = x * skip;
        }
    }
    for (int k = 0; k < 4; k++) {
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
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        for (ptrdiff_t l = 0; l < L; l++)
            store_some(a->y, a->x_type, (b * L + l) * a->C + c, a->C - c, m.y[j * L + l]);
    }
    restore_denormals(mode);
}

static int scan_2d_forward(const Scan2d *a) {
    Plan2d p = plan_2d(a);
    p.groups = count_groups(a->B, p.blocks, a->threads);
    Scratch size = {0};
    take_forward_2d(&size, &p, ceil_div(p.blocks, p.groups));
    return pool_run(forward_2d_task, &p, a->B * p.groups, a->threads, size.used);
}

// --- backward -------------------------------------------------------------------------------------------------------

// The gradients of a block's parameters, summed over tokens and images.
typedef struct {
    vf *dweight, *dA, dbias;
} Grads2d;

typedef struct {
    vf *x, *dy, *dx;  // [count][L]
    Block2d *blocks;  // h holds the gradient of the state here
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

// `count` columns of the projection from code to step size, from r on (a constant after inlining: one addition has to wait
// for the last, so several sums go on side by side).
INLINE void project_backward_columns(
    int count, Backward2d *m, const Plan2d *p, const vf *dpre, const vf *by_token, Grads2d *grads, const float *weight,
    ptrdiff_t lanes, ptrdiff_t r, int T) {
    ptrdiff_t R = p->a->R;
    vf sum[4];
    UNROLL for (int i = 0; i < count; i++) sum[i] = (vf){0};
    for (int t = 0; t < T; t++)
        UNROLL for (int i = 0; i < count; i++) sum[i] += dpre[t] * m->P[t * p->stride + r + i];
    UNROLL for (int i = 0; i < count; i++) grads->dweight[r + i] += sum[i];  // sums of sums round far less than a long one
    for (int tile = 0; tile * V < T; tile++) {
        UNROLL for (int i = 0; i < count; i++) sum[i] = m->dcode[(r + i) * (CHUNK / V) + tile];
        for (ptrdiff_t c = 0; c < lanes; c++)
            UNROLL for (int i = 0; i < count; i++) sum[i] += by_token[tile * V + c] * weight[c * R + r + i];
        UNROLL for (int i = 0; i < count; i++) m->dcode[(r + i) * (CHUNK / V) + tile] = sum[i];
    }
}

// From dpre [T], the gradient of a block's step sizes before the softplus, to those of the code, the weight and the bias.
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

static void backward_2d_image(Backward2d *m, const Plan2d *p, ptrdiff_t b, ptrdiff_t group) {
    const Scan2d *a = p->a;
    ptrdiff_t L = p->L, N = a->N, R = a->R;
    ptrdiff_t first = group * p->blocks / p->groups, count = (group + 1) * p->blocks / p->groups - first;
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        vf skip = skip_sum(a, c), dD = {0};
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
    for (int k = 0; k < 4; k++) {
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
                    if (p->groups == 1)
                        store_some(a->dproj, a->proj_type, to + i, p->S - i, load(row + i));
                    else
                        store_some(
                            p->dproj_parts + group * a->B * L * 4 * p->S, FLOAT32, to + i, p->S - i, load(row + i));
                }
            }
        }
    }
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V;
        for (ptrdiff_t l = 0; l < L; l++)
            store_some(a->dx, a->x_type, (b * L + l) * a->C + c, a->C - c, m->dx[j * L + l]);
    }
}

// The layout of one slot of `parts`: dA, ddt_weight, ddt_bias, dD, in this order.
static ptrdiff_t part_size_2d(const Scan2d *a) { return 4 * a->C * (a->N + a->R + 1) + a->C; }

static void backward_2d_task(const void *context, void *scratch, ptrdiff_t i) {
    const Plan2d *p = context;
    const Scan2d *a = p->a;
    ptrdiff_t slot = i / p->groups, group = i % p->groups;
    ptrdiff_t first = group * p->blocks / p->groups, count = (group + 1) * p->blocks / p->groups - first;
    Backward2d m = take_backward_2d(&(Scratch){scratch, 0}, p, count);
    unsigned mode = flush_denormals();
    for (ptrdiff_t b = slot * a->B / p->slots; b < (slot + 1) * a->B / p->slots; b++) backward_2d_image(&m, p, b, group);
    float *dA = p->parts + slot * part_size_2d(a), *dweight = dA + 4 * a->C * a->N;
    float *dbias = dweight + 4 * a->C * a->R, *dD = dbias + 4 * a->C;
    for (ptrdiff_t j = 0; j < count; j++) {
        ptrdiff_t c = (first + j) * V, lanes = a->C - c;
        for (int k = 0; k < 4; k++) {
            const Grads2d *grads = &m.grads[k * count + j];
            ptrdiff_t row = k * a->C + c;
            store_transposed(grads->dA, dA, FLOAT32, row * a->N, a->N, lanes, a->N);
            store_transposed(grads->dweight, dweight, FLOAT32, row * a->R, a->R, lanes, a->R);
            store_some(dbias, FLOAT32, row, lanes, grads->dbias);
        }
        store_some(dD, FLOAT32, c, lanes, m.dD[j]);
    }
    restore_denormals(mode);
}

static int scan_2d_backward(const Scan2d *a) {
    Plan2d p = plan_2d(a);
    p.slots = at_most(a->B, 4 * a->threads);
    p.groups = count_groups(p.slots, p.blocks, a->threads);
    ptrdiff_t count = p.slots * p.groups, per_slot = part_size_2d(a), proj_size = a->B * p.L * 4 * p.S;
    Scratch size = {0};
    take_backward_2d(&size, &p, ceil_div(p.blocks, p.groups));
    float *sums = memory_take((size_t)(per_slot * (p.slots + 1)) * sizeof(float));
    p.parts = sums + per_slot;
    p.dproj_parts = p.groups > 1 ? memory_take((size_t)(p.groups * proj_size) * sizeof(float)) : NULL;
    int failed = !sums || (p.groups > 1 && !p.dproj_parts);
    failed = failed || pool_run(backward_2d_task, &p, count, a->threads, size.used);
    if (p.groups > 1) failed = failed || sum_parts(p.dproj_parts, p.groups, proj_size, a->dproj, a->proj_type, a->threads);
    failed = failed || sum_parts(p.parts, p.slots, per_slot, sums, FLOAT32, a->threads);
    if (!failed) {
        const float *from = sums;
        size_t C = (size_t)a->C * 4 * sizeof(float);
        memcpy(a->dA, from, C * (size_t)a->N);
        memcpy(a->ddt_weight, from += 4 * a->C * a->N, C * (size_t)a->R);
        memcpy(a->ddt_bias, from += 4 * a->C * a->R, C);
        from += 4 * a->C;
        for (int k = 0; k < 4; k++) memcpy(a->dD + k * a->C, from, C / 4);
    }
    memory_give(p.dproj_parts);
    memory_give(sums);
    return failed;
}
