// Pooling of whole planes: one output for each, whatever its size.
#include "argmax.cuh"
#include "division64.cuh"
#include "reduce.cuh"

constexpr int kGlobalThreads = 256;

// Planes in memory one after another (channels first), or side by side (channels last, as vectors).
struct GlobalLayout {
    long long planes;     // of all samples; of one, for rows: vectors of channels
    long long positions;  // of a plane
    long long samples;    // rows only
    int lanes;            // threads of a plane, a power of two: a part of a warp, or the block; of a row
    int argmax_bytes;
};

static_assert(sizeof(GlobalLayout) == 32, "the launcher packs it with this size");

// The largest of some values and its position: the first of equal ones, the last of several NaN. The same
// whatever the order they come in.
template <typename A>
struct Largest {
    static constexpr int kTakes = 1024;  // see reduce_nchw
    A value;
    int position;

    static __device__ __forceinline__ Largest identity() {
        Largest none;
        set_negative_infinity(none.value);
        none.position = 0x7fffffff;
        return none;
    }
    __device__ __forceinline__ void take(A other, int at) {
        // Of later positions only.
        if (other > value || other != other || position == 0x7fffffff) {
            value = other;
            position = at;
        }
    }
    __device__ __forceinline__ Largest combine(const Largest& other) const {
        const bool nan = value != value, other_nan = other.value != other.value;
        bool keep = value > other.value || (value == other.value && position < other.position);
        if (nan || other_nan) keep = nan && !(other_nan && other.position > position);
        return keep ? *this : other;
    }
    __device__ __forceinline__ Largest shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, value, delta), __shfl_down_sync(kFullWarp, position, delta)};
    }
};

// A sum. Values that are taken are added as they are, sums that are combined with compensation.
template <typename A>
struct Sum {
    static constexpr int kTakes = 32;
    A value, lost;

    static __device__ __forceinline__ Sum identity() { return {A(0), A(0)}; }
    __device__ __forceinline__ void take(A other, int) { value += other; }
    __device__ __forceinline__ Sum combine(const Sum& other) const {
        Sum both{value, lost + other.lost};
        add_compensated(both.value, both.lost, other.value);
        return both;
    }
    __device__ __forceinline__ Sum shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, value, delta), __shfl_down_sync(kFullWarp, lost, delta)};
    }
    __device__ __forceinline__ A times(A factor) const { return compensated(value, lost) * factor; }
};

// Calls finish(plane, value) in one thread of each plane, with the value of all its elements.
//   x   [planes, positions] T, aligned to 16 bytes
// A thread combines the values of kTakes elements each.
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename Value, typename T, typename Finish>
__device__ __forceinline__ void reduce_nchw(const T* x, const GlobalLayout& layout, Finish finish) {
    __shared__ Value warp_values[kGlobalThreads / kWarpThreads];
    constexpr int kWidth = kVectorWidth<T>;
    const int lane = threadIdx.x & (layout.lanes - 1);
    const int planes_of_block = kGlobalThreads / layout.lanes;
    const bool aligned = layout.positions % kWidth == 0;
    for (long long first = static_cast<long long>(blockIdx.x) * planes_of_block; first < layout.planes;
         first += static_cast<long long>(gridDim.x) * planes_of_block) {
        const long long plane = first + threadIdx.x / layout.lanes;
        const T* source = x + plane * layout.positions;
        const int positions = plane < layout.planes ? static_cast<int>(layout.positions) : 0;
        Value value = Value::identity();
        if (aligned) {
            const int step = layout.lanes * kWidth;
            for (int i = lane * kWidth; i < positions;) {
                const int end = min(positions - i, step * (Value::kTakes / kWidth)) + i;
                Value some = Value::identity();
#pragma unroll 4
                for (; i < end; i += step) {
                    const Vector<T> values = Vector<T>::load(source + i);
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) some.take(to_accumulate(values[k]), i + k);
                }
                value = value.combine(some);
            }
        } else {
            for (int i = lane; i < positions;) {
                const int end = min(positions - i, layout.lanes * Value::kTakes) + i;
                Value some = Value::identity();
#pragma unroll 4
                for (; i < end; i += layout.lanes) some.take(to_accumulate(source[i]), i);
                value = value.combine(some);
            }
        }
        if (layout.lanes == kGlobalThreads) {
            value = block_reduce(value, warp_values);
            __syncthreads();
        } else {
            for (int delta = layout.lanes / 2; delta > 0; delta /= 2)
                value = value.combine(value.shuffled_down(delta));
        }
        if (lane == 0 && plane < layout.planes) finish(plane, value);
    }
}

// y = largest value of each plane, and its position.
//   x      [planes, positions] T, aligned to 16 bytes
//   y      [planes] T
//   argmax   [planes], layout.argmax_bytes each
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_max_nchw(const T* x, T* y, unsigned char* argmax, GlobalLayout layout) {
    using A = accumulate_t<T>;
    reduce_nchw<Largest<A>>(x, layout, [&](long long plane, const Largest<A>& largest) {
        const int chosen[1] = {largest.position};
        y[plane] = from_accumulate<T>(largest.value);
        store_argmax<1>(argmax, plane, chosen, layout.argmax_bytes);
    });
}

// y = sum of each plane times factor. In an order that depends on the plane's size alone: no value passes
// through more additions than 32 without compensation.
//   x   [planes, positions] T, aligned to 16 bytes
//   y   [planes] T
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_avg_nchw(const T* x, T* y, accumulate_t<T> factor, GlobalLayout layout) {
    using A = accumulate_t<T>;
    reduce_nchw<Sum<A>>(x, layout, [&](long long plane, const Sum<A>& sum) {
        y[plane] = from_accumulate<T>(sum.times(factor));
    });
}

// Calls finish(vector, values) in one thread of each vector of channels.
//   x   [samples, positions, planes] of Width T, aligned to 16 bytes
// Launch: 1-D, kGlobalThreads, one block for each sample and each `lanes` of its vectors.
template <typename Value, typename T, typename Finish>
__device__ __forceinline__ void reduce_nhwc(const T* x, const GlobalLayout& layout, Finish finish) {
    constexpr int kWidth = kVectorWidth<T>;
    __shared__ Value partial[kGlobalThreads][kWidth];
    const int lanes = layout.lanes, slots = kGlobalThreads / lanes;
    const int lane = threadIdx.x & (lanes - 1), slot = threadIdx.x / lanes;
    const long long tiles = (layout.planes + lanes - 1) / lanes;
    const long long sample = blockIdx.x / tiles;
    const long long vector = (blockIdx.x - sample * tiles) * lanes + lane;
    Value values[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = Value::identity();
    if (vector < layout.planes) {
        const T* source = x + (sample * layout.positions * layout.planes + vector) * kWidth;
        const int positions = static_cast<int>(layout.positions);
        for (int i = slot; i < positions;) {
            const int end = min(positions - i, slots * Value::kTakes) + i;
            Value some[kWidth];
#pragma unroll
            for (int k = 0; k < kWidth; ++k) some[k] = Value::identity();
#pragma unroll 2
            for (; i < end; i += slots) {
                const Vector<T> loaded = Vector<T>::load(source + i * layout.planes * kWidth);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) some[k].take(to_accumulate(loaded[k]), i);
            }
#pragma unroll
            for (int k = 0; k < kWidth; ++k) values[k] = values[k].combine(some[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) partial[threadIdx.x][k] = values[k];
    __syncthreads();
    if (slot > 0 || vector >= layout.planes) return;
    for (int other = 1; other < slots; ++other) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] = values[k].combine(partial[other * lanes + lane][k]);
    }
    finish(sample * layout.planes + vector, values);
}

// As global_max_nchw, of channels side by side.
//   x      [samples, positions, planes] of Width T, aligned to 16 bytes
//   y      [samples, planes] of Width T
//   argmax   [samples, planes] of Width; layout.argmax_bytes each
// Launch: 1-D, kGlobalThreads, one block for each sample and each `lanes` of its vectors.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_max_nhwc(const T* x, T* y, unsigned char* argmax, GlobalLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    reduce_nhwc<Largest<A>>(x, layout, [&](long long vector, const Largest<A>(&largest)[kWidth]) {
        Vector<T> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const int chosen[1] = {largest[k].position};
            result[k] = from_accumulate<T>(largest[k].value);
            store_argmax<1>(argmax, vector * kWidth + k, chosen, layout.argmax_bytes);
        }
        result.store(y + vector * kWidth);
    });
}

// As global_avg_nchw, of channels side by side.
//   x   [samples, positions, planes] of Width T, aligned to 16 bytes
//   y   [samples, planes] of Width T
// Launch: 1-D, kGlobalThreads, one block for each sample and each `lanes` of its vectors.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_avg_nhwc(const T* x, T* y, accumulate_t<T> factor, GlobalLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    reduce_nhwc<Sum<A>>(x, layout, [&](long long vector, const Sum<A>(&sums)[kWidth]) {
        Vector<T> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) result[k] = from_accumulate<T>(sums[k].times(factor));
        result.store(y + vector * kWidth);
    });
}

// dx = dy * factor at every position of the plane; with argmax, at the one that was chosen, and 0 elsewhere.
//   dy      [planes] T
//   argmax    [planes], layout.argmax_bytes each, or null
//   dx      [planes, positions] T, aligned to 16 bytes: every element is written once
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_spread_nchw(const T* dy, const unsigned char* argmax, T* dx, accumulate_t<T> factor,
                       Divisor64 by_positions, GlobalLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    constexpr int kBlockElements = kGlobalThreads * kWidth;
    const long long total = layout.planes * layout.positions;
    const int positions = static_cast<int>(layout.positions);
    for (long long first = static_cast<long long>(blockIdx.x) * kBlockElements; first < total;
         first += static_cast<long long>(gridDim.x) * kBlockElements) {
        const long long start = first + threadIdx.x * kWidth;
        if (start >= total) break;
        long long plane = static_cast<long long>(by_positions.quotient(start));
        int at = static_cast<int>(start - plane * layout.positions);
        Vector<T> result;
        A gradient = A(0);
        int chosen[1] = {0};
#pragma unroll
        for (int k = 0; k < kWidth; ++k, ++at) {
            if (at == positions) {
                at = 0;
                ++plane;
            }
            if ((k == 0 || at == 0) && plane < layout.planes) {
                gradient = fma(to_accumulate(dy[plane]), factor, A(0));
                if (argmax != nullptr) load_argmax<1>(argmax, plane, chosen, layout.argmax_bytes);
            }
            result[k] = from_accumulate<T>(argmax != nullptr && chosen[0] != at ? A(0) : gradient);
        }
        if (start + kWidth <= total) {
            result.store(dx + start);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                if (start + k < total) dx[start + k] = result[k];
            }
        }
    }
}

// As global_spread_nchw, of channels side by side.
//   dy, argmax   [samples, planes] of Width T, aligned to 16 bytes, and of Width taps
//   dx         [samples, positions, planes] of Width T
//   chunks     blocks that share the positions of a sample
// Launch: 1-D, kGlobalThreads, `chunks` blocks for each sample and each `lanes` of its vectors.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_spread_nhwc(const T* dy, const unsigned char* argmax, T* dx, accumulate_t<T> factor, int chunks,
                       GlobalLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    const int lanes = layout.lanes, rows = kGlobalThreads / lanes;
    const int tiles = static_cast<int>((layout.planes + lanes - 1) / lanes);
    const int chunk = blockIdx.x % chunks, tile = blockIdx.x / chunks % tiles;
    const long long sample = blockIdx.x / chunks / tiles;
    const long long plane = static_cast<long long>(tile) * lanes + threadIdx.x % lanes;
    if (plane >= layout.planes) return;
    const long long vector = sample * layout.planes + plane;
    const Vector<T> gradients = Vector<T>::load(dy + vector * kWidth);
    Vector<T> share;
    int chosen[kWidth] = {};
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        share[k] = from_accumulate<T>(fma(widened(gradients, k), factor, A(0)));
        int tap[1] = {0};
        if (argmax != nullptr) load_argmax<1>(argmax, vector * kWidth + k, tap, layout.argmax_bytes);
        chosen[k] = tap[0];
    }
    const int positions = static_cast<int>(layout.positions);
    T* start = dx + (sample * layout.positions * layout.planes + plane) * kWidth;
#pragma unroll 1
    for (int at = chunk * rows + threadIdx.x / lanes; at < positions; at += chunks * rows) {
        Vector<T> result = share;
        if (argmax != nullptr) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                if (chosen[k] != at) result[k] = from_accumulate<T>(A(0));
            }
        }
        result.store(start + at * layout.planes * kWidth);
    }
}
