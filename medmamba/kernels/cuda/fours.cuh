// Four adjacent numbers of X_TYPE in one access, and arithmetic with them.

typedef Several<X_TYPE, 4>::type four_t;

__device__ __forceinline__ float4 read4(const x_t* from) { return to_floats<X_TYPE>(*(const four_t*)from); }

__device__ __forceinline__ float4 read4f(const float* from) { return *(const float4*)from; }

__device__ __forceinline__ void write4(x_t* to, float4 v) {
    if constexpr (X_TYPE == 0) *(float4*)to = v;
    else
        *(uint2*)to = uint2{from_floats<X_TYPE>(v.x, v.y), from_floats<X_TYPE>(v.z, v.w)};
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ float4 operator+(float4 a, float b) { return a + make_float4(b, b, b, b); }
__device__ __forceinline__ float4 operator*(float4 a, float b) { return a * make_float4(b, b, b, b); }
