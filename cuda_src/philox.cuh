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

// A value that is calculated here, once: compilers would do so again in each round of a loop.
__device__ __forceinline__ unsigned int held(unsigned int value) {
#ifndef GPU_LAYERS_EMULATED
    asm("" : "+r"(value));
#endif
    return value;
}

// What the words x and z are multiplied by.
constexpr unsigned int kPhiloxX = 0xD2511F53u, kPhiloxZ = 0xCD9E8D57u;

// A product's low word and its high one. Asked for separately: one IMAD.WIDE both. A 64-bit product costs an
// addition more.
__device__ __forceinline__ uint2 philox_product(unsigned int factor, unsigned int word) {
    return make_uint2(factor * word, __umulhi(factor, word));
}

// The keys of all rounds, for many blocks.
struct PhiloxKeys {
    uint2 keys[10];

    __device__ __forceinline__ explicit PhiloxKeys(unsigned long long seed) {
#pragma unroll
        for (unsigned int round = 0; round < 10; ++round)
            keys[round] = make_uint2(held(static_cast<unsigned int>(seed) + 0x9E3779B9u * round),
                                     held(static_cast<unsigned int>(seed >> 32) + 0xBB67AE85u * round));
    }

    __device__ __forceinline__ uint2 operator()(int round) const { return keys[round]; }
};

// Makes the four random words of each of Count counters, in their place.
//   First      rounds that they have had
//   counters   least significant word first
//   key        of a round, by its number; least significant word first
// Pure: the same on every GPU, in every thread.
template <int First, int Count, typename Key>
__device__ __forceinline__ void philox4x32(uint4 (&counters)[Count], Key key) {
#pragma unroll
    for (int round = First; round < 10; ++round) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const uint4 counter = counters[i];
            const uint2 of_round = key(round);
            counters[i] =
                make_uint4(xor3(__umulhi(kPhiloxZ, counter.z), counter.y, of_round.x), kPhiloxZ * counter.z,
                           xor3(__umulhi(kPhiloxX, counter.x), counter.w, of_round.y), kPhiloxX * counter.x);
        }
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
        philox4x32<0>(blocks, [&](unsigned int round) {
            return make_uint2(static_cast<unsigned int>(seed) + 0x9E3779B9u * round,
                              static_cast<unsigned int>(seed >> 32) + 0xBB67AE85u * round);
        });
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
