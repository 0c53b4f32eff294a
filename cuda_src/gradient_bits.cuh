// One bit an element, which says whether its gradient passes: bit i & 7 of byte i / 8 is element i's.
//
// A thread owns eight neighbouring elements, one byte: an octet. Bits beyond the last element are 0.
#pragma once

#include "elementwise.cuh"

constexpr int kOctet = 8;
// Octets of a thread in one step: at least two 16-byte loads are in flight.
template <typename T>
constexpr int kOctetUnroll = sizeof(T) == 2 ? 2 : 1;

// Reads the whole octets of n elements, some of a thread's at a time.
//   source     [n] T, 16-byte aligned
//   on_octet   called with the values of an octet, and its number
//   for_each_octet(x, n, [&](Vector<T, kOctet>& values, long long octet) {
//       gradient_bits[octet] = bits_of(values);
//   });
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T, typename OnOctet>
__device__ __forceinline__ void for_each_octet(const T* source, long long n, OnOctet on_octet) {
    constexpr int unroll = kOctetUnroll<T>;
    const long long octets = n / kOctet;
    const long long tile = static_cast<long long>(kElementwiseThreads) * unroll;
    for (long long first = blockIdx.x * tile; first < octets; first += gridDim.x * tile) {
        Vector<T, kOctet> values[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const long long octet = first + u * kElementwiseThreads + threadIdx.x;
            if (octet < octets) values[u] = Vector<T, kOctet>::load(source + octet * kOctet);
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const long long octet = first + u * kElementwiseThreads + threadIdx.x;
            if (octet < octets) on_octet(values[u], octet);
        }
    }
}

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

// dx = f(dy) where the element's bit is set, and +0 elsewhere; f takes and returns T.
//   dy, dx          [n] T, 16-byte aligned; dx may be dy
//   gradient_bits   [ceil(n / 8)]
//   map_passing(dy, gradient_bits, dx, n, [&](T gradient) { return scaled(gradient); });
// Launch: as for_each_octet.
template <typename T, typename Function>
__device__ __forceinline__ void map_passing(const T* dy, const unsigned char* gradient_bits, T* dx,
                                            long long n, Function f) {
    const T zero = from_accumulate<T>(accumulate_t<T>(0));
    for_each_octet(dy, n, [&](Vector<T, kOctet>& gradients, long long octet) {
        const unsigned int bits = gradient_bits[octet];
#pragma unroll
        for (int i = 0; i < kOctet; ++i) gradients[i] = bits >> i & 1u ? f(gradients[i]) : zero;
        gradients.store(dx + octet * kOctet);
    });
    const long long octets = n / kOctet, rest = octets * kOctet + threadIdx.x;
    if (blockIdx.x == 0 && rest < n)
        dx[rest] = gradient_bits[octets] >> threadIdx.x & 1u ? f(dy[rest]) : zero;
}
