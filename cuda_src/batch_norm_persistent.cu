// Batch normalisation in one read of the data, where the values of a channel fit into the shared memory of a
// group of blocks.
//
// The blocks of a group share a channel (rows: a tile of channels) as in batch_norm.cu: a part each, walked
// in the same order, merged in the same order, so that the bits are those of batch_norm.cu. A block keeps the
// values of its part while the group agrees on the sums; then it takes them from where it kept them. Groups
// go from channel to channel on their own: while one waits or writes, another reads.
//
// Arguments are those of batch_norm.cu, and
//   barrier_count   [groups], 0: see group_barrier. Unused, and may be null, where a channel has a single
//   block
// Launch: blockDim as in batch_norm.cu; blocks blocks a group, any number of groups; cooperative if blocks >
// 1; dynamic shared memory for what each thread keeps, kVectorBytes for a vector or a single value.
#include "batch_norm_persistent.cuh"

// ---- forward ---------------------------------------------------------------------------------------------

template <typename T, int Width, int Channels>
struct KeepStatistics {
    Statistics<T, Width, Channels> statistics;
    SharedCache<T, Width> kept;

    __device__ __forceinline__ void scalar(long long i) {
        const T value = statistics.x[i];
        kept.put(value);
        statistics.take(value);
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> loaded[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) loaded[u] = Vector<T, Width>::load(statistics.x + i + u * step);
#pragma unroll
        for (int u = 0; u < Count; ++u) kept.put(loaded[u]);
        statistics.take(loaded);
    }
};

template <typename T, int Width, int Channels>
struct NormalizeCached {
    using A = accumulate_t<T>;
    SharedCache<T, Width> kept;
    const T* residual;
    PiecewiseLinearActivation<A> phi;
    T* y;
    Normalization<A> rules[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        const A z = rules[0].apply(to_accumulate(kept.get())) + residual_at(residual, i);
        y[i] = from_accumulate<T>(phi.forward(z));
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) added[u] = residual_at<T, Width>(residual, i + u * step);
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            Vector<T, Width> values = kept.get_vector();
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A z = rules[channel_of<Channels>(k)].apply(to_accumulate(values[k]));
                values[k] = from_accumulate<T>(phi.forward(z + to_accumulate(added[u][k])));
            }
            values.store(y + i + u * step);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_forward_persistent_nchw(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                       const T* residual, int activation, T* y,
                                       accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                                       accumulate_t<T>* running_mean, accumulate_t<T>* running_var,
                                       long long* batches, unsigned int* barrier_count,
                                       FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps,
                                       NchwLayout layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    __shared__ ChannelStatistics<A> of_channel;
    PERSISTENT_SHARED(slots);
    const GroupBlock block(layout.blocks);
    const StatisticsResult<A> result{
        partial_moments, statistics, gamma, beta, {running_mean, running_var, batches, rule}, eps,
        layout.channels};
    unsigned int expected = 0;
    for (int channel = block.group; channel < layout.channels; channel += block.groups) {
        A origin[1] = {to_accumulate(x[channel * layout.plane])};
        KeepStatistics<T, kWidth, 1> keep{{x, {}, 0}, SharedCache<T, kWidth>(slots)};
        for_each_in_nchw_block<T, kReductionLoads>(layout, channel, block.rank, keep);
        Moments<A> of_part[1];
        finish_moments(keep.statistics, origin, of_part, [&](auto& lowered) {
            for_each_in_nchw_block<T, 1>(layout, channel, block.rank, lowered);
        });
        Moments<A> moments = block_reduce(of_part[0], warp_values);
        if (layout.blocks > 1) {
            if (linear_thread() == 0)
                result.write_partial(moments, origin[0], channel, block.rank, layout.blocks);
            expected += static_cast<unsigned int>(layout.blocks);
            group_barrier(barrier_count + block.group, expected);
            if (linear_thread() < kWarpThreads)
                moments = merged_moments(partial_moments, channel, layout.blocks, origin[0]);
        }
        if (linear_thread() == 0) {
            of_channel = result.finished(moments, origin[0]);
            if (block.rank == 0) result.write(of_channel, channel);
        }
        __syncthreads();
        NormalizeCached<T, kWidth, 1> normalize{
            SharedCache<T, kWidth>(slots), residual, PiecewiseLinearActivation<A>(activation), y, {}};
        normalize.rules[0].set(of_channel.mean, of_channel.inv_std, gamma, beta, channel);
        for_each_in_nchw_block<T, kReductionLoads>(layout, channel, block.rank, normalize);
    }
}

template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_forward_persistent_nhwc(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                       const T* residual, int activation, T* y,
                                       accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                                       accumulate_t<T>* running_mean, accumulate_t<T>* running_var,
                                       long long* batches, unsigned int* barrier_count,
                                       FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps,
                                       NhwcLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[kColumnScratch<Width>];
    PERSISTENT_SHARED(slots);
    const GroupBlock block(layout.blocks);
    const StatisticsResult<A> result{
        partial_moments, statistics, gamma, beta, {running_mean, running_var, batches, rule}, eps,
        layout.channels};
    const unsigned int blocks = static_cast<unsigned int>(layout.blocks);
    unsigned int expected = 0;
    for (int tile = block.group; tile < layout.tiles; tile += block.groups) {
        const long long channel = channel_of_tile<Width>(tile);
        const bool exists = channel < layout.channels;
        KeepStatistics<T, Width, Width> keep{{x, {}, 0}, SharedCache<T, Width>(slots)};
        if (exists) for_each_in_nhwc_block<kReductionLoads>(layout, channel, block.rank, keep);
        Moments<A> moments[Width];
        A origins[Width];
#pragma unroll
        for (int k = 0; k < Width; ++k) origins[k] = exists ? to_accumulate(x[channel + k]) : A(0);
        finish_moments(keep.statistics, origins, moments, [&](auto& lowered) {
            for_each_in_nhwc_block<1>(layout, channel, block.rank, lowered);
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
                const Moments<A> merged = merged_moments(partial_moments, of_tile, layout.blocks, origin);
                if (linear_thread() % kWarpThreads == 0)
                    result.write(result.finished(merged, origin), of_tile);
            });
            group_barrier(barrier_count + block.group, expected += blocks);
        } else {
            __syncthreads();
        }
        if (!exists) continue;
        NormalizeCached<T, Width, Width> normalize{
            SharedCache<T, Width>(slots), residual, PiecewiseLinearActivation<A>(activation), y, {}};
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            normalize.rules[k].load(statistics, statistics + kInvStd * layout.channels, gamma, beta,
                                    channel + k);
        }
        for_each_in_nhwc_block<kReductionLoads>(layout, channel, block.rank, normalize);
    }
}

// ---- backward --------------------------------------------------------------------------------------------

//   activation   none or ReLU, whose gradient is exact; shared memory: what is kept of x, then of dz
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_backward_persistent_nchw(const T* dy, const T* x, const accumulate_t<T>* mean,
                                        const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                        const accumulate_t<T>* beta, const T* residual, int activation,
                                        accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                        accumulate_t<T>* dbeta, T* dx, T* dresidual,
                                        unsigned int* barrier_count, accumulate_t<T> inv_count,
                                        int slots_of_x, NchwLayout layout) {
    PERSISTENT_SHARED(slots);
    backward_persistent_nchw<T, kFusedLoads<kPiecewiseLinear>, GradientArray<T, kVectorWidth<T>>>(
        {dy}, x, {mean, inv_std, gamma, beta}, residual, activation, {partial_sums, inv_std, dgamma, dbeta},
        dx, dresidual, barrier_count, inv_count, slots_of_x, slots, layout);
}

template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_backward_persistent_nhwc(const T* dy, const T* x, const accumulate_t<T>* mean,
                                        const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                        const accumulate_t<T>* beta, const T* residual, int activation,
                                        accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                        accumulate_t<T>* dbeta, T* dx, T* dresidual,
                                        unsigned int* barrier_count, accumulate_t<T> inv_count,
                                        int slots_of_x, NhwcLayout layout) {
    PERSISTENT_SHARED(slots);
    backward_persistent_nhwc<T, Width, GradientArray<T, Width>>(
        {dy}, x, {mean, inv_std, gamma, beta}, residual, activation, {partial_sums, inv_std, dgamma, dbeta},
        dx, dresidual, barrier_count, inv_count, slots_of_x, slots, layout);
}
