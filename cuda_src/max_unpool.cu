// The inverse of max pooling: values go back to where their maxima were.
#include "division64.cuh"
#include "reduce.cuh"
#include "vector_io.cuh"

constexpr int kUnpoolThreads = 256;
constexpr int kUnpoolAtOnce = 4;  // loads of indices and of values in flight

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

// y[first] .. y[last - 1] = 0, by the lanes of a warp.
//   y   aligned to 16 bytes
template <typename T>
__device__ __forceinline__ void clear(T* y, long long first, long long last, int lane) {
    constexpr int kWidth = kVectorWidth<T>;
    const T zero = from_accumulate<T>(0);
    Vector<T> zeros;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) zeros[k] = zero;
    const long long begin = min((first + kWidth - 1) / kWidth * kWidth, last);
    const long long end = max(last / kWidth * kWidth, begin);
    if (first + lane < begin) y[first + lane] = zero;
    for (long long i = begin + lane * kWidth; i < end; i += kWarpThreads * kWidth) zeros.store(y + i);
    if (end + lane < last) y[end + lane] = zero;
}

// y = 0, and each value at its index in the plane; of equal indices the last one counts, one outside the
// plane does not.
//   x, indices   [planes, values] T, int64
//   y            [planes, plane] T, aligned to 16 bytes
//   chunks       of a plane, each for a warp: nothing is written by two
// A warp reads the values of its plane in order, 32 at a time; of lanes with one index the last one writes.
// Launch: 1-D, kUnpoolThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward(const T* x, const long long* indices, T* y, long long planes, long long values,
                       long long plane, long long chunks) {
    const int lane = threadIdx.x % kWarpThreads;
    const long long warp = (blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x) / kWarpThreads;
    const long long warps = gridDim.x * static_cast<long long>(kUnpoolThreads / kWarpThreads);
    const long long size = (plane + chunks - 1) / chunks;
    for (long long chunk = warp; chunk < planes * chunks; chunk += warps) {
        const long long image = chunk / chunks;
        const long long begin = (chunk - image * chunks) * size;
        const long long end = begin + size < plane ? begin + size : plane;
        T* target = y + image * plane;
        if (begin < end) clear(y, image * plane + begin, image * plane + end, lane);
        __syncwarp();
        for (long long first = 0; first < values; first += kUnpoolAtOnce * kWarpThreads) {
            long long index[kUnpoolAtOnce];
            T value[kUnpoolAtOnce];
#pragma unroll
            for (int u = 0; u < kUnpoolAtOnce; ++u) {
                const long long i = first + u * kWarpThreads + lane;
                index[u] = -1;
                if (i < values) {
                    index[u] = indices[image * values + i];
                    value[u] = x[image * values + i];
                }
            }
#pragma unroll
            for (int u = 0; u < kUnpoolAtOnce; ++u) {
                const bool mine = index[u] >= begin && index[u] < end;
                const unsigned int same = __match_any_sync(kFullWarp, index[u]);
                if (mine && (same >> lane) == 1) target[index[u]] = value[u];
                __syncwarp();
            }
        }
    }
}

// The same for channels last.
//   x, indices   [samples, values, channels] T, int64
//   y            [samples, plane, channels] T
//   chunks       of a channel's plane, each for a thread: nothing is written by two
// Threads side by side have channels side by side. A thread goes through the values of its channel in order,
// and reads some indices at a time before it writes the first of their values.
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward_last(const T* x, const long long* indices, T* y, long long samples, long long channels,
                            long long values, long long plane, long long chunks) {
    const long long size = (plane + chunks - 1) / chunks;
    const long long total = samples * chunks * channels;
    for (long long unit = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; unit < total;
         unit += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long chunk = unit / channels, channel = unit - chunk * channels;
        const long long sample = chunk / chunks;
        const long long begin = (chunk - sample * chunks) * size;
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
//   dy          [samples, plane, channels] T; planes one after another are samples of one channel
//   indices     [samples, values, channels], aligned to 16 bytes
//   dx          [samples, values, channels] T, aligned to 16 bytes
//   total       elements of dx
//   by_sample   divides by those of a sample, by_channel by channels
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride); a thread has a vector of dx.
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_backward(const T* dy, const long long* indices, T* dx, long long total, long long channels,
                        long long plane, Divisor64 by_sample, Divisor64 by_channel) {
    constexpr int kWidth = kVectorWidth<T>;
    const long long vectors = (total + kWidth - 1) / kWidth;
    const long long sample_size = static_cast<long long>(by_sample.divisor);
    for (long long v = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; v < vectors;
         v += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long first = v * kWidth;
        const bool whole = first + kWidth <= total;
        Vector<long long, kWidth> index;
        if (whole) {
            index = Vector<long long, kWidth>::load(indices + first);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) index[k] = first + k < total ? indices[first + k] : -1;
        }
        const long long sample = static_cast<long long>(by_sample.quotient(first));
        const T* image = dy + sample * plane * channels;
        long long at = first - sample * sample_size;
        long long channel = at - static_cast<long long>(by_channel.quotient(at)) * channels;
        Vector<T> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const bool inside = index[k] >= 0 && index[k] < plane;
            result[k] = inside ? image[index[k] * channels + channel] : from_accumulate<T>(0);
            if (++channel == channels) channel = 0;
            if (++at == sample_size) {
                at = 0;
                image += plane * channels;
            }
        }
        if (whole) {
            result.store(dx + first);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                if (first + k < total) dx[first + k] = result[k];
            }
        }
    }
}
