// One pass over contiguous arrays, element by element.
#pragma once

#include "vector_io.cuh"

constexpr int kElementwiseThreads = 256;
// Vectors of a thread in one step: as many loads are in flight before the first result is needed.
constexpr int kElementwiseUnroll = 2;

// Element `at` of an array of fewer than 2^32 bytes: the distance is not a number of 64 bits.
template <typename T>
__device__ __forceinline__ const T* element_at(const T* array, unsigned int at) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(array) +
                                      at * static_cast<unsigned int>(sizeof(T)));
}
template <typename T>
__device__ __forceinline__ T* element_at(T* array, unsigned int at) {
    return const_cast<T*>(element_at(static_cast<const T*>(array), at));
}

// What a thread has of a tile of elements: up to Unroll times Width neighbours. All but `place` is the same
// for all threads of a block.
template <int Unroll, int Width>
struct TilePart {
    static constexpr int kTile = kElementwiseThreads * Unroll * Width;

    long long first;     // element of the tile
    unsigned int left;   // elements of the tile
    unsigned int place;  // of the thread's first element in it

    __device__ __forceinline__ unsigned int at(int u) const {
        return place + u * kElementwiseThreads * Width;
    }
    __device__ __forceinline__ bool has(int u) const { return at(u) < left; }

    // Part of the neighbours at each of the thread's places, from `done` on.
    template <typename T, int Part>
    __device__ __forceinline__ void load(Vector<T, Part> (&values)[Unroll], const T* source,
                                         int done = 0) const {
        source += first + done;
#pragma unroll
        for (int u = 0; u < Unroll; ++u) {
            if (has(u)) values[u] = Vector<T, Part>::load(element_at(source, at(u)));
        }
    }

    template <typename T, int Part>
    __device__ __forceinline__ void store(const Vector<T, Part> (&values)[Unroll], T* target,
                                          int done = 0) const {
        target += first + done;
#pragma unroll
        for (int u = 0; u < Unroll; ++u) {
            if (has(u)) values[u].store(element_at(target, at(u)));
        }
    }

    // f(positions), where each is the index of its first element in the whole.
    template <typename Function>
    __device__ __forceinline__ auto with_positions(Function f) const {
        long long positions[Unroll];
#pragma unroll
        for (int u = 0; u < Unroll; ++u) positions[u] = first + at(u);
        return f(positions);
    }
};

// Calls on_tile for the tiles of n elements, a multiple of Width.
//   for_each_tile<2, 8>(n, [&](const TilePart<2, 8>& part) {
//       Vector<T, 8> values[2];
//       part.load(values, x);  // change them, then
//       part.store(values, y);
//   });
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <int Unroll, int Width, typename OnTile>
__device__ __forceinline__ void for_each_tile(long long n, OnTile on_tile) {
    constexpr int tile = TilePart<Unroll, Width>::kTile;
    for (long long first = blockIdx.x * static_cast<long long>(tile); first < n;
         first += gridDim.x * static_cast<long long>(tile)) {
        const unsigned int left = static_cast<unsigned int>(min(n - first, static_cast<long long>(tile)));
        on_tile(TilePart<Unroll, Width>{first, left, threadIdx.x * Width});
    }
}

// Copies x to y, some vectors at a time and what is left one by one, changed on the way.
//   x, y         [n] T, 16-byte aligned; y may be x
//   on_vectors   called with a thread's vectors of a tile, and where they are: changes them
//   on_value     called with a value, and its index: returns what becomes of it
//   map_vectors(x, y, n, [&](Vector<T>(&values)[kElementwiseUnroll], const auto& part) { change(values); },
//               [&](accumulate_t<T> value, long long i) { return changed(value); });
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T, typename OnVectors, typename OnValue>
__device__ __forceinline__ void map_vectors(const T* x, T* y, long long n, OnVectors on_vectors,
                                            OnValue on_value) {
    constexpr int width = kVectorWidth<T>, unroll = kElementwiseUnroll;
    const long long whole = n / width * width;
    for_each_tile<unroll, width>(whole, [&](const TilePart<unroll, width>& part) {
        Vector<T> values[unroll];
        part.load(values, x);
        on_vectors(values, part);
        part.store(values, y);
    });
    const long long rest = whole + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) y[rest] = from_accumulate<T>(on_value(to_accumulate(x[rest]), rest));
}
