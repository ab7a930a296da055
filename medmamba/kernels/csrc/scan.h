// The C interface of the scan. ../backends/cpu.py calls it through ctypes and mirrors these structs field by field. All
// tensors are contiguous; "any" marks those of any of the three element types, all others are float.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

enum { CHUNK = 64 };  // tokens between two saved states

typedef struct {
    int64_t B, H, W, C, R, N;
    int64_t threads;
    int64_t x_type, proj_type;  // element types of x, dy, y, dx, and of proj, dproj
    const void *x;              // any (B, H, W, C)
    const void *proj;           // any (B, H, W, 4, R + 2N)
    const float *dt_weight;     // (4, C, R)
    const float *dt_bias;       // (4, C)
    const float *A;             // (4, C, N)
    const float *D;             // (4, C)
    float *states;              // (B, 4, ceil(L / CHUNK), N, C), or NULL if no backward pass follows
    void *y;                    // any (B, H, W, C)
    // backward only
    const void *dy;  // any (B, H, W, C)
    void *dx;        // any (B, H, W, C)
    void *dproj;     // any (B, H, W, 4, R + 2N)
    float *ddt_weight, *ddt_bias, *dA, *dD;
} Scan2d;

typedef struct {
    int64_t B, C, L, G, N;
    int64_t threads;
    int64_t softplus;
    int64_t u_type, delta_type, proj_type;  // of u, y, dy, du; of delta, ddelta; of Bs, Cs, dBs, dCs
    const void *u, *delta;                  // any (B, C, L)
    const float *A;                         // (C, N)
    const void *Bs, *Cs;                    // any (B, G, N, L)
    const float *D, *delta_bias;            // (C)
    void *y;                                // any (B, C, L)
    float *last_state;                      // (B, C, N)
    // backward only
    const void *dy;      // any (B, C, L)
    void *du, *ddelta;   // any (B, C, L)
    void *dBs, *dCs;     // any (B, G, N, L)
    float *dA, *dD, *ddelta_bias;
} Scan1d;

// The arguments of the operations around the scan, see pixels.h; each uses some of them.
typedef struct {
    int64_t B, H, W, C;
    int64_t threads, type;      // type: of all maps
    int64_t pixels;             // of the result
    int64_t step, gather;       // elements between the pixels of the map that may be half of a wider one
    const void *x, *left, *right;
    const float *scale, *shift, *weight, *bias;
    void *out, *next_left, *next_right;
    float eps;
} Pixels;

// All return 0, or 1 if out of memory.
typedef int scan_2d_fn(const Scan2d *);
typedef int scan_1d_fn(const Scan1d *);
typedef int pixels_fn(const Pixels *);

typedef struct {
    scan_2d_fn *scan_2d_forward, *scan_2d_backward;
    scan_1d_fn *scan_1d_forward, *scan_1d_backward;
    pixels_fn *gate_norm, *mix_split, *norm, *depthwise_silu;
    int lanes;
} Variant;
