// One pass over contiguous arrays, element by element.
#pragma once

#include "vector_io.cuh"

constexpr int kElementwiseThreads = 256;
// Vectors of a thread in one step: as many loads are in flight before the first result is needed.
constexpr int kElementwiseUnroll = 2;

// y[i] = f(x[i]) for i in 0 .. n - 1, where f takes and returns accumulate_t<T>.
//   x, y   [n] T, 16-byte aligned; y may be x
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T, typename Function>
__device__ __forceinline__ void map_elements(const T* x, T* y, long long n, Function f) {
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
#pragma unroll
            for (int i = 0; i < width; ++i) values[u][i] = from_accumulate<T>(f(to_accumulate(values[u][i])));
            values[u].store(y + v * width);
        }
    }
    const long long rest = vectors * width + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) y[rest] = from_accumulate<T>(f(to_accumulate(x[rest])));
}

// z[i] = f(x[i], y[i]); otherwise as above.
template <typename T, typename Function>
__device__ __forceinline__ void map_element_pairs(const T* x, const T* y, T* z, long long n, Function f) {
    constexpr int width = kVectorWidth<T>;
    const long long vectors = n / width;
    const long long tile = static_cast<long long>(kElementwiseThreads) * kElementwiseUnroll;
    for (long long first = blockIdx.x * tile; first < vectors; first += gridDim.x * tile) {
        Vector<T> left[kElementwiseUnroll], right[kElementwiseUnroll];
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v >= vectors) break;
            left[u] = Vector<T>::load(x + v * width);
            right[u] = Vector<T>::load(y + v * width);
        }
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v >= vectors) break;
#pragma unroll
            for (int i = 0; i < width; ++i)
                left[u][i] = from_accumulate<T>(f(to_accumulate(left[u][i]), to_accumulate(right[u][i])));
            left[u].store(z + v * width);
        }
    }
    const long long rest = vectors * width + threadIdx.x;
    if (blockIdx.x == 0 && rest < n)
        z[rest] = from_accumulate<T>(f(to_accumulate(x[rest]), to_accumulate(y[rest])));
}
