// Compiled once for each instruction set; VARIANT names the result.
#include "scan_1d.h"
#include "scan_2d_backward.h"

const Variant VARIANT = {scan_2d_forward, scan_2d_backward, scan_1d_forward, scan_1d_backward, V};
