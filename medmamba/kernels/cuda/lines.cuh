// Code shared by the kernels of the one-dimensional scan, lines.cu and lines_backward.cu. Each (b, c) is a line of L
// tokens, adjacent in memory; the kernels read and write the tensors of the caller, whatever their other strides.
//
//     X_TYPE, Y_TYPE, P_TYPE   element type of u (and y, dy, du), of delta (and ddelta), of B and C
//     PER, LANES   a channel has PER * LANES >= N states; lane q of its LANES has the states q, q + LANES, ...
//     WARPS        per program
//     VEC          tokens per access to lines: 8, 4, 2 or 1; divides L and the strides, and fits the alignment
//     P_VEC        the same for B and C; 1 also if their tokens are not adjacent
//     SEGMENT      tokens per segment of the backward pass
//     SOFTPLUS     whether the step size is softplus(delta + bias)
//
// The backward pass is two kernels. The first walks along the lines and leaves, for each segment, its initial state and
// the gradient of its last state, at the start of the segment in the memory of du and ddelta: they cost no memory, and
// the second kernel reads them before it overwrites them. The second one takes each segment by itself, with tokens in
// registers and channels one after the other, so that the gradients of B and C, which are sums over channels, never leave
// the program: no atomics, and the same bits each time.

constexpr int PADDED = PER * LANES;
constexpr int THREADS = 32 * WARPS;
constexpr int STEP = 8;  // consecutive tokens of a thread
constexpr unsigned EVERY = 0xffffffffu;

// Eight tokens as they lie in memory.
template <int TYPE> struct Raw { unsigned word[TYPE ? 4 : 8]; };

// Reads eight tokens, of which those from `there` on do not exist and become zero, ALIGNED at a time.
template <int TYPE, int ALIGNED>
__device__ __forceinline__ Raw<TYPE> read_tokens(const typename Element<TYPE>::type* from, int there, i64 stride = 1) {
    Raw<TYPE> raw;
#pragma unroll
    for (int i = 0; i < (TYPE ? 4 : 8); i++) raw.word[i] = 0;
    constexpr int WIDTH = TYPE == 0 && ALIGNED == 8 ? 4 : ALIGNED;
#pragma unroll
    for (int t = 0; t < STEP; t += WIDTH)
        if (t < there) {
            if constexpr (TYPE == 0 && WIDTH == 4 || TYPE != 0 && WIDTH == 8) {
                const uint4 v = *(const uint4*)(from + t);
                unsigned* to = raw.word + (TYPE ? 0 : t);
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            } else if constexpr (TYPE == 0 && WIDTH == 2 || TYPE != 0 && WIDTH == 4) {
                const uint2 v = *(const uint2*)(from + t);
                unsigned* to = raw.word + (TYPE ? t / 2 : t);
                to[0] = v.x, to[1] = v.y;
            } else if constexpr (TYPE == 0) raw.word[t] = __float_as_uint(from[t * stride]);
            else if constexpr (WIDTH == 2) raw.word[t / 2] = *(const unsigned*)(from + t);
            else raw.word[t / 2] |= (unsigned)from[t * stride] << (t % 2 * 16);
        }
    return raw;
}

// Token i of words read as above.
template <int TYPE> __device__ __forceinline__ float token(const unsigned* word, int i) {
    if constexpr (TYPE == 0) return __uint_as_float(word[i]);
    else return to_float<TYPE>((u16)(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu));
}

// Writes COUNT tokens, of which those from `there` on do not exist.
template <int TYPE, int COUNT>
__device__ __forceinline__ void write_tokens(typename Element<TYPE>::type* to, const float* v, int there) {
    constexpr int MOST = TYPE ? 8 : 4, WIDTH = VEC < COUNT ? (VEC < MOST ? VEC : MOST) : (COUNT < MOST ? COUNT : MOST);
#pragma unroll
    for (int t = 0; t < COUNT; t += WIDTH)
        if (t < there) {
            if constexpr (WIDTH == 1) to[t] = from_float<TYPE>(v[t]);
            else if constexpr (TYPE == 0 && WIDTH == 4) *(float4*)(to + t) = make_float4(v[t], v[t + 1], v[t + 2], v[t + 3]);
            else if constexpr (TYPE == 0) *(float2*)(to + t) = make_float2(v[t], v[t + 1]);
            else {
                unsigned word[WIDTH / 2];
#pragma unroll
                for (int i = 0; i < WIDTH / 2; i++) word[i] = from_floats<TYPE>(v[t + 2 * i], v[t + 2 * i + 1]);
                if constexpr (WIDTH == 8) *(uint4*)(to + t) = uint4{word[0], word[1], word[2], word[3]};
                else if constexpr (WIDTH == 4) *(uint2*)(to + t) = uint2{word[0], word[1]};
                else *(unsigned*)(to + t) = word[0];
            }
        }
}

// Element i of an array of less than 4 GiB.
template <class T> __device__ __forceinline__ T& element(T* array, unsigned i) {
    return *(T*)((char*)array + i * (unsigned)sizeof(T));
}

// Where what belongs to a segment lies in the memory of its gradients: from its first aligned address.
template <class T> __device__ __forceinline__ float* left_at(T* segment) {
    return (float*)(((size_t)segment + 15) & ~(size_t)15);
}

// PER adjacent numbers, aligned.
__device__ __forceinline__ void read_states(float* to, const float* from) {
    if constexpr (PER == 4) {
        const float4 v = *(const float4*)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else
#pragma unroll
        for (int i = 0; i < PER; i++) to[i] = from[i];
}

__device__ __forceinline__ void write_states(float* to, const float* v) {
    if constexpr (PER == 4) *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
    else
#pragma unroll
        for (int i = 0; i < PER; i++) to[i] = v[i];
}

__device__ __forceinline__ void numbers(float* to, float4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

__device__ __forceinline__ void write8(float* to, const float* v) {
    *(float4*)to = make_float4(v[0], v[1], v[2], v[3]), *(float4*)(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}
