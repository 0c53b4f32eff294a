// Batch normalisation in two reads of the data: statistics (or gradient sums) of each channel, then the
// result.
//
// A channel is spread over several blocks, whose number depends on the shape alone; each writes its partial
// result, and a warp a channel merges them in a fixed order (a single block's result needs no merging). No
// atomics: the bits are the same in every run.
//
// In every kernel:
//   x, y, dy, dx, residual, dresidual   planes: [batch, channels, plane] T, rows: [rows, channels] T;
//                                       16-byte aligned. residual and dresidual may be null
//   mean, inv_std, gamma, beta, ...     [channels]; mean, gamma, beta may be null: 0, 1, 0
//   activation                          its number, see with_fused_activation
//   Width                               of rows: channels of a thread; it divides channels
//   Fused                               whether residual, activation and dresidual are looked at
// Launch: blockDim (x, y) of kChannelThreads in all, for rows y a power of two; planes: channels * blocks
// blocks, rows: tiles * blocks.
#include "batch_norm_backward.cuh"

// Statistics: final ones, or partial ones to be merged, see StatisticsResult.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_nchw(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                               accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                               accumulate_t<T>* running_mean, accumulate_t<T>* running_var,
                               long long* batches, FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps,
                               NchwLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    const NchwBlock block(layout);
    const A origin[1] = {to_accumulate(x[block.channel * layout.plane])};
    Statistics<T, kVectorWidth<T>, 1> values{x, {}, 0};
    for_each_in_nchw_block<T, kReductionLoads>(layout, block.channel, block.rank, values);
    Moments<A> moments[1];
    finish_moments(values, origin, moments, [&](auto& lowered) {
        for_each_in_nchw_block<T, 1>(layout, block.channel, block.rank, lowered);
    });
    moments[0] = block_reduce(moments[0], warp_values);
    if (threadIdx.x != 0 || threadIdx.y != 0) return;
    const StatisticsResult<A> result{
        partial_moments, statistics, gamma, beta, {running_mean, running_var, batches, rule}, eps,
        layout.channels};
    result.write(moments[0], origin[0], block.channel, block.rank, layout.blocks);
}

template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_nhwc(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                               accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                               accumulate_t<T>* running_mean, accumulate_t<T>* running_var,
                               long long* batches, FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps,
                               NhwcLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[kColumnScratch<Width>];
    const int rank = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, rank);
    Statistics<T, Width, Width> values{x, {}, 0};
    if (channel < layout.channels) for_each_in_nhwc_block<kReductionLoads>(layout, channel, rank, values);
    Moments<A> moments[Width];
    A origins[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k)
        origins[k] = channel < layout.channels ? to_accumulate(x[channel + k]) : A(0);
    finish_moments(values, origins, moments,
                   [&](auto& lowered) { for_each_in_nhwc_block<1>(layout, channel, rank, lowered); });
    column_reduce(moments, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
    const StatisticsResult<A> result{
        partial_moments, statistics, gamma, beta, {running_mean, running_var, batches, rule}, eps,
        layout.channels};
#pragma unroll
    for (int k = 0; k < Width; ++k) result.write(moments[k], origins[k], channel + k, rank, layout.blocks);
}

// Statistics of each channel, from those of its blocks; see StatisticsResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_statistics(const A* partial_moments, const A* gamma, const A* beta, A* statistics,
                                A* running_mean, A* running_var, long long* batches, FoldingRule<A> rule,
                                A eps, long long channels, long long blocks) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    A origin;
    const Moments<A> moments = merged_moments(partial_moments, channel, blocks, origin);
    if (threadIdx.x % kWarpThreads != 0) return;
    const StatisticsResult<A> result{
        nullptr, statistics, gamma, beta, {running_mean, running_var, batches, rule}, eps, channels};
    result.write(result.finished(moments, origin), channel);
}

// y = phi(gamma * (x - mean) * inv_std + beta + residual).
//   deviation    inv_std, or the variance if there are statistics to write
//   statistics   [5, channels], see StatisticsRow: from given running statistics, which may change later; or
//   null eps          added to the variance; inv_std is rounded once
template <typename T, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_normalize_nchw(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* deviation,
                              const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                              int activation, T* y, accumulate_t<T>* statistics, double eps,
                              NchwLayout layout) {
    using A = accumulate_t<T>;
    __shared__ A inv_std;
    const NchwBlock block(layout);
    if (statistics != nullptr) {
        if (linear_thread() == 0) {
            inv_std = inverse_deviation(deviation[block.channel], eps);
            if (block.rank == 0) {
                write_statistics(statistics, {mean[block.channel], deviation[block.channel], inv_std}, gamma,
                                 beta, block.channel, layout.channels);
            }
        }
        __syncthreads();
    }
    Normalize<T, kVectorWidth<T>, 1, Fused> normalize{x, residual, activation, y, {}};
    normalize.rules[0].set(mean ? mean[block.channel] : A(0),
                           statistics != nullptr ? inv_std : deviation[block.channel], gamma, beta,
                           block.channel);
    for_each_in_nchw_block<T, kFusedLoads<Fused>>(layout, block.channel, block.rank, normalize);
}

template <typename T, int Width, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_normalize_nhwc(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* deviation,
                              const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                              int activation, T* y, accumulate_t<T>* statistics, double eps,
                              NhwcLayout layout) {
    using A = accumulate_t<T>;
    // Of the tile's channels: a vector for each of at most kRowThreads<Width> threads side by side.
    __shared__ A inv_std[kRowThreads<Width> * Width];
    const int rank = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, rank);
    if (statistics != nullptr) {
        const int own = linear_thread();
        const long long staged = channel - static_cast<long long>(threadIdx.x) * Width + own;
        if (own < static_cast<int>(blockDim.x) * Width && staged < layout.channels) {
            inv_std[own] = inverse_deviation(deviation[staged], eps);
            if (rank == 0) {
                write_statistics(statistics, {mean[staged], deviation[staged], inv_std[own]}, gamma, beta,
                                 staged, layout.channels);
            }
        }
        __syncthreads();
    }
    if (channel >= layout.channels) return;
    Normalize<T, Width, Width, Fused> normalize{x, residual, activation, y, {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        normalize.rules[k].set(
            mean ? mean[channel + k] : A(0),
            statistics != nullptr ? inv_std[threadIdx.x * Width + k] : deviation[channel + k], gamma, beta,
            channel + k);
    }
    for_each_in_nhwc_block<kFusedLoads<Fused>>(layout, channel, rank, normalize);
}

// Folds the statistics of a batch into the running ones, if it is taken; see RunningStatistics.
//   statistics   [5, channels]
//   batches      [1], those that are in the running statistics, this one included if it is taken
//   skipped      [1], those that were not taken; may be null
//   accepted     [1], whether it is taken; may be null: it is
//   cumulative   whether each batch counts alike: instead of rule.old and rule.newest
//   finite_only  take it only if all of its statistics are finite
//   is_empty     a batch of no values is counted and nothing else
// Launch: one block of kChannelThreads.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_fold(const A* statistics, A* running_mean, A* running_var, long long* batches,
                    long long* skipped, const unsigned char* accepted, FoldingRule<A> rule, int cumulative,
                    int finite_only, int is_empty, long long channels) {
    int taken = accepted == nullptr || *accepted != 0;
    if (finite_only) {
        for (long long c = threadIdx.x; c < channels; c += kChannelThreads)
            taken = taken && isfinite(statistics[kMean * channels + c]) &&
                    isfinite(statistics[kVar * channels + c]);
    }
    // Also: all threads have read the counts before one of them changes these.
    const long long before = *batches;
    taken = __syncthreads_and(taken);
    if (threadIdx.x == 0) {
        if (taken) *batches = before + 1;
        if (!taken && skipped != nullptr) *skipped += 1;
    }
    if (!taken || is_empty) return;
    if (cumulative) {
        const double newest = 1.0 / static_cast<double>(before + 1);
        rule.newest = static_cast<A>(newest);
        rule.old = static_cast<A>(1.0 - newest);
    }
    for (long long c = threadIdx.x; c < channels; c += kChannelThreads) {
        rule.fold(running_mean[c], statistics[kMean * channels + c]);
        rule.fold(running_var[c], statistics[kVar * channels + c] * rule.unbiased);
    }
}

// Given statistics and the parameters that go with them, as they are now; see StatisticsRow.
// Launch: 1-D, kChannelThreads, a thread a channel.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_keep_statistics(const A* mean, const A* var, const A* gamma, const A* beta, A* statistics,
                               double eps, long long channels) {
    const long long channel = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (channel >= channels) return;
    write_statistics(statistics, {mean[channel], var[channel], inverse_deviation(var[channel], eps)}, gamma,
                     beta, channel, channels);
}

// Gradients of the parameters: final ones, or partial ones to be merged, see GradientResult.
template <typename T, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_gradient_sums_nchw(const T* dy, const T* x, const accumulate_t<T>* mean,
                                  const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                  const accumulate_t<T>* beta, const T* residual, int activation,
                                  accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                  accumulate_t<T>* dbeta, NchwLayout layout) {
    using Source = GradientArray<T, kVectorWidth<T>>;
    sum_gradients_of_nchw<T, Fused, kFusedLoads<Fused>, Source>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout);
}

template <typename T, int Width, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_gradient_sums_nhwc(const T* dy, const T* x, const accumulate_t<T>* mean,
                                  const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                  const accumulate_t<T>* beta, const T* residual, int activation,
                                  accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                  accumulate_t<T>* dbeta, NhwcLayout layout) {
    // What is fused takes the registers of a second one.
    constexpr int kLoads = Fused == kIdentity ? kFusedLoads<Fused> : 1;
    sum_gradients_of_nhwc<T, Width, Fused, kLoads, GradientArray<T, Width>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout);
}

// Gradients of the parameters of each channel, from the sums of its blocks; see GradientResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_gradients(const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta,
                               long long channels, long long blocks) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    const GradientSums<A> sums = merged_sums(partial_sums, channel, blocks);
    if (threadIdx.x % kWarpThreads != 0) return;
    const GradientResult<A> result{nullptr, inv_std, dgamma, dbeta};
    result.write(result.finished(sums, channel), channel);
}

// Gradients of x and of the residual.
//   dgamma, dbeta   may be null: the statistics were given
//   inv_count       1 / values of a channel
template <typename T, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_input_gradient_nchw(const T* dy, const T* x, const accumulate_t<T>* mean,
                                   const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                   const accumulate_t<T>* beta, const T* residual, int activation,
                                   const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                   T* dresidual, accumulate_t<T> inv_count, NchwLayout layout) {
    input_gradients_of_nchw<T, Fused, GradientArray<T, kVectorWidth<T>>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx, dresidual,
        inv_count, layout);
}

template <typename T, int Width, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_input_gradient_nhwc(const T* dy, const T* x, const accumulate_t<T>* mean,
                                   const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                   const accumulate_t<T>* beta, const T* residual, int activation,
                                   const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                   T* dresidual, accumulate_t<T> inv_count, NhwcLayout layout) {
    input_gradients_of_nhwc<T, Width, Fused, GradientArray<T, Width>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx, dresidual,
        inv_count, layout);
}
