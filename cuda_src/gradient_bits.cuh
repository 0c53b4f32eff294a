// One bit an element, which says whether its gradient passes: bit i & 7 of byte i / 8 is element i's.
//
// A byte is of eight neighbouring elements, an octet. Bits beyond the last element are 0.
#pragma once

#include "elementwise.cuh"
#include "reduce.cuh"

constexpr int kOctet = 8;
// Octets of a thread that owns whole ones in one step: at least two 16-byte loads are in flight.
template <typename T>
constexpr int kOctetUnroll = sizeof(T) == 2 ? 2 : 1;

// Stores the bytes of a thread's octets of a tile.
template <int Unroll>
__device__ __forceinline__ void store_octet_bits(unsigned char* gradient_bits,
                                                 const unsigned int (&bits)[Unroll],
                                                 const TilePart<Unroll, kOctet>& part) {
    unsigned char* const bytes = gradient_bits + part.first / kOctet;
#pragma unroll
    for (int u = 0; u < Unroll; ++u) {
        if (part.has(u)) bytes[part.at(u) / kOctet] = static_cast<unsigned char>(bits[u]);
    }
}

// ---- where a thread owns vectors
// ---------------------------------------------------------------------------
//
// Neighbouring lanes have neighbouring vectors, of each of a thread's places in a tile. Where a vector is
// less than an octet, kSharers lanes share the octets of as many places: each has a part of all of them, and
// moves the byte of one.

// 16-byte loads of a thread in flight. Two threads of which each owned an octet of float32 values, and had
// two in flight, reached 0.78 of a copy on an H200; a thread with two octets of half values 0.94 to 0.97.
template <typename T>
constexpr int kPassingUnroll = sizeof(T) == 2 ? 2 : 4;
template <typename T>
using PassingPart = TilePart<kPassingUnroll<T>, kVectorWidth<T>>;
template <typename T>
constexpr int kSharers = kOctet / kVectorWidth<T>;

// Field i of what lane j of its sharers has is field j of what lane i has; fields are as wide as a vector.
// All lanes of a warp must call it.
template <typename T>
__device__ __forceinline__ unsigned int exchanged_bits(unsigned int bits) {
    constexpr int width = kVectorWidth<T>, sharers = kSharers<T>;
    const int own = static_cast<int>(threadIdx.x) % sharers;
    unsigned int exchanged = 0;
#pragma unroll
    for (int apart = 0; apart < sharers; ++apart) {
        const unsigned int others = apart == 0 ? bits : __shfl_xor_sync(kFullWarp, bits, apart);
        exchanged |= (others >> width * own & (1u << width) - 1u) << width * (own ^ apart);
    }
    return exchanged;
}

// Index of the byte that a thread moves of those of places u to u + kSharers - 1, and whether there is one.
template <typename T>
__device__ __forceinline__ long long byte_at(const PassingPart<T>& part, int u) {
    return (part.first + part.at(u + static_cast<int>(threadIdx.x) % kSharers<T>)) / kOctet;
}
template <typename T>
__device__ __forceinline__ bool has_byte(const PassingPart<T>& part, int u) {
    return part.has(u + static_cast<int>(threadIdx.x) % kSharers<T>);
}

// Stores and loads those of a thread's vectors: bit i of bits[u] is that of value i of vector u. Loaded
// ones may have more bits above. All lanes of a warp must call them.
template <typename T>
__device__ __forceinline__ void store_passing_bits(unsigned char* gradient_bits,
                                                   const unsigned int (&bits)[kPassingUnroll<T>],
                                                   const PassingPart<T>& part) {
#pragma unroll
    for (int u = 0; u < kPassingUnroll<T>; u += kSharers<T>) {
        unsigned int fields = 0;
#pragma unroll
        for (int i = 0; i < kSharers<T>; ++i) fields |= bits[u + i] << kVectorWidth<T> * i;
        fields = exchanged_bits<T>(fields);
        if (has_byte<T>(part, u)) gradient_bits[byte_at<T>(part, u)] = static_cast<unsigned char>(fields);
    }
}
template <typename T>
__device__ __forceinline__ void load_passing_bits(unsigned int (&bits)[kPassingUnroll<T>],
                                                  const unsigned char* gradient_bits,
                                                  const PassingPart<T>& part) {
    // All are on their way before one is needed.
    unsigned int bytes[kPassingUnroll<T>] = {};
#pragma unroll
    for (int u = 0; u < kPassingUnroll<T>; u += kSharers<T>) {
        if (has_byte<T>(part, u)) bytes[u] = gradient_bits[byte_at<T>(part, u)];
    }
#pragma unroll
    for (int u = 0; u < kPassingUnroll<T>; u += kSharers<T>) {
        const unsigned int fields = exchanged_bits<T>(bytes[u]);
#pragma unroll
        for (int i = 0; i < kSharers<T>; ++i) bits[u + i] = fields >> kVectorWidth<T> * i;
    }
}

// dx = f(dy) where the element's bit is set, and +0 elsewhere; f takes and returns T.
//   dy, dx          [n] T, 16-byte aligned; dx may be dy
//   gradient_bits   [ceil(n / 8)]
//   map_passing(dy, gradient_bits, dx, n, [&](T gradient) { return scaled(gradient); });
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T, typename Function>
__device__ __forceinline__ void map_passing(const T* dy, const unsigned char* gradient_bits, T* dx,
                                            long long n, Function f) {
    const T zero = from_accumulate<T>(accumulate_t<T>(0));
    const long long octets = n / kOctet;
    for_each_tile<kPassingUnroll<T>, kVectorWidth<T>>(octets * kOctet, [&](const PassingPart<T>& part) {
        Vector<T> gradients[kPassingUnroll<T>];
        unsigned int bits[kPassingUnroll<T>];
        load_passing_bits<T>(bits, gradient_bits, part);
        part.load(gradients, dy);
#pragma unroll
        for (int u = 0; u < kPassingUnroll<T>; ++u) {
#pragma unroll
            for (int i = 0; i < kVectorWidth<T>; ++i)
                gradients[u][i] = bits[u] >> i & 1u ? f(gradients[u][i]) : zero;
        }
        part.store(gradients, dx);
    });
    const long long rest = octets * kOctet + threadIdx.x;
    if (blockIdx.x == 0 && rest < n)
        dx[rest] = gradient_bits[octets] >> threadIdx.x & 1u ? f(dy[rest]) : zero;
}
