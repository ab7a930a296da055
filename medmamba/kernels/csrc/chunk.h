// The recurrence over one chunk of tokens and one block of V channels. Everything here lives in the first-level cache:
//   x, dt, u = dt x, y, ...   [T] vectors, lane = channel
//   P                         [T] rows of `stride` floats, the projections of the tokens: step size code | B | C
//   A, h, dA                  [N] vectors. A is in units of log2: exp(dt A) = 2^(dt A2)
#pragma once
#include "vec.h"

// States held in registers at a time. AVX-512 has 32 registers, the others 16; NEON also has 32, but needs more of them
// for temporaries.
#if defined(__AVX512F__)
enum { STATES = 16 };
#else
enum { STATES = 8 };
#endif
// Number of states whose gradients are summed over the lanes together.
#define FOLDED (V < 8 ? 4 : V)

// pre[t] = bias + <code of token t, weight>; weight has R columns.
INLINE void project_steps(vf *pre, const float *P, ptrdiff_t stride, const vf *weight, vf bias, int T, int R) {
    int t = 0;
    for (; t + 4 <= T; t += 4) {
        const float *p0 = P + t * stride, *p1 = p0 + stride, *p2 = p1 + stride, *p3 = p2 + stride;
        vf a0 = bias, a1 = bias, a2 = bias, a3 = bias;
        for (int r = 0; r < R; r++) {
            vf w = weight[r];
            a0 += w * p0[r];
            a1 += w * p1[r];
            a2 += w * p2[r];
            a3 += w * p3[r];
        }
        pre[t] = a0;
        pre[t + 1] = a1;
        pre[t + 2] = a2;
        pre[t + 3] = a3;
    }
    for (; t < T; t++) {
        vf a = bias;
        for (int r = 0; r < R; r++) a += weight[r] * P[t * stride + r];
        pre[t] = a;
    }
}

// Returns whether 2^(dt A2) is a normal float for the whole chunk.
INLINE int steps_in_range(const vf *dt, int T, const vf *A2, int N) {
#if defined(__AVX512F__)
    return 0;  // not needed there
#endif
    vf a = {0}, d = {0};
    for (int n = 0; n < N; n++) a = maximum(magnitude(A2[n]), a);
    for (int t = 0; t < T; t++) d = maximum(magnitude(dt[t]), d);
    vf largest = a * d;
    int ok = 1;
    for (int i = 0; i < V; i++) ok &= largest[i] <= 126.f;
    return ok;
}

// --- forward --------------------------------------------------------------------------------------------------------

// h = 2^(dt A2) h + u B, y += C h, for `count` states (constant after inlining).
INLINE void forward_states(
    int count, int in_range, const vf *A2, vf *h, const float *Bs, const float *Cs, ptrdiff_t stride, const vf *dt,
    const vf *u, vf *y, int T) {
    vf s[STATES];
    UNROLL for (int n = 0; n < count; n++) s[n] = h[n];
    for (int t = 0; t < T; t++) {
        const float *b = Bs + t * stride, *c = Cs + t * stride;
        vf dt_t = dt[t], u_t = u[t], sum[2] = {0};  // summed apart from y[t], which is larger: less rounding
        UNROLL for (int n = 0; n < count; n++) {
            s[n] = exp2_product(dt_t, A2[n], in_range) * s[n] + u_t * b[n];
            sum[n & 1] += s[n] * c[n];
        }
        y[t] += sum[0] + sum[1];
    }
    UNROLL for (int n = 0; n < count; n++) h[n] = s[n];
}

static void forward_chunk(
    const vf *A2, vf *h, const float *Bs, const float *Cs, ptrdiff_t stride, const vf *dt, const vf *u, vf *y, int T,
    int N) {
    int in_range = steps_in_range(dt, T, A2, N);
    int n = 0;
    if (in_range) {
        for (; n + STATES <= N; n += STATES)
            forward_states(STATES, 1, A2 + n, h + n, Bs + n, Cs + n, stride, dt, u, y, T);
    }
    for (; n + STATES <= N; n += STATES)
        forward_states(STATES, 0, A2 + n, h + n, Bs + n, Cs + n, stride, dt, u, y, T);
    for (; n < N; n++) forward_states(1, 0, A2 + n, h + n, Bs + n, Cs + n, stride, dt, u, y, T);
}

// --- backward -------------------------------------------------------------------------------------------------------

// Repeats the forward pass and stores each state, before[t + 1][n], and decay[t][n]. before[0] is an input.
INLINE void replay_states(
    int count, int in_range, const vf *A2, const float *Bs, ptrdiff_t stride, const vf *dt, const vf *u, vf *before,
    vf *decay, int T, int N) {
    vf s[STATES];
    UNROLL for (int n = 0; n < count; n++) s[n] = before[n];
    for (int t = 0; t < T; t++) {
        const float *b = Bs + t * stride;
        vf dt_t = dt[t], u_t = u[t];
        UNROLL for (int n = 0; n < count; n++) {
            vf e = exp2_product(dt_t, A2[n], in_range);
            s[n] = e * s[n] + u_t * b[n];
            decay[t * N + n] = e;
            before[(t + 1) * N + n] = s[n];
        }
    }
}

// Sums FOLDED vectors, which arrive one by one, over their lanes: lane i of the result is the sum of vector i.
typedef struct {
    vf pending[5];
} Fold;
INLINE void fold_in(Fold *f, int i, vf v) {
    int k = 1, level = 0;
    UNROLL for (int j = 0; j < 4; j++) if (i & k) {
        v = fold(f->pending[level], v, k);
        k <<= 1;
        level++;
    } else break;
    f->pending[level] = v;
}

// Propagates dh, the gradient of the state, from after the last token to before the first one. Adds to dA, to dinput
// (the gradient of u), to dexponent (that of dt through the decay, in units of log2) and to the rows dBs, dCs.
INLINE void backward_states(
    int count, const vf *A2, vf *dh, const float *Bs, const float *Cs, ptrdiff_t stride, const vf *dt, const vf *u,
    const vf *dy, const vf *before, const vf *decay, vf *dinput, vf *dexponent, vf *dA, float *dBs, float *dCs,
    ptrdiff_t dstride, int T, int N) {
    vf s[FOLDED];
    UNROLL for (int n = 0; n < count; n++) s[n] = dh[n];
    for (int t = T - 1; t >= 0; t--) {
        const float *b = Bs + t * stride, *c = Cs + t * stride;
        vf dt_t = dt[t], u_t = u[t], dy_t = dy[t], di = dinput[t], de = dexponent[t];
        Fold fold_b, fold_c;
        UNROLL for (int n = 0; n < count; n++) {
            s[n] += dy_t * c[n];
            vf b_part = s[n] * u_t, c_part = dy_t * before[(t + 1) * N + n];
            di += s[n] * b[n];
            s[n] *= decay[t * N + n];
            vf e = s[n] * before[t * N + n];
            de += e * A2[n];
            dA[n] += e * dt_t;
            if (count == FOLDED) {
                fold_in(&fold_b, n, b_part);
                fold_in(&fold_c, n, c_part);
            } else {
                dBs[t * dstride + n] += sum_lanes(b_part);
                dCs[t * dstride + n] += sum_lanes(c_part);
            }
        }
        dinput[t] = di;
        dexponent[t] = de;
        if (count == FOLDED) {
            enum { LAST = FOLDED == 16 ? 4 : FOLDED == 8 ? 3 : 2 };
            store(dBs + t * dstride, load(dBs + t * dstride) + fold_b.pending[LAST]);
            store(dCs + t * dstride, load(dCs + t * dstride) + fold_c.pending[LAST]);
        }
    }
    UNROLL for (int n = 0; n < count; n++) dh[n] = s[n];
}

static void replay_chunk(
    const vf *A2, const float *Bs, ptrdiff_t stride, const vf *dt, const vf *u, vf *before, vf *decay, int T, int N) {
    int in_range = steps_in_range(dt, T, A2, N);
    int n = 0;
    if (in_range) {
        for (; n + STATES <= N; n += STATES)
            replay_states(STATES, 1, A2 + n, Bs + n, stride, dt, u, before + n, decay + n, T, N);
    }
    for (; n + STATES <= N; n += STATES)
        replay_states(STATES, 0, A2 + n, Bs + n, stride, dt, u, before + n, decay + n, T, N);
    for (; n < N; n++) replay_states(1, 0, A2 + n, Bs + n, stride, dt, u, before + n, decay + n, T, N);
}

static void backward_chunk(
    const vf *A2, vf *dh, const float *Bs, const float *Cs, ptrdiff_t stride, const vf *dt, const vf *u, const vf *dy,
    const vf *before, const vf *decay, vf *dinput, vf *dexponent, vf *dA, float *dBs, float *dCs, ptrdiff_t dstride,
    int T, int N) {
    int n = 0;
    for (; n + FOLDED <= N; n += FOLDED)
        backward_states(
            FOLDED, A2 + n, dh + n, Bs + n, Cs + n, stride, dt, u, dy, before + n, decay + n, dinput, dexponent, dA + n,
            dBs + n, dCs + n, dstride, T, N);
    for (; n < N; n++)
        backward_states(
            1, A2 + n, dh + n, Bs + n, Cs + n, stride, dt, u, dy, before + n, decay + n, dinput, dexponent, dA + n,
            dBs + n, dCs + n, dstride, T, N);
}
