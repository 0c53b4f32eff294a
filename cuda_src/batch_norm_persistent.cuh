// What the kernels that read once share: where a block keeps what it read, and the backward from any source
// of gradients. See batch_norm_persistent.cu.
#pragma once

#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"
#include "copy_async.cuh"
#include "dynamic_shared.cuh"
#include "group_barrier.cuh"

// Two blocks, of half of the shared memory each: while one waits the other works.
constexpr int kPersistentBlocks = 2;

// This block's group and part.
struct GroupBlock {
    int rank, group, groups;

    __device__ __forceinline__ explicit GroupBlock(long long blocks)
        : rank(static_cast<int>(blockIdx.x % static_cast<unsigned int>(blocks))),
          group(static_cast<int>(blockIdx.x / static_cast<unsigned int>(blocks))),
          groups(static_cast<int>(gridDim.x / static_cast<unsigned int>(blocks))) {}
};

// What one thread keeps, in the order in which it came. No other thread looks at it.
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

// The channels of a tile whose blocks this warp merges: calls merge(channel).
template <int Width, typename Merge>
__device__ __forceinline__ void for_each_channel_to_merge(const NhwcLayout& layout, int tile, int rank,
                                                          Merge merge) {
    const long long first = static_cast<long long>(tile) * blockDim.x * Width;
    const int channels =
        static_cast<int>(min(static_cast<long long>(blockDim.x) * Width, layout.channels - first));
    const int blocks = static_cast<int>(layout.blocks);
    for (int c = rank + linear_thread() / kWarpThreads * blocks; c < channels;
         c += kChannelThreads / kWarpThreads * blocks)
        merge(first + c);
}

// ---- forward ---------------------------------------------------------------------------------------------

// Vectors that a thread starts to fetch at a time, and those that it takes from where it keeps them.
constexpr int kFetched = 4;
template <Epilogue Fused>
constexpr int kTaken = Fused == kIdentity ? 2 : 4;

template <typename T, int Width>
struct FetchArray {
    const T* array;
    SharedCache<T, Width> kept;

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

//   slots   of the block
//   valid   as in batch_norm_forward.cuh
template <typename T, Epilogue Fused, typename Valid = AllPositions>
__device__ __forceinline__ void forward_persistent_nchw(const T* x,
                                                        const StatisticsResult<accumulate_t<T>>& result,
                                                        const T* residual, int activation, T* y,
                                                        unsigned int* barrier_count, uint4* slots,
                                                        const NchwLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    __shared__ ChannelStatistics<A> of_channel;
    const GroupBlock block(layout.blocks);
    unsigned int expected = 0;
    for (int channel = block.group; channel < layout.channels; channel += block.groups) {
        const T first = x[first_in_nchw(layout, channel, valid)];
        FetchArray<T, kWidth> fetch{x, SharedCache<T, kWidth>(slots)};
        for_each_in_nchw_block<T, kFetched>(layout, channel, block.rank, fetch, valid);
        wait_for_copies();
        // Not before: it would be waited for.
        A origin[1] = {to_accumulate(first)};
        StatisticsOfCached<T, kWidth, 1> values{{x, {}, 0}, SharedCache<T, kWidth>(slots)};
        for_each_in_nchw_block<T, kStatisticsLoads<T, Valid>>(layout, channel, block.rank, values, valid);
        Moments<A> of_part[1];
        finish_moments(values.statistics, origin, of_part, [&](auto& lowered) {
            for_each_in_nchw_block<T, 1>(layout, channel, block.rank, lowered, valid);
        });
        Moments<A> moments = block_reduce(of_part[0], warp_values);
        if (layout.blocks > 1) {
            if (linear_thread() == 0)
                result.write_partial(moments, origin[0], channel, block.rank, layout.blocks);
            expected += static_cast<unsigned int>(layout.blocks);
            group_barrier(barrier_count + block.group, expected);
            if (linear_thread() < kWarpThreads)
                moments = merged_moments(result.partial_moments, channel, layout.blocks, origin[0]);
        }
        if (linear_thread() == 0) {
            of_channel = result.finished(moments, origin[0]);
            if (block.rank == 0) result.write(of_channel, channel);
        }
        __syncthreads();
        NormalizeCached<T, kWidth, 1, Fused> normalize{
            SharedCache<T, kWidth>(slots), residual, PiecewiseLinearActivation<A>(activation), y, {}};
        normalize.norms[0].set(of_channel.mean, of_channel.inv_std, result.gamma, result.beta, channel);
        for_each_in_nchw_block<T, kTaken<Fused>>(layout, channel, block.rank, normalize, valid);
    }
}

template <typename T, int Width, Epilogue Fused, typename Valid = AllPositions>
__device__ __forceinline__ void forward_persistent_nhwc(const T* x,
                                                        const StatisticsResult<accumulate_t<T>>& result,
                                                        const T* residual, int activation, T* y,
                                                        unsigned int* barrier_count, uint4* slots,
                                                        const NhwcLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[kColumnScratch<Width>];
    const GroupBlock block(layout.blocks);
    const unsigned int blocks = static_cast<unsigned int>(layout.blocks);
    unsigned int expected = 0;
    for (int tile = block.group; tile < layout.tiles; tile += block.groups) {
        const long long channel = channel_of_tile<Width>(tile);
        const bool exists = channel < layout.channels;
        StatisticsOfCached<T, Width, Width> values{{x, {}, 0}, SharedCache<T, Width>(slots)};
        if (exists) {
            FetchArray<T, Width> fetch{x, SharedCache<T, Width>(slots)};
            for_each_in_nhwc_block<kFetched>(layout, channel, block.rank, fetch, valid);
            wait_for_copies();
            for_each_in_nhwc_block<kStatisticsLoads<T, Valid>>(layout, channel, block.rank, values, valid);
        }
        Moments<A> moments[Width];
        A origins[Width];
        const T* const first = x + first_in_nhwc(layout, valid) + channel;
#pragma unroll
        for (int k = 0; k < Width; ++k) origins[k] = exists ? to_accumulate(first[k]) : A(0);
        finish_moments(values.statistics, origins, moments, [&](auto& lowered) {
            for_each_in_nhwc_block<1>(layout, channel, block.rank, lowered, valid);
        });
        column_reduce(moments, scratch);
        if (threadIdx.y == 0 && exists) {
#pragma unroll
            for (int k = 0; k < Width; ++k)
                result.write(moments[k], origins[k], channel + k, block.rank, layout.blocks);
        }
        if (blocks > 1) {
            // Each block merges some of the channels for all of them: if all merged all, they would read more
            // than the data.
            group_barrier(barrier_count + block.group, expected += blocks);
            for_each_channel_to_merge<Width>(layout, tile, block.rank, [&](long long of_tile) {
                A origin;
                const Moments<A> merged =
                    merged_moments(result.partial_moments, of_tile, layout.blocks, origin);
                if (linear_thread() % kWarpThreads == 0)
                    result.write(result.finished(merged, origin), of_tile);
            });
            group_barrier(barrier_count + block.group, expected += blocks);
        } else {
            __syncthreads();
        }
        if (!exists) continue;
        NormalizeCached<T, Width, Width, Fused> normalize{
            SharedCache<T, Width>(slots), residual, PiecewiseLinearActivation<A>(activation), y, {}};
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            normalize.norms[k].load(result.statistics, result.statistics + kInvStd * layout.channels,
                                    result.gamma, result.beta, channel + k);
        }
        for_each_in_nhwc_block<kTaken<Fused>>(layout, channel, block.rank, normalize, valid);
    }
}

// ---- backward --------------------------------------------------------------------------------------------

// Of x and dy, or of x alone where the gradients of y are no array.
template <typename T, int Width, typename Source>
struct FetchInputs {
    const Source& source;
    FetchArray<T, Width> x, dy;

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
    Source source;
    const T* residual;
    ClippingActivation<A> phi;
    SharedCache<T, Width> cached_x, cached_dz;
    Normalization<A> norms[Channels];
    GradientSums<A> sums[Channels];

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
        sums[0].add(dz, value - norms[0].mean);
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
                sums[c].add(dz[k], value - norms[c].mean);
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
//   slots       those of x, and then those of dz
//   Loads        vectors in flight
template <typename T, Epilogue Fused, int Loads, typename Source, typename Valid = AllPositions>
__device__ __forceinline__ void backward_persistent_nchw(
    const Source& source, const T* x, const ChannelArrays<accumulate_t<T>>& of_channels, const T* residual,
    int activation, const GradientResult<accumulate_t<T>>& result, T* dx, T* dresidual,
    unsigned int* barrier_count, accumulate_t<T> inv_count, int slots_of_x, uint4* slots,
    const NchwLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    __shared__ GradientSums<A> warp_values[kChannelThreads / kWarpThreads];
    __shared__ ChannelGradients<A> of_channel;
    uint4* const slots_of_dz = slots + slots_of_x * kChannelThreads;
    const GroupBlock block(layout.blocks);
    unsigned int expected = 0;
    for (int channel = block.group; channel < layout.channels; channel += block.groups) {
        FetchInputs<T, kWidth, Source> fetch{source,
                                             {x, SharedCache<T, kWidth>(slots)},
                                             {source.array(), SharedCache<T, kWidth>(slots_of_dz)}};
        for_each_in_nchw_block<T, kFetched / 2, Source::kWhole>(layout, channel, block.rank, fetch, valid);
        if constexpr (Source::kIsKept && !Source::kIsArray) {
            // Threads have each other's slots, of the channel before as well.
            __syncthreads();
            source.fill(layout, channel, block.rank, slots_of_dz);
            __syncthreads();
        }
        SumsOfCached<T, kWidth, 1, Fused, Source> keep{source,
                                                       residual,
                                                       ClippingActivation<A>(activation),
                                                       SharedCache<T, kWidth>(slots),
                                                       SharedCache<T, kWidth>(slots_of_dz),
                                                       {},
                                                       {GradientSums<A>::identity()}};
        of_channels.load(keep.norms[0], channel);
        wait_for_copies();
        for_each_in_nchw_block<T, Loads, Source::kWhole>(layout, channel, block.rank, keep, valid);
        GradientSums<A> sums = block_reduce(keep.sums[0], warp_values);
        if (layout.blocks > 1) {
            if (linear_thread() == 0) result.write_partial(sums, channel, block.rank, layout.blocks);
            expected += static_cast<unsigned int>(layout.blocks);
            group_barrier(barrier_count + block.group, expected);
            if (linear_thread() < kWarpThreads)
                sums = merged_sums(result.partial_sums, channel, layout.blocks);
        }
        if (linear_thread() == 0) {
            of_channel = result.finished(sums, channel);
            if (block.rank == 0) result.write(of_channel, channel);
        }
        __syncthreads();
        InputGradientsCached<T, kWidth, 1, Fused> gradients{SharedCache<T, kWidth>(slots),
                                                            SharedCache<T, kWidth>(slots_of_dz),
                                                            dx,
                                                            dresidual,
                                                            {keep.norms[0]},
                                                            {}};
        gradients.input_gradients[0].set(of_channels.inv_std[channel], of_channel.dgamma, of_channel.dbeta,
                                         inv_count);
        for_each_in_nchw_block<T, Loads, Source::kWhole>(layout, channel, block.rank, gradients, valid);
    }
}

template <typename T, int Width, Epilogue Fused, typename Source, typename Valid = AllPositions>
__device__ __forceinline__ void backward_persistent_nhwc(
    const Source& source, const T* x, const ChannelArrays<accumulate_t<T>>& of_channels, const T* residual,
    int activation, const GradientResult<accumulate_t<T>>& result, T* dx, T* dresidual,
    unsigned int* barrier_count, accumulate_t<T> inv_count, int slots_of_x, uint4* slots,
    const NhwcLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ GradientSums<A> scratch[kColumnScratch<Width>];
    uint4* const slots_of_dz = slots + slots_of_x * kChannelThreads;
    const GroupBlock block(layout.blocks);
    const unsigned int blocks = static_cast<unsigned int>(layout.blocks);
    unsigned int expected = 0;
    for (int tile = block.group; tile < layout.tiles; tile += block.groups) {
        const long long channel = channel_of_tile<Width>(tile);
        const bool exists = channel < layout.channels;
        SumsOfCached<T, Width, Width, Fused, Source> keep{source,
                                                          residual,
                                                          ClippingActivation<A>(activation),
                                                          SharedCache<T, Width>(slots),
                                                          SharedCache<T, Width>(slots_of_dz),
                                                          {},
                                                          {}};
        if (exists) {
            FetchInputs<T, Width, Source> fetch{source,
                                                {x, SharedCache<T, Width>(slots)},
                                                {source.array(), SharedCache<T, Width>(slots_of_dz)}};
            for_each_in_nhwc_block<kFetched / 2>(layout, channel, block.rank, fetch, valid);
        }
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            keep.sums[k] = GradientSums<A>::identity();
            if (exists) of_channels.load(keep.norms[k], channel + k);
        }
        wait_for_copies();
        if (exists) for_each_in_nhwc_block<1>(layout, channel, block.rank, keep, valid);
        column_reduce(keep.sums, scratch);
        if (threadIdx.y == 0 && exists) {
#pragma unroll
            for (int k = 0; k < Width; ++k)
                result.write(keep.sums[k], channel + k, block.rank, layout.blocks);
        }
        if (blocks > 1) {
            group_barrier(barrier_count + block.group, expected += blocks);
            for_each_channel_to_merge<Width>(layout, tile, block.rank, [&](long long of_tile) {
                const GradientSums<A> merged = merged_sums(result.partial_sums, of_tile, layout.blocks);
                if (linear_thread() % kWarpThreads == 0)
                    result.write(result.finished(merged, of_tile), of_tile);
            });
            group_barrier(barrier_count + block.group, expected += blocks);
        } else {
            __syncthreads();
        }
        if (!exists) continue;
        InputGradientsCached<T, Width, Width, Fused> gradients{
            SharedCache<T, Width>(slots), SharedCache<T, Width>(slots_of_dz), dx, dresidual, {}, {}};
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            gradients.norms[k] = keep.norms[k];
            gradients.input_gradients[k].load(of_channels.inv_std, result.dgamma, result.dbeta, inv_count,
                                              channel + k);
        }
        for_each_in_nhwc_block<1>(layout, channel, block.rank, gradients, valid);
    }
}
