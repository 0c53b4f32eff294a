// One pass over contiguous arrays, element by element.
#pragma once

#include "vector_io.cuh"

constexpr int kElementwiseThreads = 256;
// Vectors of a thread in one step: as many loads are in flight before the first result is needed.
constexpr int kElementwiseUnroll = 2;

// Copies x to y, a vector at a time and what is left one by one, changed on the way.
//   x, y        [n] T, 16-byte aligned; y may be x
//   on_vector   called with a vector, and the index of its first value: changes it
//   on_value    called with a value, and its index: returns what becomes of it
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T, typename OnVector, typename OnValue>
__device__ __forceinline__ void map_vectors(const T* x, T* y, long long n, OnVector on_vector,
                                            OnValue on_value) {
    constexpr int width = kVectorWidth<T>;
    const long long vectors = n / width;
    const long long tile = static_cast<long long>(kElementwiseThreads) * kElementwiseUnroll;
    for (long long first = blockIdx.x * tile; first < vectors; first += gridDim.x * tile) {
        Vector<T> values[kElementwiseUnroll];
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v < vectors) values[u] = Vector<T>::load(x + v * width);
        }
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v >= vectors) break;
            on_vector(values[u], v * width);
            values[u].store(y + v * width);
        }
    }
    const long long rest = vectors * width + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) y[rest] = from_accumulate<T>(on_value(to_accumulate(x[rest]), rest));
}
