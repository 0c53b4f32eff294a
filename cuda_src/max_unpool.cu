// The inverse of max pooling: values go back to where their maxima were.
#include "division64.cuh"
#include "dynamic_shared.cuh"
#include "fast_division.cuh"
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

// y = 0, and each value at its index in the plane; of equal indices the last one counts, one outside the
// plane does not.
//   x, indices   [planes, values] T, int64
//   kept         a copy of the indices, or null
//   y            [planes, plane] T, aligned to 16 bytes
//   together     planes of a block, or 1 where a plane has several chunks, of `size` places each but the last
//   by_values    divides by values
//   Packed       half types, fewer than 2^16 values in a block: a value is kept with its number
// A block finds the last value of each of its places in shared memory, and then writes them in order.
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride); shared memory for an int a place, and for
// two vectors of them.
template <typename T, bool Packed>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward(const T* x, const long long* indices, long long* kept, T* y, long long planes,
                       long long values, long long plane, int together, long long chunks, int size,
                       Divisor32 by_values) {
    constexpr int kWidth = kVectorWidth<T>;
    DYNAMIC_SHARED(slots);
    unsigned int* const last = reinterpret_cast<unsigned int*>(slots);
    const long long units = (planes + together - 1) / together * chunks;
    for (long long unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const long long group = unit / chunks, begin = (unit - group * chunks) * size;
        const int places = static_cast<int>(min(plane - begin, static_cast<long long>(size)));
        const int count = static_cast<int>(min(planes - group * together, static_cast<long long>(together)));
        const long long start = group * together * plane + begin;
        // The first place is in the slot that it has in its vector of y.
        const int lead = static_cast<int>(start % kWidth), end = lead + count * places;
        for (int i = threadIdx.x; i * 4 < end + kWidth; i += kUnpoolThreads)
            slots[i] = make_uint4(0, 0, 0, 0);
        const T* const source = x + group * together * values;
        const long long* const targets = indices + group * together * values;
        const long long every = count * values;
        const bool keeps = kept != nullptr && begin == 0;
        __syncthreads();
        for (long long first = threadIdx.x; first < every; first += kUnpoolAtOnce * kUnpoolThreads) {
            long long index[kUnpoolAtOnce];
            unsigned int value[kUnpoolAtOnce];
#pragma unroll
            for (int u = 0; u < kUnpoolAtOnce; ++u) {
                const long long i = first + u * kUnpoolThreads;
                index[u] = -1;
                if (i >= every) continue;
                index[u] = targets[i];
                if constexpr (Packed) {
                    value[u] = reinterpret_cast<const unsigned short*>(source)[i];
                } else if (threadIdx.x % kWarpThreads == 0) {
                    // They are read from everywhere when all places are known.
                    prefetch(source + i);
                }
            }
#pragma unroll
            for (int u = 0; u < kUnpoolAtOnce; ++u) {
                const unsigned int i = static_cast<unsigned int>(first) + u * kUnpoolThreads;
                if (keeps && first + u * kUnpoolThreads < every)
                    kept[group * together * values + first + u * kUnpoolThreads] = index[u];
                const long long at = index[u] - begin;
                if (at < 0 || at >= places) continue;
                const int own = together == 1 ? 0 : by_values.quotient(static_cast<int>(i)) * places;
                atomicMax(&last[lead + own + static_cast<int>(at)],
                          Packed ? (i + 1) << 16 | value[u] : i + 1);
            }
        }
        __syncthreads();
        T* const target = y + (start - lead);
        for (int v = threadIdx.x; v * kWidth < end; v += kUnpoolThreads) {
            const auto chosen = Vector<unsigned int, kWidth>::load(last + v * kWidth);
            Vector<T> result;
            if constexpr (Packed) {
#pragma unroll
                for (int k = 0; k < kWidth; k += 2)
                    reinterpret_cast<unsigned int*>(result.words)[k / 2] =
                        __byte_perm(chosen[k], chosen[k + 1], 0x5410);
            } else {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    result[k] = from_accumulate<T>(0);
                    if (chosen[k] != 0) result[k] = source[chosen[k] - 1];
                }
            }
            if (v * kWidth >= lead && (v + 1) * kWidth <= end) {
                result.store(target + v * kWidth);
            } else {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    if (v * kWidth + k >= lead && v * kWidth + k < end) target[v * kWidth + k] = result[k];
                }
            }
        }
        __syncthreads();
    }
}

// The same for channels last.
//   x, indices   [samples, values, channels] T, int64
//   kept         as there
//   y            [samples, plane, channels] T
//   chunks       of a channel's plane, each for a thread: nothing is written by two
// Threads side by side have channels side by side. A thread goes through the values of its channel in order,
// and reads some indices at a time before it writes the first of their values.
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward_last(const T* x, const long long* indices, long long* kept, T* y, long long samples,
                            long long channels, long long values, long long plane, long long chunks) {
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
            for (int k = 0; k < kUnpoolAtOnce; ++k) {
                index[k] = -1;
                if (first + k >= values) continue;
                index[k] = indices[source + (first + k) * channels];
            }
#pragma unroll
            for (int k = 0; k < kUnpoolAtOnce; ++k) {
                if (kept != nullptr && begin == 0 && first + k < values)
                    kept[source + (first + k) * channels] = index[k];
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
