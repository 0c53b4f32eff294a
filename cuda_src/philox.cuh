// Philox4x32-10: random words that depend on a counter and a key alone.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
#pragma once

// a ^ b ^ c, in one instruction: compilers make two where they find one of them elsewhere.
__device__ __forceinline__ unsigned int xor3(unsigned int a, unsigned int b, unsigned int c) {
#ifdef GPU_LAYERS_EMULATED
    return a ^ b ^ c;
#else
    unsigned int result;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
#endif
}

// The four random words of each of Count counters, in their place.
//   counters   least significant word first
//   key        least significant word first
// Pure: the same on every GPU, in every thread.
template <int Count>
__device__ __forceinline__ void philox4x32_10(uint4 (&counters)[Count], uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const uint4 counter = counters[i];
            // High and low half asked for separately: one IMAD.WIDE each. A 64-bit product costs an addition
            // more.
            counters[i] =
                make_uint4(xor3(__umulhi(0xCD9E8D57u, counter.z), counter.y, key.x), 0xCD9E8D57u * counter.z,
                           xor3(__umulhi(0xD2511F53u, counter.x), counter.w, key.y), 0xD2511F53u * counter.x);
        }
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
}

// The words of one dropout call: decision g has word g & 3 of block g >> 2. In cuRAND's words `offset` is
// the subsequence and g the offset: curand_init(seed, offset, g, &state), then curand(&state).
//
//     const uint4 block = DropoutStream{seed, offset}.block(g >> 2);
//     const bool dropped = word_of(block, g & 3) < drop_below;
struct DropoutStream {
    unsigned long long seed;
    unsigned long long offset;

    // The words of blocks, by their numbers: several at once share the steps of the key.
    template <int Count>
    __device__ __forceinline__ void fill(uint4 (&blocks)[Count],
                                         const unsigned long long (&indices)[Count]) const {
#pragma unroll
        for (int i = 0; i < Count; ++i)
            blocks[i] =
                make_uint4(static_cast<unsigned int>(indices[i]), static_cast<unsigned int>(indices[i] >> 32),
                           static_cast<unsigned int>(offset), static_cast<unsigned int>(offset >> 32));
        philox4x32_10(blocks,
                      make_uint2(static_cast<unsigned int>(seed), static_cast<unsigned int>(seed >> 32)));
    }

    __device__ __forceinline__ uint4 block(unsigned long long index) const {
        uint4 result[1];
        fill(result, {index});
        return result[0];
    }
};

// Word `lane` (0 .. 3) of a block.
__device__ __forceinline__ unsigned int word_of(uint4 block, int lane) {
    const unsigned int low = lane & 1 ? block.y : block.x;
    const unsigned int high = lane & 1 ? block.w : block.z;
    return lane & 2 ? high : low;
}
