// The operations around the scan at inference, each in one pass over memory; ../cuda/fused.cu and ../cuda/depthwise.cu
// are the same for GPUs. A task takes PIXELS pixels, or for the convolution one row of one image.
#pragma once
#include "plan.h"

enum { PIXELS = 64 };

INLINE vf silu(vf v) {
    vf exponent = maximum(v * -LOG2E, splat(-126.f));
    return v / (exp2_product(choose(exponent > 126.f, splat(126.f), exponent), splat(1.f), 1) + 1.f);
}

INLINE const char *element(const void *p, int64_t type, ptrdiff_t i) {
    return (const char *)p + i * (ptrdiff_t)element_size(type);
}

// Standardises `count` numbers, padded with zeros to whole vectors, and writes them times weight plus bias.
INLINE void finish_norm(vf *row, ptrdiff_t count, float eps, const float *weight, const float *bias) {
    ptrdiff_t vectors = ceil_div(count, V);
    vf sum = {0}, squares = {0};
    for (ptrdiff_t i = 0; i < vectors; i++) sum += row[i];
    float mean = sum_lanes(sum) / (float)count;
    for (ptrdiff_t i = 0; i < vectors; i++) {
        vf d = row[i] - mean;
        if (count - i * V < V) d = load_some(&d, FLOAT32, 0, count - i * V);  // the padding stays zero
        squares += d * d;
        row[i] = d;
    }
    float scale = 1.f / __builtin_sqrtf(sum_lanes(squares) / (float)count + eps);
    for (ptrdiff_t i = 0; i < vectors; i++) {
        ptrdiff_t left = count - i * V;
        row[i] = row[i] * scale * load_some(weight, FLOAT32, i * V, left) + load_some(bias, FLOAT32, i * V, left);
    }
}

INLINE void gate_norm_rows(const Pixels *a, vf *row, ptrdiff_t first, ptrdiff_t end, int64_t type) {
    for (ptrdiff_t pixel = first; pixel < end; pixel++) {
        for (ptrdiff_t c = 0; c < a->C; c += V) row[c / V] = load_some(a->x, type, pixel * a->C + c, a->C - c);
        finish_norm(row, a->C, a->eps, a->weight, a->bias);
        for (ptrdiff_t c = 0; c < a->C; c += V) {
            vf gate = load_some(a->right, type, pixel * a->step + c, a->C - c);
            store_some(a->out, type, pixel * a->C + c, a->C - c, row[c / V] * silu(gate));
        }
    }
}

INLINE void mix_split_rows(const Pixels *a, vf *row, ptrdiff_t first, ptrdiff_t end, int64_t type) {
    ptrdiff_t C = a->C, half = C / 2;
    float *numbers = (float *)row;
    for (ptrdiff_t pixel = first; pixel < end; pixel++) {
        for (ptrdiff_t c = 0; c < C; c += V) store(numbers + c, load_some(a->x, type, pixel * C + c, C - c));
        if (a->left) {
            for (ptrdiff_t c = 0; c < half; c += V) {
                vf l = maximum((vf){0}, load_some(a->left, type, pixel * half + c, half - c));  // keeps NaN
                vf r = load_some(a->right, type, pixel * half + c, half - c);
                store(numbers + 2 * c, load(numbers + 2 * c) + SHUFFLE(l, r, ZIPPED, 0));
                store(numbers + 2 * c + V, load(numbers + 2 * c + V) + SHUFFLE(l, r, ZIPPED, 1));
            }
            for (ptrdiff_t c = 0; c < C; c += V) store_some(a->out, type, pixel * C + c, C - c, load(numbers + c));
        }
        if (!a->next_left) continue;
        for (ptrdiff_t c = 0; c < half; c += V) {
            ptrdiff_t left = half - c;
            vf v = load_some(numbers, FLOAT32, c, left);
            v = v * load_some(a->scale, FLOAT32, c, left) + load_some(a->shift, FLOAT32, c, left);
            store_some(a->next_left, type, pixel * half + c, left, v);
        }
        for (ptrdiff_t c = 0; c < half; c += V) store(numbers + c, load_some(numbers + half, FLOAT32, c, half - c));
        finish_norm(row, half, a->eps, a->weight, a->bias);
        for (ptrdiff_t c = 0; c < half; c += V) store_some(a->next_right, type, pixel * half + c, half - c, row[c / V]);
    }
}

// Of C channels, or with `gather` of the C / 4 channels of each pixel of a 2x2 patch: (0,0), (1,0), (0,1), (1,1).
INLINE void norm_rows(const Pixels *a, vf *row, ptrdiff_t first, ptrdiff_t end, int64_t type) {
    ptrdiff_t C = a->C, part = a->gather ? C / 4 : C;
    float *numbers = (float *)row;
    for (ptrdiff_t pixel = first; pixel < end; pixel++) {
        ptrdiff_t from = pixel * C;
        if (a->gather) {
            ptrdiff_t x = pixel % (a->W / 2), y = pixel / (a->W / 2) % (a->H / 2), b = pixel / (a->W / 2) / (a->H / 2);
            from = ((b * a->H + 2 * y) * a->W + 2 * x) * part;
        }
        for (ptrdiff_t p = 0; p < C / part; p++)  // a later part overwrites what is stored beyond the end of this one
            for (ptrdiff_t c = 0; c < part; c += V) {
                ptrdiff_t at = from + (p % 2 * a->W + p / 2) * part + c;
                store(numbers + p * part + c, load_some(a->x, type, at, part - c));
            }
        finish_norm(row, C, a->eps, a->weight, a->bias);
        for (ptrdiff_t c = 0; c < C; c += V) store_some(a->out, type, pixel * C + c, C - c, row[c / V]);
    }
}

// silu(depthwise 3x3 convolution + bias) of one row: pixels of x are `step` elements apart; weight (9, C).
INLINE void depthwise_row(const Pixels *a, ptrdiff_t task, int64_t type) {
    ptrdiff_t C = a->C, W = a->W, y = task % a->H;
    const char *rows[3];
    for (int dy = 0; dy < 3; dy++)
        rows[dy] = y + dy - 1 < 0 || y + dy - 1 >= a->H ? NULL : element(a->x, type, (task + dy - 1) * W * a->step);
    for (ptrdiff_t c = 0; c < C; c += V) {
        ptrdiff_t lanes = C - c;
        vf w[9], seen[3][3], bias = load_some(a->bias, FLOAT32, c, lanes);
        UNROLL for (int t = 0; t < 9; t++) w[t] = load_some(a->weight, FLOAT32, t * C + c, lanes);
        UNROLL for (int dy = 0; dy < 3; dy++) {
            seen[dy][1] = (vf){0};
            seen[dy][2] = rows[dy] ? load_some(rows[dy], type, c, lanes) : (vf){0};
        }
        for (ptrdiff_t x = 0; x < W; x++) {
            vf sum = bias;
            UNROLL for (int dy = 0; dy < 3; dy++) {
                seen[dy][0] = seen[dy][1], seen[dy][1] = seen[dy][2];
                seen[dy][2] = rows[dy] && x + 1 < W ? load_some(rows[dy], type, (x + 1) * a->step + c, lanes) : (vf){0};
                UNROLL for (int dx = 0; dx < 3; dx++) sum += seen[dy][dx] * w[3 * dy + dx];
            }
            store_some(a->out, type, (task * W + x) * C + c, lanes, silu(sum));
        }
    }
}

// The element type is a constant in each copy of the loops.
#define BY_TYPE(call) switch (a->type) { \
        case FLOAT32: call(FLOAT32); break; \
        case BFLOAT16: call(BFLOAT16); break; \
        default: call(FLOAT16); \
    }

#define PIXEL_TASK(name)                                                                                  \
    static void name##_task(const void *context, void *scratch, ptrdiff_t i) {                            \
        const Pixels *a = context;                                                                        \
        ptrdiff_t first = i * PIXELS, end = at_most(first + PIXELS, a->pixels);                           \
        BY_TYPE(name##_CALL)                                                                              \
    }                                                                                                     \
    static int name(const Pixels *a) {                                                                    \
        size_t bytes = (size_t)(ceil_div(a->C, V) + 2) * sizeof(vf);                                      \
        return pool_run(name##_task, a, ceil_div(a->pixels, PIXELS), a->threads, bytes);                  \
    }
#define gate_norm_CALL(type) gate_norm_rows(a, scratch, first, end, type)
#define mix_split_CALL(type) mix_split_rows(a, scratch, first, end, type)
#define norm_CALL(type) norm_rows(a, scratch, first, end, type)
PIXEL_TASK(gate_norm)
PIXEL_TASK(mix_split)
PIXEL_TASK(norm)

static void depthwise_task(const void *context, void *scratch, ptrdiff_t i) {
    (void)scratch;
    const Pixels *a = context;
#define depthwise_CALL(type) depthwise_row(a, i, type)
    BY_TYPE(depthwise_CALL)
}
static int depthwise_silu(const Pixels *a) { return pool_run(depthwise_task, a, a->pixels / a->W, a->threads, 0); }
