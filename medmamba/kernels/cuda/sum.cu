// (outer, PARTS, inner) of X_TYPE to (outer, inner) of Y_TYPE, in float32 and in a fixed order. VEC: four adjacent
// elements per thread.

extern "C" __global__ void __launch_bounds__(256) sum_parts(
    const x_t* __restrict__ parts, y_t* __restrict__ out, i64 outer, i64 inner) {
    constexpr int STEP = VEC ? 4 : 1;
    const i64 each = inner / STEP, i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= outer * each) return;
    const x_t* from = parts + i / each * PARTS * inner + i % each * STEP;
    y_t* to = out + i * STEP;
    if (VEC) {
        typedef Several<X_TYPE, 4>::type load_t;
        float4 sum = to_floats<X_TYPE>(*(const load_t*)from);
#pragma unroll
        for (int p = 1; p < PARTS; p++) {
            const float4 v = to_floats<X_TYPE>(*(const load_t*)(from + p * inner));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        to[0] = from_float<Y_TYPE>(sum.x), to[1] = from_float<Y_TYPE>(sum.y);
        to[2] = from_float<Y_TYPE>(sum.z), to[3] = from_float<Y_TYPE>(sum.w);
    } else {
        float sum = to_float<X_TYPE>(*from);
#pragma unroll
        for (int p = 1; p < PARTS; p++) sum += to_float<X_TYPE>(from[p * inner]);
        *to = from_float<Y_TYPE>(sum);
    }
}
