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
//   Width                               of rows: channels a thread, of which channels is a multiple
//   Fused                               whether residual, activation and dresidual are looked at
// Launch: blockDim (x, y) of kChannelThreads in all, for rows y a power of two; planes: channels * parts
// blocks, rows: tiles * parts.
#include "batch_norm_backward.cuh"

// Statistics: final ones, or partial ones to be merged, see StatisticsResult.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_planes(const T* x, accumulate_t<T>* partial_moments, accumulate_t<T>* mean,
                                 accumulate_t<T>* var, accumulate_t<T>* inv_std, accumulate_t<T> eps,
                                 PlaneLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    const PlaneBlock block(layout);
    const A origin[1] = {to_accumulate(x[block.channel * layout.plane])};
    Statistics<T, kVectorWidth<T>, 1> statistics{x, {}, 0};
    for_each_in_plane_part<T, kReductionLoads>(layout, block.channel, block.part, statistics);
    Moments<A> moments[1];
    finish_moments(statistics, origin, moments, [&](auto& lowered) {
        for_each_in_plane_part<T, 1>(layout, block.channel, block.part, lowered);
    });
    moments[0] = block_reduce(moments[0], warp_values);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        const StatisticsResult<A> result{partial_moments, mean, var, inv_std, eps};
        result.write(moments[0], origin[0], block.channel, block.part, layout.parts);
    }
}

template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_rows(const T* x, accumulate_t<T>* partial_moments, accumulate_t<T>* mean,
                               accumulate_t<T>* var, accumulate_t<T>* inv_std, accumulate_t<T> eps,
                               RowLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[kColumnScratch<Width>];
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    Statistics<T, Width, Width> statistics{x, {}, 0};
    if (channel < layout.channels) for_each_in_row_part<kReductionLoads>(layout, channel, part, statistics);
    Moments<A> moments[Width];
    A origins[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k)
        origins[k] = channel < layout.channels ? to_accumulate(x[channel + k]) : A(0);
    finish_moments(statistics, origins, moments,
                   [&](auto& lowered) { for_each_in_row_part<1>(layout, channel, part, lowered); });
    column_reduce(moments, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
    const StatisticsResult<A> result{partial_moments, mean, var, inv_std, eps};
#pragma unroll
    for (int k = 0; k < Width; ++k) result.write(moments[k], origins[k], channel + k, part, layout.parts);
}

// Statistics of each channel, from those of its parts; see StatisticsResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_statistics(const A* partial_moments, A* mean, A* var, A* inv_std, A eps,
                                long long channels, long long parts) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    A origin;
    const Moments<A> moments = merged_moments(partial_moments, channel, parts, origin);
    if (threadIdx.x % kWarpThreads != 0) return;
    const StatisticsResult<A> result{nullptr, mean, var, inv_std, eps};
    result.write(result.finished(moments, origin), channel);
}

// y = phi(gamma * (x - mean) * inv_std + beta + residual).
template <typename T, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_normalize_planes(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                                int activation, T* y, PlaneLayout layout) {
    const PlaneBlock block(layout);
    Normalize<T, kVectorWidth<T>, 1, Fused> normalize{x, residual, activation, y, {}};
    normalize.rules[0].load(mean, inv_std, gamma, beta, block.channel);
    for_each_in_plane_part<T, kFusedLoads<Fused>>(layout, block.channel, block.part, normalize);
}

template <typename T, int Width, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_normalize_rows(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                              const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                              int activation, T* y, RowLayout layout) {
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    if (channel >= layout.channels) return;
    Normalize<T, Width, Width, Fused> normalize{x, residual, activation, y, {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) normalize.rules[k].load(mean, inv_std, gamma, beta, channel + k);
    for_each_in_row_part<kFusedLoads<Fused>>(layout, channel, part, normalize);
}

// Gradients of the parameters: final ones, or partial ones to be merged, see GradientResult.
template <typename T, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_gradient_sums_planes(const T* dy, const T* x, const accumulate_t<T>* mean,
                                    const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                    const accumulate_t<T>* beta, const T* residual, int activation,
                                    accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                    accumulate_t<T>* dbeta, PlaneLayout layout) {
    using Source = GradientArray<T, kVectorWidth<T>>;
    sum_gradients_of_planes<T, Fused, kFusedLoads<Fused>, Source>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout);
}

template <typename T, int Width, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_gradient_sums_rows(const T* dy, const T* x, const accumulate_t<T>* mean,
                                  const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                  const accumulate_t<T>* beta, const T* residual, int activation,
                                  accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                  accumulate_t<T>* dbeta, RowLayout layout) {
    // What is fused takes the registers of a second one.
    constexpr int kLoads = Fused == kPlain ? kFusedLoads<Fused> : 1;
    sum_gradients_of_rows<T, Width, Fused, kLoads, GradientArray<T, Width>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout);
}

// Gradients of the parameters of each channel, from the sums of its parts; see GradientResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_gradients(const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta,
                               long long channels, long long parts) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    const GradientSums<A> sums = merged_sums(partial_sums, channel, parts);
    if (threadIdx.x % kWarpThreads != 0) return;
    const GradientResult<A> result{nullptr, inv_std, dgamma, dbeta};
    result.write(result.finished(sums, channel), channel);
}

// Gradients of x and of the residual.
//   dgamma, dbeta   may be null: the statistics were given
//   inv_count       1 / values of a channel
template <typename T, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_input_gradient_planes(const T* dy, const T* x, const accumulate_t<T>* mean,
                                     const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                     const accumulate_t<T>* beta, const T* residual, int activation,
                                     const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                     T* dresidual, accumulate_t<T> inv_count, PlaneLayout layout) {
    input_gradients_of_planes<T, Fused, GradientArray<T, kVectorWidth<T>>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx, dresidual,
        inv_count, layout);
}

template <typename T, int Width, Fusion Fused>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<Fused>)
    batch_norm_input_gradient_rows(const T* dy, const T* x, const accumulate_t<T>* mean,
                                   const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                   const accumulate_t<T>* beta, const T* residual, int activation,
                                   const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                   T* dresidual, accumulate_t<T> inv_count, RowLayout layout) {
    input_gradients_of_rows<T, Width, Fused, GradientArray<T, Width>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx, dresidual,
        inv_count, layout);
}
