// What the kernels that read once share: where a block keeps what it read, and the backward from any source
// of gradients. See batch_norm_persistent.cu.
//
// A kernel gives its arguments and shared memory to one of two functions:
//   DYNAMIC_SHARED(slots);
//   const NormalizedOutput<T, kIdentity> output{nullptr, kNoActivation, y};
//   forward_persistent(x, result, output, barrier_count, slots, layout);
//   backward_persistent<T, kIdentity, GradientArray<T, Layout>>({dy}, x, of_channels, ..., slots, layout);
#pragma once

#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"
#include "copy_async.cuh"
#include "dynamic_shared.cuh"
#include "group_barrier.cuh"

// Two blocks, of half of the shared memory each: while one waits the other works.
constexpr int kPersistentBlocks = 2;

// This block's group and part.
//   GroupBlock block(layout.blocks);
//   for (int tile = block.group; tile < layout.tile_count(); tile += block.groups) {
//       ...                         // its part of the tile: block.rank of block.blocks
//       block.wait(barrier_count);  // until the others of the group are here
//   }
struct GroupBlock {
    int rank, group, groups;
    unsigned int blocks, arrivals;

    __device__ __forceinline__ explicit GroupBlock(long long blocks_of_group)
        : blocks(static_cast<unsigned int>(blocks_of_group)), arrivals(0) {
        rank = static_cast<int>(blockIdx.x % blocks);
        group = static_cast<int>(blockIdx.x / blocks);
        groups = static_cast<int>(gridDim.x / blocks);
    }

    __device__ __forceinline__ void wait(unsigned int* barrier_count) {
        group_barrier(barrier_count + group, arrivals += blocks);
    }
    // The same of a warp, whose first thread alone has written something; the others wait where the block
    // meets.
    __device__ __forceinline__ void wait_of_warp(unsigned int* barrier_count) {
        arrivals += blocks;
        if (linear_thread() == 0) arrive_and_wait(barrier_count + group, arrivals);
        __syncwarp();
    }
};

// What one thread keeps, in the order in which it came. Other threads find it where chunks have as many slots
// of each, see has_slots.
//   SharedCache<T, Width> kept(slots), again(slots);
//   kept.put(vector);                                   // or kept.fetch(x + i), and wait_for_copies()
//   const Vector<T, Width> same = again.get_vector();
template <typename T, int Width>
struct SharedCache {
    uint4* slot;

    __device__ __forceinline__ explicit SharedCache(uint4* slots) : slot(slots + linear_thread()) {}

    // Of 16 bytes of global memory, which are there after wait_for_copies.
    __device__ __forceinline__ void fetch(const T* vector) {
        copy_async(slot, reinterpret_cast<const uint4*>(vector));
        slot += kChannelThreads;
    }
    __device__ __forceinline__ void put(const Vector<T, Width>& vector) {
        *slot = vector.words[0];
        slot += kChannelThreads;
    }
    __device__ __forceinline__ void put(T value) {
        *reinterpret_cast<T*>(slot) = value;
        slot += kChannelThreads;
    }
    // What is there, to be put or skipped then.
    __device__ __forceinline__ Vector<T, Width> next_vector() const {
        Vector<T, Width> vector;
        vector.words[0] = *slot;
        return vector;
    }
    __device__ __forceinline__ T next() const { return *reinterpret_cast<const T*>(slot); }
    __device__ __forceinline__ void skip() { slot += kChannelThreads; }
    // exists   whether it was kept; if not, the values may be any
    __device__ __forceinline__ Vector<T, Width> get_vector(bool exists = true) {
        Vector<T, Width> vector;
        if (exists) vector.words[0] = *slot;
        slot += kChannelThreads;
        return vector;
    }
    __device__ __forceinline__ T get() {
        const T value = *reinterpret_cast<const T*>(slot);
        slot += kChannelThreads;
        return value;
    }
};

// Vectors that a thread starts to fetch at a time.
constexpr int kFetched = 4;

// Positions of which a block keeps those of its part.
//   cache   [slots * kChannelThreads], in shared memory
struct PositionsToCache : SomePositions {
    unsigned char* cache;
};

// What all walks over a tile take for `valid`. Which of its positions count, a block finds once; of planes
// that are no whole vectors, which start elsewhere in each channel, for each tile.
//   const auto counted = cached_positions<T>(layout, channel, block.rank, valid, tile == block.group);
template <typename T, typename Layout, typename Channel>
__device__ __forceinline__ AllPositions cached_positions(const Layout&, Channel, int, const AllPositions&,
                                                         bool) {
    return {};
}
template <typename T>
__device__ __forceinline__ bool positions_depend_on_channel(const NchwLayout& layout) {
    return layout.plane % kVectorWidth<T> != 0;
}
template <typename T, int Width>
__device__ __forceinline__ constexpr bool positions_depend_on_channel(const NhwcLayout<Width>&) {
    return false;
}
template <typename T, typename Layout, typename Channel>
__device__ __forceinline__ CachedPositions cached_positions(const Layout& layout, Channel channel, int rank,
                                                            const PositionsToCache& valid, bool first_tile) {
    unsigned char* const own = valid.cache + linear_thread();
    if (first_tile || positions_depend_on_channel<T>(layout)) {
        StorePositions<kLayoutWidth<T, Layout>> store{own};
        for_each_in_block<T, kFetched>(layout, channel, rank, store,
                                       static_cast<const SomePositions&>(valid));
    }
    return {own, valid.first};
}

// What agree is told: of planes a result of the channel alone, read before the barrier, of rows the result.
template <typename Result>
__device__ __forceinline__ auto result_of_tile(const NchwLayout&, const Result& result, int channel) {
    return result.of_channel(channel);
}
template <int Width, typename Result>
__device__ __forceinline__ Result result_of_tile(const NhwcLayout<Width>&, const Result& result, long long) {
    return result;
}

// From what the threads of each block of a group have found of the tile's channels, the numbers of these,
// which all threads get as agreed(channel); written they are, too. See write_result. The result must outlive
// what is returned.
//   reduce(take)   merges what the block has: take(k, part) is called by one thread for each channel, which
//                  has it as its k-th
//   const auto agreed = agree(layout, tile, block, barrier_count, result,
//                             [&](auto take) { reduce_channels(layout, sums, scratch, take); });
//   const ChannelGradients<A> numbers = agreed(channel + k);
//
// Of planes each block merges for itself, ...
template <typename Result, typename Reduce>
__device__ __forceinline__ auto agree(const NchwLayout& layout, int channel, GroupBlock& block,
                                      unsigned int* barrier_count, const Result& result, Reduce reduce) {
    using Part = typename Result::Part;
    __shared__ decltype(result.read(0)) numbers;
    Part part;
    reduce([&](int, const Part& all) { part = all; });
    if (layout.blocks > 1 && linear_thread() < kWarpThreads) {
        if (linear_thread() == 0) result.write_part(part, channel, block.rank, layout.blocks);
        block.wait_of_warp(barrier_count);
        part = result.template merged<2>(channel, layout.blocks);
    }
    if (linear_thread() == 0) {
        numbers = result.finished(part, channel);
        if (block.rank == 0) result.write(numbers, channel);
    }
    __syncthreads();
    return [&](long long) { return numbers; };
}
// ... of rows some of the channels for all of them: if all merged all, they would read more than the data.
template <int Width, typename Result, typename Reduce>
__device__ __forceinline__ auto agree(const NhwcLayout<Width>& layout, int tile, GroupBlock& block,
                                      unsigned int* barrier_count, const Result& result, Reduce reduce) {
    const long long channel = layout.channel_of(tile);
    reduce([&](int k, const typename Result::Part& all) {
        if (layout.has(channel)) write_result(result, all, channel + k, block.rank, layout.blocks);
    });
    if (block.blocks > 1) {
        block.wait(barrier_count);
        const long long first = static_cast<long long>(tile) * layout.tile_channels();
        const int channels =
            static_cast<int>(min(static_cast<long long>(layout.tile_channels()), layout.channels - first));
        const int blocks = static_cast<int>(block.blocks);
        for (int c = block.rank + linear_thread() / kWarpThreads * blocks; c < channels;
             c += kChannelThreads / kWarpThreads * blocks) {
            const typename Result::Part merged = result.template merged<2>(first + c, layout.blocks);
            if (linear_thread() % kWarpThreads == 0)
                result.write(result.finished(merged, first + c), first + c);
        }
        block.wait(barrier_count);
    } else {
        __syncthreads();
    }
    return [&](long long of_tile) { return result.read(of_tile); };
}

// ---- forward ---------------------------------------------------------------------------------------------

// Vectors that a thread takes at a time from where it keeps them. Where a residual comes from memory as many
// as registers allow: all of them wait for it once. Of rows the numbers of all channels take these.
template <Epilogue Fused, typename Layout, typename Valid>
constexpr int kTaken = !kAddsResidual<Fused> || !kCountsAll<Valid> ? 2
                       : Layout::kIsNchw                           ? 8
                                                                   : 4;

//   FetchArray<T, Width> fetch{x, SharedCache<T, Width>(slots)};
//   for_each_in_block<T, kFetched>(layout, channel, block.rank, fetch, valid);
//   wait_for_copies();  // the bodies below take the values in this order
template <typename T, int Width>
struct FetchArray {
    const T* array;
    SharedCache<T, Width> kept;

    __device__ __forceinline__ void skip_slot() { kept.skip(); }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (counts) {
            kept.put(array[i]);
        } else {
            kept.skip();
        }
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            if (some.any(u)) {
                kept.fetch(array + i + u * step);
            } else {
                kept.skip();
            }
        }
    }
};

template <typename T, int Width, int Channels>
struct StatisticsOfCached {
    static constexpr bool kTakesFew = true;
    Statistics<T, Width, Channels> statistics;
    SharedCache<T, Width> kept;

    __device__ __forceinline__ void skip_slot() { kept.skip(); }

    __device__ __forceinline__ void scalar(long long, bool counts = true) {
        if (counts) {
            statistics.take(kept.get());
        } else {
            kept.skip();
        }
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long, long long) {
        Vector<T, Width> loaded[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) loaded[u] = kept.get_vector();
        statistics.take(loaded);
    }
    template <int Count, typename Some>
    __device__ __forceinline__ void vectors(long long, long long, const Some& some) {
        Vector<T, Width> loaded[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (some.exists(u)) loaded[u] = kept.get_vector(some.any(u));
        }
        statistics.take(loaded, some);
    }
};

//   Fused   kIdentity or kPiecewiseLinear
template <typename T, int Width, int Channels, Epilogue Fused>
struct NormalizeCached {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = kAddsResidual<Fused>;
    SharedCache<T, Width> kept;
    const T* residual;
    PiecewiseLinearActivation<A> phi;
    T* y;
    Normalization<A> norms[Channels];

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (!counts) {
            kept.skip();
            y[i] = from_accumulate<T>(A(0));
            return;
        }
        A z = norms[0].apply(to_accumulate(kept.get()));
        if (Fused != kIdentity) z = phi.forward(z + residual_at(residual, i));
        y[i] = from_accumulate<T>(z);
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        Vector<T, Width> added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (Fused != kIdentity && some.any(u)) added[u] = residual_at<T, Width>(residual, i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            const Vector<T, Width> values = kept.get_vector(some.any(u));
            A z[Width] = {};
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (!some.has(u, k)) continue;
                z[k] = norms[channel_of<Channels>(k)].apply(widened(values, k));
                if (Fused != kIdentity) z[k] = phi.forward(z[k] + widened(added[u], k));
            }
            rounded<T>(z).store(y + i + u * step);
        }
    }
};

// What forward_persistent does with the values of a channel once its numbers are known: writes them, ...
template <typename T, Epilogue Fused, typename Valid = AllPositions>
struct NormalizedOutput {
    static constexpr bool kWhole = false;
    template <typename Layout>
    static constexpr int kLoads = kTaken<Fused, Layout, Valid>;
    const T* residual;
    int activation;
    T* y;

    // The body that takes them, and what is left to do then, by all threads of the block.
    template <int Width, int Channels>
    __device__ __forceinline__ NormalizeCached<T, Width, Channels, Fused> body(uint4* slots) const {
        return {SharedCache<T, Width>(slots),
                residual,
                PiecewiseLinearActivation<accumulate_t<T>>(activation),
                y,
                {}};
    }
    template <typename Layout>
    __device__ __forceinline__ void finish(const Layout&, long long, long long, const uint4*) const {}
};

//   output   NormalizedOutput, or what is like it
//   slots    of the block
//   valid    AllPositions, or PositionsToCache: of others nothing is read, and 0 is written there
template <typename T, typename Output, typename Layout, typename Valid = AllPositions>
__device__ __forceinline__ void forward_persistent(const T* x,
                                                   const StatisticsResult<accumulate_t<T>>& result,
                                                   const Output& output, unsigned int* barrier_count,
                                                   uint4* slots, const Layout& layout,
                                                   const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kLayoutWidth<T, Layout>, kChannels = Layout::kChannels;
    constexpr bool kWhole = Output::kWhole;
    __shared__ MomentsScratch<A, Layout> scratch;
    GroupBlock block(layout.blocks);
    for (int tile = block.group; tile < layout.tile_count(); tile += block.groups) {
        const auto channel = layout.channel_of(tile);
        const bool exists = layout.has(channel);
        const auto counted = cached_positions<T>(layout, channel, block.rank, valid, tile == block.group);
        const Origins<T, Layout, Valid> origins(x, layout, channel, valid);
        const auto of_tile = result_of_tile(layout, result, channel);
        StatisticsOfCached<T, kWidth, kChannels> values{{x, {}, 0}, SharedCache<T, kWidth>(slots)};
        if (exists) {
            FetchArray<T, kWidth> fetch{x, SharedCache<T, kWidth>(slots)};
            for_each_in_block<T, kFetched, kWhole>(layout, channel, block.rank, fetch, counted);
            wait_for_copies();
            for_each_in_block<T, kStatisticsLoads<T, Layout, Valid>, kWhole>(layout, channel, block.rank,
                                                                             values, counted);
        }
        const auto again = [&](auto& lowered) {
            if (exists) for_each_in_block<T, 1, kWhole>(layout, channel, block.rank, lowered, counted);
        };
        const auto agreed = agree(layout, tile, block, barrier_count, of_tile, [&](auto take) {
            reduce_moments(layout, values.statistics, origins, scratch, again, take);
        });
        if (!exists) continue;
        auto normalize = output.template body<kWidth, kChannels>(slots);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            const ChannelStatistics<A> numbers = agreed(channel + k);
            normalize.norms[k].set(numbers.mean, numbers.inv_std, of_tile.parameters_of(channel + k));
        }
        for_each_in_block<T, Output::template kLoads<Layout>, kWhole>(layout, channel, block.rank, normalize,
                                                                      counted);
        output.finish(layout, channel, block.rank, slots);
    }
    result.fold_by_last(barrier_count + (layout.blocks > 1 ? block.groups : 0), gridDim.x);
}

// ---- backward --------------------------------------------------------------------------------------------

// Of x and dy, or of x alone where the gradients of y are no array.
template <typename T, int Width, typename Source>
struct FetchInputs {
    const Source& source;
    FetchArray<T, Width> x, dy;

    __device__ __forceinline__ void skip_slot() {
        x.skip_slot();
        if constexpr (Source::kIsArray) dy.skip_slot();
    }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        x.scalar(i, counts);
        if constexpr (Source::kIsArray) dy.scalar(i, counts);
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        x.template vectors<Count>(i, step, some);
        if constexpr (Source::kIsArray) dy.template vectors<Count>(i, step, some);
    }
};

// Takes x, and keeps in place of dy the gradient of the activation's input, which the type holds exactly: it
// is that of y, or 0.
//   Fused   any but kSmooth
template <typename T, int Width, int Channels, Epilogue Fused, typename Source>
struct SumsOfCached {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = kAddsResidual<Fused>;
    Source source;
    const T* residual;
    ClippingActivation<A> phi;
    SharedCache<T, Width> cached_x, cached_dz;
    Normalization<A> norms[Channels];
    Sums<A, 2> sums[Channels];

    __device__ __forceinline__ void skip_slot() {
        cached_x.skip();
        cached_dz.skip();
    }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (!counts) {
            cached_x.skip();
            cached_dz.skip();
            return;
        }
        const A value = to_accumulate(cached_x.get());
        T gradient;
        if constexpr (Source::kIsKept) {
            gradient = cached_dz.next();
        } else {
            gradient = source.scalar(i);
        }
        A dz = to_accumulate(gradient);
        if (Fused != kIdentity) {
            A z = norms[0].apply(value);
            if (kAddsResidual<Fused>) z += residual_at(residual, i);
            dz = phi.backward(dz, z);
        }
        cached_dz.put(from_accumulate<T>(dz));
        add_gradient(sums[0], dz, value - norms[0].mean);
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        typename Source::Loaded loaded[Count];
        Vector<T, Width> added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.any(u)) continue;
            if constexpr (!Source::kIsKept) loaded[u] = source.load(i + u * step);
            if (kAddsResidual<Fused>) added[u] = residual_at<T, Width>(residual, i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            if (!some.any(u)) {
                cached_x.skip();
                cached_dz.skip();
                continue;
            }
            const Vector<T, Width> values = cached_x.get_vector();
            Vector<T, Width> gradients;
            if constexpr (Source::kIsKept) {
                gradients = cached_dz.next_vector();
            } else {
                gradients = source.of(loaded[u]);
            }
            A dz[Width] = {};
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (!some.has(u, k)) continue;
                const int c = channel_of<Channels>(k);
                const A value = widened(values, k);
                dz[k] = widened(gradients, k);
                if (Fused != kIdentity) {
                    A z = norms[c].apply(value);
                    if (kAddsResidual<Fused>) z += widened(added[u], k);
                    dz[k] = phi.backward(dz[k], z);
                }
                add_gradient(sums[c], dz[k], value - norms[c].mean);
            }
            if (Fused != kIdentity) {
                cached_dz.put(rounded<T>(dz));
            } else if (Source::kIsKept) {
                cached_dz.skip();
            } else {
                cached_dz.put(gradients);
            }
        }
    }
};

template <typename T, int Width, int Channels, Epilogue Fused>
struct InputGradientsCached {
    using A = accumulate_t<T>;
    SharedCache<T, Width> cached_x, cached_dz;
    T* dx;
    T* dresidual;
    Normalization<A> norms[Channels];
    InputGradient<A> input_gradients[Channels];

    __device__ __forceinline__ void skip_slot() {
        cached_x.skip();
        cached_dz.skip();
    }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (!counts) {
            cached_x.skip();
            cached_dz.skip();
            dx[i] = from_accumulate<T>(A(0));
            if (kAddsResidual<Fused> && dresidual != nullptr) dresidual[i] = from_accumulate<T>(A(0));
            return;
        }
        const A value = to_accumulate(cached_x.get());
        const T dz = cached_dz.get();
        dx[i] = from_accumulate<T>(input_gradients[0].apply(to_accumulate(dz), value, norms[0]));
        if (kAddsResidual<Fused> && dresidual != nullptr) dresidual[i] = dz;
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            const Vector<T, Width> values = cached_x.get_vector(some.any(u));
            Vector<T, Width> gradients = cached_dz.get_vector(some.any(u));
            A results[Width] = {};
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (!some.has(u, k)) {
                    gradients[k] = from_accumulate<T>(A(0));
                    continue;
                }
                const int c = channel_of<Channels>(k);
                results[k] = input_gradients[c].apply(widened(gradients, k), widened(values, k), norms[c]);
            }
            rounded<T>(results).store(dx + i + u * step);
            if (kAddsResidual<Fused> && dresidual != nullptr) gradients.store(dresidual + i + u * step);
        }
    }
};

//   source       of dy, see batch_norm_backward.cuh
//   activation   none or ReLU, whose gradient is exact
//   slots        those of x, and then those of dz
template <typename T, Epilogue Fused, typename Source, typename Layout, typename Valid = AllPositions>
__device__ __forceinline__ void backward_persistent(const Source& source, const T* x,
                                                    const ChannelArrays<accumulate_t<T>>& of_channels,
                                                    const T* residual, int activation,
                                                    const GradientResult<accumulate_t<T>>& result, T* dx,
                                                    T* dresidual, unsigned int* barrier_count,
                                                    accumulate_t<T> inv_count, int slots_of_x, uint4* slots,
                                                    const Layout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kLayoutWidth<T, Layout>, kChannels = Layout::kChannels;
    // Vectors in flight: of rows the numbers of all channels take the registers of a second one.
    constexpr int kLoads = Layout::kIsNchw ? 2 : 1;
    constexpr int kSummed = Layout::kIsNchw && kAddsResidual<Fused> && kCountsAll<Valid> ? 7 : kLoads;
    __shared__ Sums<A, 2> scratch[kReductionScratch<Layout>];
    uint4* const slots_of_dz = slots + slots_of_x * kChannelThreads;
    GroupBlock block(layout.blocks);
    for (int tile = block.group; tile < layout.tile_count(); tile += block.groups) {
        const auto channel = layout.channel_of(tile);
        const bool exists = layout.has(channel);
        const auto counted = cached_positions<T>(layout, channel, block.rank, valid, tile == block.group);
        if (exists) {
            FetchInputs<T, kWidth, Source> fetch{source,
                                                 {x, SharedCache<T, kWidth>(slots)},
                                                 {source.array(), SharedCache<T, kWidth>(slots_of_dz)}};
            for_each_in_block<T, kFetched / 2, Source::kWhole>(layout, channel, block.rank, fetch, counted);
        }
        if constexpr (Source::kIsKept && !Source::kIsArray) {
            // Threads have each other's slots, of the channel before as well.
            __syncthreads();
            source.fill(layout, channel, block.rank, slots_of_dz);
            __syncthreads();
        }
        SumsOfCached<T, kWidth, kChannels, Fused, Source> keep{source,
                                                               residual,
                                                               ClippingActivation<A>(activation),
                                                               SharedCache<T, kWidth>(slots),
                                                               SharedCache<T, kWidth>(slots_of_dz),
                                                               {},
                                                               {}};
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            keep.sums[k] = Sums<A, 2>::identity();
            if (exists) of_channels.load(keep.norms[k], channel + k);
        }
        const auto of_tile = result_of_tile(layout, result, channel);
        wait_for_copies();
        if (exists) for_each_in_block<T, kSummed, Source::kWhole>(layout, channel, block.rank, keep, counted);
        if constexpr (Source::kIsKept && !Source::kIsArray) {
            const int next = tile + block.groups;
            if (next < layout.tile_count()) source.ask(layout, layout.channel_of(next), block.rank);
        }
        const auto agreed = agree(layout, tile, block, barrier_count, of_tile,
                                  [&](auto take) { reduce_channels(layout, keep.sums, scratch, take); });
        if (!exists) continue;
        InputGradientsCached<T, kWidth, kChannels, Fused> gradients{
            SharedCache<T, kWidth>(slots), SharedCache<T, kWidth>(slots_of_dz), dx, dresidual, {}, {}};
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            const ChannelGradients<A> numbers = agreed(channel + k);
            gradients.norms[k] = keep.norms[k];
            gradients.input_gradients[k].set(of_tile.inv_std_of(channel + k), numbers.dgamma, numbers.dbeta,
                                             inv_count);
        }
        for_each_in_block<T, kLoads, Source::kWhole>(layout, channel, block.rank, gradients, counted);
    }
}
