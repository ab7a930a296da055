// Tensor cores: 16-bit products of 16x16 by 16x8, summed in float32. Needs compute capability 8.0.
//
// With g = lane / 4 and t = lane % 4, a lane holds of the left factor rows g and g + 8 in columns 2t, 2t + 1, 2t + 8 and
// 2t + 9; of the right factor these rows in column g; of the sum rows g and g + 8 in columns 2t and 2t + 1.

#ifndef EMULATED
// A tile of 16 pixels x 16 channels, each lane with the address of half a pixel: lane % 16 the pixel, lane / 16 the half.
__device__ __forceinline__ void load_tile(unsigned* a, const u16* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"((unsigned)__cvta_generic_to_shared(at)) : "memory");
}

// sum += tile (16 x 16) * b (16 x 8)
__device__ __forceinline__ void multiply(float* sum, const unsigned* a, uint2 b) {
    if constexpr (X_TYPE == 1)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
#else
// What the instructions of these names do, from the words of all lanes of the warp.
static unsigned words[1024][4];

inline void load_tile(unsigned* a, const u16* at) {
    static const u16* from[1024];
    const int first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    from[threadIdx.x] = at;
    __syncwarp();
    for (int i = 0; i < 4; i++) memcpy(a + i, from[first + 8 * i + lane / 4] + lane % 4 * 2, 4);
    __syncwarp();
}

inline void multiply(float* sum, const unsigned* a, uint2 b) {
    static unsigned columns[1024][2];
    const int first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) words[threadIdx.x][i] = a[i];
    columns[threadIdx.x][0] = b.x, columns[threadIdx.x][1] = b.y;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int other = k % 8 / 2, shift = k % 2 * 16;
            const unsigned l = words[first + row % 8 * 4 + other][row / 8 + k / 8 * 2] >> shift;
            const unsigned r = columns[first + column * 4 + other][k / 8] >> shift;
            sum[i] += to_float<X_TYPE>((u16)l) * to_float<X_TYPE>((u16)r);
        }
    }
    __syncwarp();
}
#endif
