// The number of the tap that a max pooling saves of each window: one byte where it has at most 256 taps, else
// two or four.
#pragma once

#include "vector_io.cuh"

// Taps as they are saved, in Byte each.
template <typename Byte, int Width>
__device__ __forceinline__ void load_taps(const unsigned char* argmax, long long i, int (&chosen)[Width]) {
    using Taps = Vector<Byte, Width>;
    const Taps loaded = Taps::load(reinterpret_cast<const Byte*>(argmax) + i * Width);
#pragma unroll
    for (int k = 0; k < Width; ++k) chosen[k] = static_cast<int>(loaded[k]);
}
template <typename Byte, int Width>
__device__ __forceinline__ void store_taps(unsigned char* argmax, long long i, const int (&chosen)[Width]) {
    Vector<Byte, Width> stored;
#pragma unroll
    for (int k = 0; k < Width; ++k) stored[k] = static_cast<Byte>(chosen[k]);
    stored.store(reinterpret_cast<Byte*>(argmax) + i * Width);
}

// Width taps of vector number i, as store_argmax has saved them:
//   int chosen[4];
//   load_argmax<4>(argmax, i, chosen, window.argmax_bytes);  // of elements 4 i .. 4 i + 3
//   store_argmax<4>(copy, i, chosen, window.argmax_bytes);
//   argmax   aligned to 16 bytes
//   bytes    of a tap: 1, 2 or 4
template <int Width>
__device__ __forceinline__ void load_argmax(const unsigned char* argmax, long long i, int (&chosen)[Width],
                                            int bytes) {
    if (bytes == 1) {
        load_taps<unsigned char>(argmax, i, chosen);
    } else if (bytes == 2) {
        load_taps<unsigned short>(argmax, i, chosen);
    } else {
        load_taps<int>(argmax, i, chosen);
    }
}

template <int Width>
__device__ __forceinline__ void store_argmax(unsigned char* argmax, long long i, const int (&chosen)[Width],
                                             int bytes) {
    if (bytes == 1) {
        store_taps<unsigned char>(argmax, i, chosen);
    } else if (bytes == 2) {
        store_taps<unsigned short>(argmax, i, chosen);
    } else {
        store_taps<int>(argmax, i, chosen);
    }
}

// Whether tap number k of several, of one byte each, is the one that all bytes of `repeated` are.
//   const unsigned int sought = repeated_tap(tap);
//   const auto saved = Vector<unsigned char, 8>::load(argmax + i);
//   if (is_repeated_tap(saved, k, sought)) sum += dy[k];
template <int Count>
__device__ __forceinline__ bool is_repeated_tap(const Vector<unsigned char, Count>& argmax, int k,
                                                unsigned int repeated) {
    // In the word that it is in: no byte has to be taken out.
    constexpr int kWordBytes = Count < 4 ? Count : 4;
    using Word = typename MemoryWord<kWordBytes>::type;
    const unsigned int word = reinterpret_cast<const Word*>(argmax.words)[k / kWordBytes];
    return ((word ^ repeated) & 0xffu << k % kWordBytes * 8) == 0;
}

// Whether it is this one.
template <int Count>
__device__ __forceinline__ bool is_tap(const Vector<unsigned char, Count>& argmax, int k, int tap) {
    if constexpr (Count == 1) {
        return argmax[0] == tap;
    } else {
        return is_repeated_tap(argmax, k, tap * 0x01010101u);
    }
}

// A tap in all bytes, by a permutation: a product would be made anew for each byte that is compared, in as
// many of its bits as that needs.
__device__ __forceinline__ unsigned int repeated_tap(int tap) {
    return __byte_perm(static_cast<unsigned int>(tap), 0, 0);
}
