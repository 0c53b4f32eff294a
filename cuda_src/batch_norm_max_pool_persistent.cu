// batch_norm_max_pool.cu in one read: the statistics of x, and the largest of its normalised and activated
// values, which are never written.
//
// Of planes that blocks keep whole: each value is normalised where it is kept, and the windows are taken from
// there. Sums are those of batch_norm.cu, outputs and taps those of max_pool_forward, to the last bit.
//
// Rows of planes are whole vectors, and as many outputs as these have windows of their own. Arguments are
// those of batch_norm_persistent.cu, and
//   y, argmax   [images, output] of T, and of one byte
//   strip       rows of outputs of a thread
//   window      of max_pool.cu; units are strips of tiles of outputs of one image
#include "batch_norm_persistent.cuh"
#include "max_pool_tile.cuh"

// Leaves the values that a thread keeps normalised and activated.
template <typename T>
struct NormalizeInPlace {
    using A = accumulate_t<T>;
    static constexpr int kWidth = kVectorWidth<T>;
    SharedCache<T, kWidth> kept;
    PiecewiseLinearActivation<A> phi;
    Normalization<A> norms[1];

    __device__ __forceinline__ void skip_slot() { kept.skip(); }

    template <int Count>
    __device__ __forceinline__ void vectors(long long, long long) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            const Vector<T, kWidth> values = kept.next_vector();
            A z[kWidth];
#pragma unroll
            for (int k = 0; k < kWidth; ++k) z[k] = phi.forward(norms[0].apply(widened(values, k)));
            kept.put(rounded<T>(z));
        }
    }
    // There are none.
    __device__ __forceinline__ void scalar(long long) {}
};

// The planes that the threads of a block keep, each as a chunk: see for_each_in_block.
//   const CachedPlanes<T> planes(slots, vectors);
//   const auto fifth = Vector<T>::load(planes.vector(planes.plane(1), 5));  // of the block's plane number 1
template <typename T>
struct CachedPlanes {
    const uint4* slots;
    int slots_of_plane, threads, log2_threads, log2_rows;  // threads share a plane, rows of them take turns

    __device__ __forceinline__ CachedPlanes(const uint4* slots, int vectors)
        : slots(slots),
          threads(static_cast<int>(blockDim.x)),
          log2_threads(__ffs(static_cast<int>(blockDim.x)) - 1),
          log2_rows(__ffs(static_cast<int>(blockDim.y)) - 1) {
        slots_of_plane = (vectors + threads - 1) >> log2_threads;
    }

    // The first of a plane, and number n after it.
    __device__ __forceinline__ const uint4* plane(int number) const {
        const int turn = number >> log2_rows, row = number - (turn << log2_rows);
        return slots + turn * slots_of_plane * kChannelThreads + row * threads;
    }
    __device__ __forceinline__ const T* vector(const uint4* first, int n) const {
        return reinterpret_cast<const T*>(first + (n >> log2_threads) * (kChannelThreads - threads) + n);
    }
};

// What forward_persistent does with the values of a channel: see NormalizedOutput.
template <typename T, int Kernel, int Stride, int Pad>
struct PooledOutput {
    static constexpr bool kWhole = true;
    template <typename>
    static constexpr int kLoads = 4;
    using Tile = PoolTile<T, Kernel, Stride, Pad, false>;
    static_assert(Tile::kBody == kVectorWidth<T> && Tile::kReach == Pad + Tile::kBody && Pad <= 1,
                  "a tile is over one vector, and the last value of the one before");
    int activation;
    T* y;
    unsigned char* argmax;
    int strip;
    const PoolWindow& window;

    template <int, int>
    __device__ __forceinline__ NormalizeInPlace<T> body(uint4* slots) const {
        return {SharedCache<T, kVectorWidth<T>>(slots),
                PiecewiseLinearActivation<accumulate_t<T>>(activation),
                {}};
    }

    __device__ __forceinline__ void finish(const NchwLayout& layout, int channel, int rank,
                                           const uint4* slots) const {
        const int columns = static_cast<int>(window.units[2]), strips = static_cast<int>(window.units[1]);
        const int height = static_cast<int>(window.input[1]), outputs = static_cast<int>(window.output[1]);
        const int width = columns * Tile::kColumns;
        const int first = rank * static_cast<int>(layout.chunks_per_block);
        const int planes = static_cast<int>(min(layout.chunks_per_block, layout.chunks - first));
        const CachedPlanes<T> cached(slots, static_cast<int>(layout.plane) / kVectorWidth<T>);
        accumulate_t<T> infinity;
        set_negative_infinity(infinity);
        const T nothing = from_accumulate<T>(infinity);
        __syncthreads();
#pragma unroll 1
        for (int unit = linear_thread(); unit < planes * strips * columns; unit += kChannelThreads) {
            const int of_plane = window.by_units[2].quotient(unit), column = unit - of_plane * columns;
            const int plane = window.by_units[1].quotient(of_plane);
            const int begin = (of_plane - plane * strips) * strip, end = min(begin + strip, outputs);
            const int left = column * Tile::kBody - Pad, top = begin * Stride - Pad;
            const long long image = (first + plane) * layout.channels + channel;
            const long long before =
                image * (static_cast<long long>(outputs) * width) + column * Tile::kColumns;
            const uint4* const kept = cached.plane(plane);
            using Best = RunningMax<T, Tile::kLanes>;
            walk_down<Tile, Best>(
                begin, end,
                [&](int h) {
                    // As in forward_strips.
                    const int nearest = min(max(h, 0), height - 1);
                    const int vector = nearest * columns + column;
                    T value_before = nothing;
                    if (Pad > 0 && column > 0)
                        value_before = cached.vector(kept, vector - 1)[Tile::kBody - 1];
                    TileRow<T, Tile> row;
                    row.set(Vector<T>::load(cached.vector(kept, vector)), value_before);
                    return largest_of_taps<T, Tile>(row, left, (nearest - top) * Kernel);
                },
                [&](int row, Best(&rows)[Kernel]) {
                    Best best = largest_of_rows<Stride>(rows, row == begin);
                    best.renumber((row - begin) * Stride * Kernel);
                    const long long start = before + row * width;
                    best.values().store(y + start);
                    best.taps().store(argmax + start);
                });
        }
        // Before the next channel's values come.
        __syncthreads();
    }
};

template <typename T, typename Layout, int Kernel, int Stride, int Pad>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_max_pool_forward_persistent(const T* x, const accumulate_t<T>* gamma,
                                           const accumulate_t<T>* beta, int activation, T* y,
                                           unsigned char* argmax, accumulate_t<T>* partial_moments,
                                           accumulate_t<T>* statistics, accumulate_t<T>* running_mean,
                                           accumulate_t<T>* running_var, long long* batches,
                                           long long* skipped, unsigned int* barrier_count,
                                           FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps, int strip,
                                           PoolWindow window, Layout layout) {
    DYNAMIC_SHARED(slots);
    const RunningStatistics<accumulate_t<T>> running{running_mean, running_var, batches, skipped, rule};
    forward_persistent(x, {partial_moments, statistics, gamma, beta, running, eps, layout.channels},
                       PooledOutput<T, Kernel, Stride, Pad>{activation, y, argmax, strip, window},
                       barrier_count, slots, layout);
}
