// Vectors of V channels, as wide as in the instruction set that this file is compiled for.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "scan.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define V 16
#define LANES(f, k) f(0, k), f(1, k), f(2, k), f(3, k), f(4, k), f(5, k), f(6, k), f(7, k), \
                    f(8, k), f(9, k), f(10, k), f(11, k), f(12, k), f(13, k), f(14, k), f(15, k)
#elif defined(__AVX2__)
#define V 8
#define LANES(f, k) f(0, k), f(1, k), f(2, k), f(3, k), f(4, k), f(5, k), f(6, k), f(7, k)
#else
#define V 4
#define LANES(f, k) f(0, k), f(1, k), f(2, k), f(3, k)
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef uint16_t vu16 __attribute__((vector_size(2 * V)));
typedef _Float16 vf16 __attribute__((vector_size(2 * V)));

INLINE vf splat(float a) { return (vf){0} + a; }
INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf maximum(vf a, vf b) { return choose(a > b, a, b); }  // b where either is NaN
INLINE vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }

// --- element types --------------------------------------------------------------------------------------------------

INLINE size_t element_size(int64_t type) { return type == FLOAT32 ? 4 : 2; }

INLINE vf load_full(const void *p, int64_t type) {
    if (type == FLOAT32) return load(p);
    if (type == BFLOAT16) {
        vu16 bits;
        memcpy(&bits, p, sizeof bits);
        return (vf)(__builtin_convertvector(bits, vu) << 16);
    }
    vf16 half;
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, vf);
}

INLINE void store_full(void *p, int64_t type, vf v) {
    if (type == FLOAT32) {
        store(p, v);
    } else if (type == BFLOAT16) {
        vu bits = (vu)v;
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        vu16 half = __builtin_convertvector((vu)choose(v == v, (vf)bits, (vf)((vu){0} + 0x7fc0)), vu16);
        memcpy(p, &half, sizeof half);
    } else {
        vf16 half = __builtin_convertvector(v, vf16);
        memcpy(p, &half, sizeof half);
    }
}

// Copies count < 16 elements; much faster than memcpy with a size that is not constant.
INLINE void copy_few(char *to, const char *from, size_t size, ptrdiff_t count) {
    for (ptrdiff_t part = 8; part; part /= 2) {
        if (!(count & part)) continue;
        size_t bytes = (size_t)part * size;
        if (bytes == 32) memcpy(to, from, 32);
        if (bytes == 16) memcpy(to, from, 16);
        if (bytes == 8) memcpy(to, from, 8);
        if (bytes == 4) memcpy(to, from, 4);
        if (bytes == 2) memcpy(to, from, 2);
        to += bytes;
        from += bytes;
    }
}

// Loads `lanes` elements from element i on; the other lanes are 0.
static __attribute__((noinline)) vf load_part(const char *from, int64_t type, ptrdiff_t lanes) {
    char padded[4 * V] = {0};
    copy_few(padded, from, element_size(type), lanes);
    return load_full(padded, type);
}
INLINE vf load_some(const void *p, int64_t type, ptrdiff_t i, ptrdiff_t lanes) {
    const char *from = (const char *)p + (size_t)i * element_size(type);
    return lanes < V ? load_part(from, type, lanes) : load_full(from, type);
}

static __attribute__((noinline)) void store_part(char *to, int64_t type, ptrdiff_t lanes, vf v) {
    char padded[4 * V];
    store_full(padded, type, v);
    copy_few(to, padded, element_size(type), lanes);
}
INLINE void store_some(void *p, int64_t type, ptrdiff_t i, ptrdiff_t lanes, vf v) {
    char *to = (char *)p + (size_t)i * element_size(type);
    if (lanes < V)
        store_part(to, type, lanes, v);
    else
        store_full(to, type, v);
}

// --- across lanes ---------------------------------------------------------------------------------------------------

#define SHUFFLE(a, b, f, k) __builtin_shufflevector(a, b, LANES(f, k))
#define OWN(i, k) ((i) & (k) ? V + (i) : (i))                  // a where bit k of the lane is clear, b where it is set
#define SWAPPED(i, k) ((i) & (k) ? V + ((i) ^ (k)) : (i) ^ (k))  // the same, from the lane that differs in bit k
#define UPPER(i, k) ((i) & (k) ? V + (i) : (i) | (k))          // a from the lane with bit k set; b
#define LOWER(i, k) ((i) & (k) ? V + ((i) ^ (k)) : (i))        // a; b from the lane with bit k clear

#define ZIPPED(i, k) ((i) / 2 + (k) * V / 2 + (i) % 2 * V)     // a[0], b[0], a[1], b[1], ...; k = 1: the second half

// One step of the sum of vectors over their lanes: lanes with bit k clear get pairs of a, the others pairs of b.
INLINE vf fold(vf a, vf b, int k) {
    switch (k) {
        case 1: return SHUFFLE(a, b, OWN, 1) + SHUFFLE(a, b, SWAPPED, 1);
        case 2: return SHUFFLE(a, b, OWN, 2) + SHUFFLE(a, b, SWAPPED, 2);
#if V >= 8
        case 4: return SHUFFLE(a, b, OWN, 4) + SHUFFLE(a, b, SWAPPED, 4);
#endif
#if V >= 16
        case 8: return SHUFFLE(a, b, OWN, 8) + SHUFFLE(a, b, SWAPPED, 8);
#endif
    }
    return a;
}

INLINE float sum_lanes(vf v) {
    UNROLL for (int k = 1; k < V; k *= 2) v = fold(v, v, k);
    return v[0];
}

#define TRANSPOSE_STEP(k)                                \
    UNROLL for (int i = 0; i < V; i++) if (!(i & (k))) { \
        vf a = r[i], b = r[i | (k)];                     \
        r[i] = SHUFFLE(a, b, LOWER, k);                  \
        r[i | (k)] = SHUFFLE(a, b, UPPER, k);            \
    }

INLINE void transpose(vf r[V]) {
    TRANSPOSE_STEP(1)
    TRANSPOSE_STEP(2)
#if V >= 8
    TRANSPOSE_STEP(4)
#endif
#if V >= 16
    TRANSPOSE_STEP(8)
#endif
}

// Transposes: lane i of out[j] = element (i, j) of a matrix of `columns` columns and `lanes` rows, which are `stride`
// elements apart.
static __attribute__((noinline)) void load_transposed(
    vf *out, const void *p, int64_t type, ptrdiff_t first, ptrdiff_t stride, ptrdiff_t lanes, ptrdiff_t columns) {
    for (ptrdiff_t j = 0; j < columns; j += V) {
        vf r[V];
        for (int i = 0; i < V; i++)
            r[i] = i < lanes ? load_some(p, type, first + i * stride + j, columns - j) : (vf){0};
        transpose(r);
        for (int i = 0; i < V && j + i < columns; i++) out[j + i] = r[i];
    }
}

// The inverse of the function above.
static __attribute__((noinline)) void store_transposed(
    const vf *in, void *p, int64_t type, ptrdiff_t first, ptrdiff_t stride, ptrdiff_t lanes, ptrdiff_t columns) {
    for (ptrdiff_t j = 0; j < columns; j += V) {
        vf r[V];
        for (int i = 0; i < V; i++) r[i] = j + i < columns ? in[j + i] : (vf){0};
        transpose(r);
        for (int i = 0; i < V && i < lanes; i++) store_some(p, type, first + i * stride + j, columns - j, r[i]);
    }
}

// --- functions ------------------------------------------------------------------------------------------------------

static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

#define HORNER(c, x) ({ \
    vf p_ = splat((c)[sizeof(c) / sizeof *(c) - 1]); \
    UNROLL for (int i_ = (int)(sizeof(c) / sizeof *(c)) - 2; i_ >= 0; i_--) p_ = p_ * (x) + (c)[i_]; \
    p_; })

// 2^(a b), by minimax polynomials (relative error 9e-8) that are exact at 0: most decays are close to 1, where a
// constant error would accumulate over the tokens that a state remembers.
#if defined(__AVX512F__)
// 2^x = 2^floor(s) p(s - floor(s)), s = x + 1/2
static const float EXP2[] = {.707106709f, .490133852f, .169810593f, .0394804962f, .006355335f, .00132647005f};
INLINE vf exp2_product(vf a, vf b, int in_range) {
    (void)in_range;
    vf s = a * b + .5f;
    vf fraction = _mm512_reduce_ps(s, 0x09);  // s - floor(s)
    return _mm512_scalef_ps(HORNER(EXP2, fraction), s);
}
#else
// 2^x = 2^n p(x - n), n = round(x), by adding and subtracting 1.5 2^23. `in_range`: |x| <= 126 is known.
static const float EXP2[] = {1.f, .693146977f, .240222415f, .055507343f, .009671508f, .001326466f};
static const float ROUND = 12582912.f;
#if defined(__FMA__) || defined(__aarch64__)
#define FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
INLINE vf exp2_product(vf a, vf b, int in_range) {
    if (!in_range) {
        a *= b;
        a = choose(a < -126.f, splat(-126.f), a);
        a = choose(a > 128.f, splat(128.f), a);
        b = splat(1.f);
    }
    vf shifted = FMA(a, b, splat(ROUND));
    vf p = HORNER(EXP2, FMA(a, b, ROUND - shifted));
    return (vf)((vi)p + ((vi)shifted << 23));
}
#endif

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), to a few ulp for every x, and its derivative if `slope` is not NULL.
INLINE vf softplus(vf x, vf *slope) {
    static const float EXP[] = {1.f, 1.f, .49999993f, .16666521f, .041668393f, .008368725f, .001381458f};
    static const float LOG1P[] = {1.f,         -.499996481f, .333213225f,  -.248571639f, .191536546f,
                                  -.137538026f, .079204547f, -.030065804f, .005364834f};
    vf a = -magnitude(x);
    a = choose(a < -87.f, splat(-87.f), a);
    vf n = a * LOG2E + 12582912.f;
    vi exponent = (vi)n << 23;
    n -= 12582912.f;
    vf r = a - n * .693359375f;  // ln 2 in two parts; the first has few bits, so its product with n is exact
    r -= n * -2.12194440e-4f;
    vf e = (vf)((vi)HORNER(EXP, r) + exponent);
    if (slope) *slope = choose(x > 0.f, splat(1.f), e) / (e + 1.f);
    return e * HORNER(LOG1P, e) + maximum(x, splat(0.f));
}
