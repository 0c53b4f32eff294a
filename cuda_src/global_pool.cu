// Pooling of whole planes: one output for each, whatever its size.
#include "argmax.cuh"
#include "division64.cuh"
#include "fast_division.cuh"
#include "pool_reduction.cuh"

constexpr int kGlobalThreads = 256;
// Vectors of a thread, of one plane after another, that are in flight together.
constexpr int kGlobalAtOnce = 4;
// Planes of each lanes of small planes; and their elements, which a block keeps in shared memory.
template <typename T>
constexpr int kStagedPlanes = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kStaged = 4096 * kStagedPlanes<T>;

// Planes in memory one after another (channels first), or side by side (channels last, as vectors).
struct GlobalLayout {
    long long planes;     // of all samples; side by side: vectors of channels of a sample
    long long positions;  // of a plane
    long long samples;    // side by side only
    long long chunk;  // positions of a chunk of a plane, whole vectors; chunks are reduced apart, then merged
    int chunks;       // of a plane
    int lanes;        // threads of a chunk, a power of two: of a warp, or the block; side by side: of a row
    int argmax_bytes;
    int staged;  // whether planes that are no whole vectors come by way of shared memory
};

static_assert(sizeof(GlobalLayout) == 48, "the launcher packs it with this size");

// Takes vectors first, first + step, ... of the values before `end`. Values of kTakes elements are combined
// with what was there before.
//   source   aligned to a vector of Width, as are first and step
//   before   positions of the plane before source
template <int Width, typename Value, typename T>
__device__ __forceinline__ void take_strided(const T* source, int first, int end, int step, long long before,
                                             Value& value) {
    constexpr int kRounds = Value::kTakes / Width;
    const auto take = [&](Value& some, const Vector<T, Width>& values, int i) {
#pragma unroll
        for (int k = 0; k < Width; ++k) some.take(widened(values, k), before + i + k);
    };
#pragma unroll 1
    for (int i = first; i < end;) {
        Value some = Value::from(before + i);
        int round = 0;
#pragma unroll 1
        for (; round < kRounds && i + (kGlobalAtOnce - 1) * step < end; round += kGlobalAtOnce) {
            Vector<T, Width> values[kGlobalAtOnce];
#pragma unroll
            for (int u = 0; u < kGlobalAtOnce; ++u) values[u] = Vector<T, Width>::load(source + i + u * step);
#pragma unroll
            for (int u = 0; u < kGlobalAtOnce; ++u) take(some, values[u], i + u * step);
            i += kGlobalAtOnce * step;
        }
#pragma unroll 1
        for (; round < kRounds && i < end; ++round, i += step)
            take(some, Vector<T, Width>::load(source + i), i);
        value = value.combine(some);
    }
}

// Combines the values of each `lanes` threads; the first of them gets the result. All threads must call it.
template <typename Value>
__device__ __forceinline__ Value combine_lanes(Value value, int lanes) {
    __shared__ Value warp_values[kGlobalThreads / kWarpThreads];
    if (lanes == kGlobalThreads) {
        value = block_reduce(value, warp_values);
        __syncthreads();
        return value;
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = value.combine(value.shuffled_xor(mask));
    return value;
}

// Calls finish(chunk, value) in one thread of each chunk of a plane, with the value of all its elements.
//   x   [planes, positions] T, aligned to 16 bytes
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename Value, typename T, typename Finish>
__device__ __forceinline__ void reduce_strided(const T* x, const GlobalLayout& layout, Finish finish) {
    constexpr int kWidth = kVectorWidth<T>;
    const int lanes = layout.lanes, lane = threadIdx.x & (lanes - 1);
    const int chunks_of_block = kGlobalThreads / lanes;
    const long long chunks = layout.planes * layout.chunks;
    for (long long first = static_cast<long long>(blockIdx.x) * chunks_of_block; first < chunks;
         first += static_cast<long long>(gridDim.x) * chunks_of_block) {
        const long long chunk = first + threadIdx.x / lanes;
        const long long plane = layout.chunks == 1 ? chunk : chunk / layout.chunks;
        const long long before = (chunk - plane * layout.chunks) * layout.chunk;
        const T* source = x + plane * layout.positions + before;
        const int end = chunk < chunks ? static_cast<int>(min(layout.chunk, layout.positions - before)) : 0;
        Value value = Value::identity();
        if (layout.positions % kWidth == 0) {
            take_strided<kWidth>(source, lane * kWidth, end, lanes * kWidth, before, value);
        } else {
            take_strided<1>(source, lane, end, lanes, before, value);
        }
        value = combine_lanes(value, lanes);
        if (lane == 0 && chunk < chunks) finish(chunk, value);
    }
}

// The same for whole planes of few positions, by way of shared memory: planes that are no whole vectors are
// so together.
//   layout   lanes at most 32, planes of a block at most kStaged<T> elements
//   stage    shared memory for so many
//   Lanes    of the layout, where they are known; or 0
template <typename Value, int Lanes, typename T, typename Finish>
__device__ __forceinline__ void reduce_staged(const T* x, const GlobalLayout& layout, uint4* stage,
                                              Finish finish) {
    constexpr int kWidth = kVectorWidth<T>, kVectors = kStaged<T> / kWidth;
    constexpr int kPlanes = kStagedPlanes<T>;
    T* staged = reinterpret_cast<T*>(stage);
    const int positions = static_cast<int>(layout.positions), lanes = Lanes > 0 ? Lanes : layout.lanes;
    const int log2_lanes = __ffs(lanes) - 1, groups = kGlobalThreads >> log2_lanes;
    const int group = static_cast<int>(threadIdx.x) >> log2_lanes, lane = threadIdx.x & (lanes - 1);
    const int planes = groups * kPlanes;
    const long long begin = static_cast<long long>(blockIdx.x) * planes;
    for (long long first = begin; first < layout.planes;
         first += static_cast<long long>(gridDim.x) * planes) {
        const T* source = x + first * positions;
        const int here = static_cast<int>(min(static_cast<long long>(planes), layout.planes - first));
        const int count = here * positions, whole = count / kWidth;
        Vector<T> loaded[kVectors / kGlobalThreads];
#pragma unroll
        for (int u = 0; u < kVectors / kGlobalThreads; ++u) {
            const int v = u * kGlobalThreads + threadIdx.x;
            if (v < whole) loaded[u] = Vector<T>::load(source + v * kWidth);
        }
        if (first != begin) __syncthreads();
#pragma unroll
        for (int u = 0; u < kVectors / kGlobalThreads; ++u) {
            const int v = u * kGlobalThreads + threadIdx.x;
            if (v < whole) stage[v] = loaded[u].words[0];
        }
        const int rest = whole * kWidth + threadIdx.x;
        if (rest < count) staged[rest] = source[rest];
        __syncthreads();
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
            const int plane = p * groups + group;
            Value value = Value::identity();
            if (plane < here && lane < positions) {
                value = Value::from(lane);
                const T* const own = staged + plane * positions + lane;
                // All lanes have these.
                const int whole_rounds = positions >> log2_lanes;
#pragma unroll 4
                for (int round = 0; round < whole_rounds; ++round)
                    value.take(to_accumulate(own[round * lanes]), round * lanes + lane);
                const int i = whole_rounds * lanes;
                if (i + lane < positions) value.take(to_accumulate(own[i]), i + lane);
            }
            value = combine_lanes(value, lanes);
            if (lane == 0 && plane < here) finish(first + plane, value);
        }
    }
}

template <typename Value, typename T, typename Finish>
__device__ __forceinline__ void reduce_nchw(const T* x, const GlobalLayout& layout, Finish finish) {
    __shared__ uint4 stage[kStaged<T> / kVectorWidth<T>];
    if (layout.staged) {
        if (layout.lanes == 4) {
            reduce_staged<Value, 4>(x, layout, stage, finish);
        } else {
            reduce_staged<Value, 0>(x, layout, stage, finish);
        }
    } else {
        reduce_strided<Value>(x, layout, finish);
    }
}

// Calls finish(chunk, value) in one thread of each chunk of a channel's plane.
//   x   [samples, positions, planes] of Width T, aligned to 16 bytes
// Launch: 1-D, kGlobalThreads, one block for each chunk of each sample and each `lanes` of its vectors.
template <typename Value, int Width, typename T, typename Finish>
__device__ __forceinline__ void reduce_nhwc(const T* x, const GlobalLayout& layout, Finish finish) {
    __shared__ Value partial[kGlobalThreads][Width];
    const int lanes = layout.lanes, log2_lanes = __ffs(lanes) - 1, slots = kGlobalThreads >> log2_lanes;
    const int lane = threadIdx.x & (lanes - 1), slot = static_cast<int>(threadIdx.x) >> log2_lanes;
    const int tiles = static_cast<int>((layout.planes + lanes - 1) >> log2_lanes);
    const int block = blockIdx.x / layout.chunks, chunk = blockIdx.x - block * layout.chunks;
    const int sample = block / tiles, vector = (block - sample * tiles) * lanes + lane;
    Value values[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) values[k] = Value::identity();
    if (vector < layout.planes) {
        const long long before = chunk * layout.chunk;
        const int end = static_cast<int>(min(layout.chunk, layout.positions - before));
        const long long step = slots * layout.planes * Width;
        const T* source = x + ((sample * layout.positions + before + slot) * layout.planes + vector) * Width;
#pragma unroll 1
        for (int i = slot; i < end;) {
            Value some[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) some[k] = Value::from(before + i);
#pragma unroll 1
            for (int round = 0; round < Value::kTakes && i < end; round += Value::kAtOnce) {
                Vector<T, Width> loaded[Value::kAtOnce];
#pragma unroll
                for (int u = 0; u < Value::kAtOnce; ++u) {
                    if (i + u * slots < end) loaded[u] = Vector<T, Width>::load(source + u * step);
                }
#pragma unroll
                for (int u = 0; u < Value::kAtOnce; ++u) {
                    if (i + u * slots >= end) break;
#pragma unroll
                    for (int k = 0; k < Width; ++k)
                        some[k].take(widened(loaded[u], k), before + i + u * slots);
                }
                i += Value::kAtOnce * slots;
                source += Value::kAtOnce * step;
            }
#pragma unroll
            for (int k = 0; k < Width; ++k) values[k] = values[k].combine(some[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < Width; ++k) partial[threadIdx.x][k] = values[k];
    __syncthreads();
    if (slot > 0 || vector >= layout.planes) return;
    for (int other = 1; other < slots; ++other) {
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = values[k].combine(partial[other * lanes + lane][k]);
    }
    const long long plane = (static_cast<long long>(sample) * layout.planes + vector) * Width;
#pragma unroll
    for (int k = 0; k < Width; ++k) finish((plane + k) * layout.chunks + chunk, values[k]);
}

// Calls finish(plane, value) in one thread of each plane, with the values of its chunks combined in their
// order.
//   partials   [planes, chunks] Value
//   layout     planes, chunks, lanes: threads of a plane
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename Value, typename Finish>
__device__ __forceinline__ void merge_chunks(const unsigned char* partials, const GlobalLayout& layout,
                                             Finish finish) {
    const int lanes = layout.lanes, lane = threadIdx.x & (lanes - 1);
    const int planes_of_block = kGlobalThreads / lanes;
    for (long long first = static_cast<long long>(blockIdx.x) * planes_of_block; first < layout.planes;
         first += static_cast<long long>(gridDim.x) * planes_of_block) {
        const long long plane = first + threadIdx.x / lanes;
        Value value = Value::identity();
        if (plane < layout.planes) {
            for (int i = lane; i < layout.chunks; i += lanes)
                value = value.combine(Value::load(partials, plane * layout.chunks + i));
        }
        value = combine_lanes(value, lanes);
        if (lane == 0 && plane < layout.planes) finish(plane, value);
    }
}

// What becomes of the largest value of a plane.
template <typename T>
struct MaxOutput {
    T* y;
    unsigned char *argmax, *partials;
    int argmax_bytes;

    __device__ __forceinline__ void operator()(long long i, const Largest<accumulate_t<T>>& largest) const {
        if (partials != nullptr) {
            largest.store(partials, i);
            return;
        }
        const int chosen[1] = {largest.position};
        y[i] = from_accumulate<T>(largest.value);
        store_argmax<1>(argmax, i, chosen, argmax_bytes);
    }
};

// What becomes of the sum of a plane.
template <typename T>
struct AvgOutput {
    T* y;
    accumulate_t<T> factor;
    unsigned char* partials;

    __device__ __forceinline__ void operator()(long long i, const Sum<accumulate_t<T>>& sum) const {
        if (partials != nullptr) {
            sum.store(partials, i);
        } else {
            y[i] = from_accumulate<T>(sum.times(factor));
        }
    }
};

// y = largest value of each plane, and its position.
//   x          [planes, positions] T, aligned to 16 bytes
//   y          [planes] T
//   argmax     [planes], layout.argmax_bytes each
//   partials   [planes, chunks] Largest, to be merged, instead of y and argmax; null if planes are whole
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_max_nchw(const T* x, T* y, unsigned char* argmax, unsigned char* partials, GlobalLayout layout) {
    reduce_nchw<Largest<accumulate_t<T>>>(x, layout, MaxOutput<T>{y, argmax, partials, layout.argmax_bytes});
}

// As global_max_nchw, of channels side by side.
//   x           [samples, positions, planes] of Width T, aligned to 16 bytes
//   y, argmax   [samples, planes] of Width
// Launch: 1-D, kGlobalThreads, one block for each chunk of each sample and each `lanes` of its vectors.
template <typename T, int Width>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_max_nhwc(const T* x, T* y, unsigned char* argmax, unsigned char* partials, GlobalLayout layout) {
    reduce_nhwc<Largest<accumulate_t<T>>, Width>(x, layout,
                                                 MaxOutput<T>{y, argmax, partials, layout.argmax_bytes});
}

// y and argmax of planes that were reduced in chunks.
//   partials, y, argmax   as above, whichever the layout
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_max_merge(const unsigned char* partials, T* y, unsigned char* argmax, GlobalLayout layout) {
    merge_chunks<Largest<accumulate_t<T>>>(partials, layout,
                                           MaxOutput<T>{y, argmax, nullptr, layout.argmax_bytes});
}

// y = sum of each plane times factor. In an order that depends on the array's shape alone: no value passes
// through more additions than 32 without compensation.
//   x          [planes, positions] T, aligned to 16 bytes
//   y          [planes] T
//   partials   [planes, chunks] Sum, to be merged, instead of y; null if planes are whole
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_avg_nchw(const T* x, T* y, unsigned char* partials, accumulate_t<T> factor, GlobalLayout layout) {
    reduce_nchw<Sum<accumulate_t<T>>>(x, layout, AvgOutput<T>{y, factor, partials});
}

// As global_avg_nchw, of channels side by side.
//   x   [samples, positions, planes] of Width T, aligned to 16 bytes
//   y   [samples, planes] of Width T
// Launch: 1-D, kGlobalThreads, one block for each chunk of each sample and each `lanes` of its vectors.
template <typename T, int Width>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_avg_nhwc(const T* x, T* y, unsigned char* partials, accumulate_t<T> factor, GlobalLayout layout) {
    reduce_nhwc<Sum<accumulate_t<T>>, Width>(x, layout, AvgOutput<T>{y, factor, partials});
}

// y of planes that were reduced in chunks.
//   partials, y   as above, whichever the layout
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_avg_merge(const unsigned char* partials, T* y, accumulate_t<T> factor, GlobalLayout layout) {
    merge_chunks<Sum<accumulate_t<T>>>(partials, layout, AvgOutput<T>{y, factor, nullptr});
}

// Stores a vector, or what the array has left of it.
template <typename T>
__device__ __forceinline__ void store_up_to(const Vector<T>& all, T* target, long long left) {
    if (left >= kVectorWidth<T>) {
        all.store(target);
        return;
    }
#pragma unroll
    for (int k = 0; k < kVectorWidth<T>; ++k) {
        if (k < left) target[k] = all[k];
    }
}

// Positions of planes so small that the vectors of a warp lie in several.
constexpr int kManyPlanes = 1024;

// The vectors of a thread of global_spread_nchw, of planes of kWidth to kManyPlanes positions: each vector
// lies in two planes at most, and reads the gradients of two, so that no lane waits for others.
//   dy, argmax   of the block's first plane and of those after it, which are `planes` in all
//   dx           the block's first element, of which `left` are to be written
//   first_at     its position in the plane
template <typename T>
__device__ __forceinline__ void spread_small(const T* dy, const unsigned char* argmax, T* dx,
                                             accumulate_t<T> factor, int first_at, int planes, int left,
                                             const Divisor32& by_few, const GlobalLayout& layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    const int positions = static_cast<int>(layout.positions);
    int at[kGlobalAtOnce], places[kGlobalAtOnce][2] = {};
    T values[kGlobalAtOnce][2];
#pragma unroll
    for (int u = 0; u < kGlobalAtOnce; ++u) {
        const int offset = (u * kGlobalThreads + threadIdx.x) * kWidth;
        const int plane = by_few.quotient(first_at + offset);
        at[u] = first_at + offset - plane * positions;
        if (offset >= left) continue;
#pragma unroll
        for (int next = 0; next < 2; ++next) {
            // After the last plane comes what is not written.
            const int own = min(plane + next, planes - 1);
            values[u][next] = dy[own];
            if (argmax == nullptr) continue;
            int chosen[1];
            load_argmax<1>(argmax, own, chosen, layout.argmax_bytes);
            places[u][next] = chosen[0];
        }
    }
#pragma unroll
    for (int u = 0; u < kGlobalAtOnce; ++u) {
        const int offset = (u * kGlobalThreads + threadIdx.x) * kWidth;
        if (offset >= left) return;
        T shares[2];
#pragma unroll
        for (int next = 0; next < 2; ++next)
            shares[next] = from_accumulate<T>(fma(to_accumulate(values[u][next]), factor, A(0)));
        // Of the vector's elements these are of the first plane.
        const int here = positions - at[u];
        Vector<T> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) result[k] = k < here ? shares[0] : shares[1];
        if (argmax != nullptr) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                if (k < here ? at[u] + k != places[u][0] : k - here != places[u][1])
                    result[k] = from_accumulate<T>(A(0));
            }
        }
        store_up_to(result, dx + offset, left - offset);
    }
}

// dx = dy * factor at every position of the plane; with argmax, at the one that was chosen, and 0 elsewhere.
//   dy       [planes] T
//   argmax   [planes], layout.argmax_bytes each, or null
//   dx       [planes, positions] T, aligned to 16 bytes: every element is written once
//   by_positions, by_few   divide by positions; by_few where those are below 2^31
// Launch: 1-D, kGlobalThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_spread_nchw(const T* dy, const unsigned char* argmax, T* dx, accumulate_t<T> factor,
                       Divisor64 by_positions, Divisor32 by_few, GlobalLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    constexpr int kBlockElements = kGlobalThreads * kWidth * kGlobalAtOnce;
    const long long total = layout.planes * layout.positions;
    for (long long first = static_cast<long long>(blockIdx.x) * kBlockElements; first < total;
         first += static_cast<long long>(gridDim.x) * kBlockElements) {
        // The same for the whole block.
        const long long first_plane = static_cast<long long>(by_positions.quotient(first));
        const long long first_at = first - first_plane * layout.positions;
        if (layout.positions >= kWidth && layout.positions <= kManyPlanes) {
            const long long planes = layout.planes - first_plane, left = total - first;
            spread_small(dy + first_plane,
                         argmax == nullptr ? argmax : argmax + first_plane * layout.argmax_bytes, dx + first,
                         factor, static_cast<int>(first_at),
                         static_cast<int>(min(planes, kBlockElements + 0ll)),
                         static_cast<int>(min(left, kBlockElements + 0ll)), by_few, layout);
            continue;
        }
#pragma unroll
        for (int u = 0; u < kGlobalAtOnce; ++u) {
            const int offset = (u * kGlobalThreads + threadIdx.x) * kWidth;
            const long long start = first + offset;
            if (start >= total) break;
            long long plane = first_plane, at = first_at + offset;
            if (layout.positions <= kBlockElements) {
                const int more = by_few.quotient(static_cast<int>(at));
                plane += more;
                at -= more * static_cast<int>(layout.positions);
            } else if (at >= layout.positions) {
                ++plane;
                at -= layout.positions;
            }
            // Positions of the plane that are left, at least one; of the vector `here` are the plane's.
            const long long left = layout.positions - at;
            const int here = static_cast<int>(min(left, static_cast<long long>(kWidth)));
            const auto value_of = [&](long long which) {
                return from_accumulate<T>(fma(to_accumulate(dy[which]), factor, A(0)));
            };
            // Of the plane, where it is chosen; counted from the vector's first value.
            const auto place_of = [&](long long which, long long before) {
                int chosen[1] = {0};
                load_argmax<1>(argmax, which, chosen, layout.argmax_bytes);
                const long long place = before + chosen[0];
                return place >= 0 && place < kWidth ? static_cast<int>(place) : -1;
            };
            const T nothing = from_accumulate<T>(A(0));
            Vector<T> result;
            if (here == kWidth || (plane + 1 == layout.planes)) {
                const T value = value_of(plane);
                const int place = argmax == nullptr ? 0 : place_of(plane, -at);
#pragma unroll
                for (int k = 0; k < kWidth; ++k)
                    result[k] = argmax == nullptr || k == place ? value : nothing;
            } else if (layout.positions >= kWidth) {
                const T value = value_of(plane), next = value_of(plane + 1);
                const int place = argmax == nullptr ? 0 : place_of(plane, -at);
                const int next_place = argmax == nullptr ? 0 : place_of(plane + 1, left);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    const bool chosen = argmax == nullptr || k == (k < here ? place : next_place);
                    result[k] = chosen ? (k < here ? value : next) : nothing;
                }
            } else {
                int place = static_cast<int>(at);
#pragma unroll
                for (int k = 0; k < kWidth; ++k, ++place) {
                    if (place == static_cast<int>(layout.positions)) {
                        place = 0;
                        ++plane;
                    }
                    if (plane == layout.planes) break;
                    int chosen[1] = {place};
                    if (argmax != nullptr) load_argmax<1>(argmax, plane, chosen, layout.argmax_bytes);
                    result[k] = chosen[0] == place ? value_of(plane) : nothing;
                }
            }
            store_up_to(result, dx + start, total - start);
        }
    }
}

// As global_spread_nchw, of channels side by side.
//   dy, argmax   [samples, planes] of Width T, aligned to 16 bytes, and of Width taps
//   dx         [samples, positions, planes] of Width T
//   chunks     blocks that share the positions of a sample
// Launch: 1-D, kGlobalThreads, `chunks` blocks for each sample and each `lanes` of its vectors.
template <typename T, int Width>
__global__ void __launch_bounds__(kGlobalThreads, 4)
    global_spread_nhwc(const T* dy, const unsigned char* argmax, T* dx, accumulate_t<T> factor, int chunks,
                       GlobalLayout layout) {
    using A = accumulate_t<T>;
    const int lanes = layout.lanes, rows = kGlobalThreads / lanes;
    const int tiles = static_cast<int>((layout.planes + lanes - 1) / lanes);
    const int chunk = blockIdx.x % chunks, tile = blockIdx.x / chunks % tiles;
    const long long sample = blockIdx.x / chunks / tiles;
    const long long plane = static_cast<long long>(tile) * lanes + threadIdx.x % lanes;
    if (plane >= layout.planes) return;
    const long long vector = sample * layout.planes + plane;
    const Vector<T, Width> gradients = Vector<T, Width>::load(dy + vector * Width);
    Vector<T, Width> share;
    int chosen[Width] = {};
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        share[k] = from_accumulate<T>(fma(widened(gradients, k), factor, A(0)));
        int tap[1] = {0};
        if (argmax != nullptr) load_argmax<1>(argmax, vector * Width + k, tap, layout.argmax_bytes);
        chosen[k] = tap[0];
    }
    // Rows of threads from here on, a round of all blocks after another: counted down, so that no index is
    // multiplied.
    const long long first = chunk * rows + threadIdx.x / lanes;
    const int step = chunks * rows;
    int rounds = first < layout.positions ? static_cast<int>((layout.positions - first - 1) / step) + 1 : 0;
    unsigned int at =
        static_cast<unsigned int>(first);  // of use to taps alone, which have fewer than 2^31 positions
    T* target = dx + ((sample * layout.positions + first) * layout.planes + plane) * Width;
    const long long apart = step * layout.planes * Width;
#pragma unroll 1
    for (; rounds > 0; --rounds, at += step, target += apart) {
        Vector<T, Width> result = share;
        if (argmax != nullptr) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (chosen[k] != static_cast<int>(at)) result[k] = from_accumulate<T>(A(0));
            }
        }
        result.store(target);
    }
}
