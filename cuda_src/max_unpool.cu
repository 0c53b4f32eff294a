// The inverse of max pooling: values go back to where their maxima were.
#include "numeric.cuh"
#include "reduce.cuh"

constexpr int kUnpoolThreads = 256;
constexpr int kUnpoolAtOnce = 4;  // loads of indices in flight

// kept = indices, and found[block] = whether one of those that the block looked at is outside 0 .. plane - 1.
//   indices, kept   [n]
//   found           [number of blocks]
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename Found>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_keep(const long long* indices, long long* kept, Found* found, long long plane, long long n) {
    int outside = 0;
    for (long long i = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; i < n;
         i += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long index = indices[i];
        kept[i] = index;
        outside |= index < 0 || index >= plane;
    }
    outside = __syncthreads_or(outside);
    if (threadIdx.x == 0) found[blockIdx.x] = static_cast<Found>(outside);
}

// y = 0, and each value at its index in the plane; of equal indices the last one counts, one outside the
// plane does not.
//   x, indices   [planes, values] T, int64
//   y            [planes, plane] T
//   segments     a warp has one of so many parts of a plane: nothing is written by two
// A warp reads the values of its plane in order, 32 at a time; of lanes with one index the last one writes.
// Launch: 1-D, kUnpoolThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward(const T* x, const long long* indices, T* y, long long planes, long long values,
                       long long plane, long long segments) {
    const int lane = threadIdx.x % kWarpThreads;
    const long long warp = (blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x) / kWarpThreads;
    const long long warps = gridDim.x * static_cast<long long>(kUnpoolThreads / kWarpThreads);
    const long long size = (plane + segments - 1) / segments;
    for (long long part = warp; part < planes * segments; part += warps) {
        const long long image = part / segments;
        const long long begin = (part - image * segments) * size;
        const long long end = begin + size < plane ? begin + size : plane;
        T* target = y + image * plane;
        for (long long i = begin + lane; i < end; i += kWarpThreads) target[i] = from_accumulate<T>(0);
        __syncwarp();
        for (long long first = 0; first < values; first += kWarpThreads) {
            const long long i = first + lane;
            const long long index = i < values ? indices[image * values + i] : -1;
            const bool mine = index >= begin && index < end;
            const unsigned int same = __match_any_sync(kFullWarp, index);
            if (mine && (same >> lane) == 1) target[index] = x[image * values + i];
            __syncwarp();
        }
    }
}

// The same for channels last.
//   x, indices   [samples, values, channels] T, int64
//   y            [samples, plane, channels] T
//   segments     a thread has one of so many parts of a channel's plane: nothing is written by two
// Threads side by side have channels side by side. A thread goes through the values of its channel in order,
// and reads some indices at a time before it writes the first of their values.
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward_last(const T* x, const long long* indices, T* y, long long samples, long long channels,
                            long long values, long long plane, long long segments) {
    const long long size = (plane + segments - 1) / segments;
    const long long total = samples * segments * channels;
    for (long long unit = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; unit < total;
         unit += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long part = unit / channels, channel = unit - part * channels;
        const long long sample = part / segments;
        const long long begin = (part - sample * segments) * size;
        const long long end = begin + size < plane ? begin + size : plane;
        T* target = y + sample * plane * channels + channel;
        for (long long i = begin; i < end; ++i) target[i * channels] = from_accumulate<T>(0);
        const long long source = sample * values * channels + channel;
#pragma unroll 1
        for (long long first = 0; first < values; first += kUnpoolAtOnce) {
            long long index[kUnpoolAtOnce];
#pragma unroll
            for (int k = 0; k < kUnpoolAtOnce; ++k)
                index[k] = first + k < values ? indices[source + (first + k) * channels] : -1;
#pragma unroll
            for (int k = 0; k < kUnpoolAtOnce; ++k) {
                if (index[k] >= begin && index[k] < end)
                    target[index[k] * channels] = x[source + (first + k) * channels];
            }
        }
    }
}

// dx = the gradient at each index; 0 for one outside the plane.
//   dy        [planes, plane] T
//   indices   [planes, values]
//   dx        [planes, values] T
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_backward(const T* dy, const long long* indices, T* dx, long long planes, long long values,
                        long long plane) {
    const long long total = planes * values;
    for (long long i = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; i < total;
         i += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long index = indices[i];
        const bool inside = index >= 0 && index < plane;
        dx[i] = inside ? dy[i / values * plane + index] : from_accumulate<T>(0);
    }
}

// The same for channels last.
//   dy        [samples, plane, channels] T
//   indices   [samples, values, channels]
//   dx        [samples, values, channels]
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_backward_last(const T* dy, const long long* indices, T* dx, long long samples,
                             long long channels, long long values, long long plane) {
    const long long sample_size = values * channels, total = samples * sample_size;
    for (long long i = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; i < total;
         i += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long index = indices[i];
        const bool inside = index >= 0 && index < plane;
        const long long place = i / sample_size * plane + index;
        dx[i] = inside ? dy[place * channels + i % channels] : from_accumulate<T>(0);
    }
}
