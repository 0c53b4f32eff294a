// The number of the tap that a max pooling saves of each window: one byte where it has at most 256 taps, else
// two or four.
#pragma once

#include "vector_io.cuh"

// Width taps of vector number i.
//   argmax   aligned to 16 bytes
//   bytes    of a tap: 1, 2 or 4; 1 where Width > 1
template <int Width>
__device__ __forceinline__ void load_argmax(const unsigned char* argmax, long long i, int (&chosen)[Width],
                                            int bytes) {
    if (Width == 1 && bytes == 2) {
        chosen[0] = reinterpret_cast<const unsigned short*>(argmax)[i];
    } else if (Width == 1 && bytes == 4) {
        chosen[0] = reinterpret_cast<const int*>(argmax)[i];
    } else {
        using Taps = Vector<unsigned char, Width>;
        const Taps loaded = Taps::load(argmax + i * Width);
#pragma unroll
        for (int k = 0; k < Width; ++k) chosen[k] = loaded[k];
    }
}

template <int Width>
__device__ __forceinline__ void store_argmax(unsigned char* argmax, long long i, const int (&chosen)[Width],
                                             int bytes) {
    if (Width == 1 && bytes == 2) {
        reinterpret_cast<unsigned short*>(argmax)[i] = static_cast<unsigned short>(chosen[0]);
    } else if (Width == 1 && bytes == 4) {
        reinterpret_cast<int*>(argmax)[i] = chosen[0];
    } else {
        Vector<unsigned char, Width> stored;
#pragma unroll
        for (int k = 0; k < Width; ++k) stored[k] = static_cast<unsigned char>(chosen[k]);
        stored.store(argmax + i * Width);
    }
}

// Whether tap number k of several, of one byte each, is this one.
template <int Count>
__device__ __forceinline__ bool is_tap(const Vector<unsigned char, Count>& argmax, int k, int tap) {
    if constexpr (Count == 1) {
        return argmax[0] == tap;
    } else {
        // In the word that it is in: no byte has to be taken out.
        constexpr int kWordBytes = Count < 4 ? Count : 4;
        using Word = typename MemoryWord<kWordBytes>::type;
        const unsigned int word = reinterpret_cast<const Word*>(argmax.words)[k / kWordBytes];
        return ((word ^ tap * 0x01010101u) & 0xffu << k % kWordBytes * 8) == 0;
    }
}
