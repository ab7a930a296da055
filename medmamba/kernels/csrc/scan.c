// Compiled once per instruction set; VARIANT is the name of the result.
#include "pixels.h"
#include "scan_1d.h"
#include "scan_2d_backward.h"

const Variant VARIANT = {
    scan_2d_forward, scan_2d_backward, scan_1d_forward, scan_1d_backward,
    gate_norm, mix_split, norm, depthwise_silu, V,
};
