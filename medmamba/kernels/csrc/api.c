// The exported functions. `variant` is an index into the compiled instruction sets, from the baseline, 0, upwards;
// medmamba_best_variant() returns the highest one that this processor supports.
#include <stdatomic.h>

#include "scan.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
extern const Variant x86_64_base, x86_64_v3, x86_64_v4;
static const Variant *const variants[] = {&x86_64_base, &x86_64_v3, &x86_64_v4};

#include <cpuid.h>

// Replaces __builtin_cpu_supports, which needs a compiler runtime that not every target has.
static int find_best_variant(void) {
    unsigned a, b, c, d, b7;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned fma = 1u << 12, movbe = 1u << 22, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if (~c & (fma | movbe | osxsave | avx | f16c)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned bmi = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
    if ((~b7 & (bmi | avx2 | bmi2)) || (~low & 0x06)) return 0;  // whether the operating system saves 256-bit registers
    if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || ~c & (1u << 5)) return 0;  // lzcnt
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
    return ((b7 & avx512) == avx512 && (low & 0xe6) == 0xe6) ? 2 : 1;
}

EXPORT int medmamba_best_variant(void) {
    static atomic_int found = -1;  // cached: cpuid takes microseconds in a virtual machine
    int best = atomic_load_explicit(&found, memory_order_relaxed);
    if (best < 0) atomic_store_explicit(&found, best = find_best_variant(), memory_order_relaxed);
    return best;
}
#else
extern const Variant neon;
static const Variant *const variants[] = {&neon};
EXPORT int medmamba_best_variant(void) { return 0; }
#endif

// Returns the hash of the sources that this library was built from.
EXPORT const char *medmamba_source(void) { return SOURCE_HASH; }
EXPORT int medmamba_chunk(void) { return CHUNK; }
EXPORT int medmamba_lanes(int variant) { return variants[variant]->lanes; }

EXPORT int medmamba_scan_2d_forward(int variant, const Scan2d *a) { return variants[variant]->scan_2d_forward(a); }
EXPORT int medmamba_scan_2d_backward(int variant, const Scan2d *a) { return variants[variant]->scan_2d_backward(a); }
EXPORT int medmamba_scan_1d_forward(int variant, const Scan1d *a) { return variants[variant]->scan_1d_forward(a); }
EXPORT int medmamba_scan_1d_backward(int variant, const Scan1d *a) { return variants[variant]->scan_1d_backward(a); }

EXPORT int medmamba_gate_norm(int variant, const Pixels *a) { return variants[variant]->gate_norm(a); }
EXPORT int medmamba_mix_split(int variant, const Pixels *a) { return variants[variant]->mix_split(a); }
EXPORT int medmamba_norm(int variant, const Pixels *a) { return variants[variant]->norm(a); }
EXPORT int medmamba_depthwise_silu(int variant, const Pixels *a) { return variants[variant]->depthwise_silu(a); }
