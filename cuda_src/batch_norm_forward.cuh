// Statistics, and the normalisation by given ones: what batch_norm.cu does in each of two reads.
//   valid   AllPositions, or SomePositions: of others nothing is read, and 0 is written there
//
//   normalize_of_nchw<T, kIdentity>(x, mean, inv_std, gamma, beta, nullptr, kNoActivation, y,
//                                   nullptr, 0.0, layout);
#pragma once

#include "normalization.cuh"

template <typename T, typename Valid = AllPositions>
__device__ __forceinline__ void statistics_of_nchw(const T* x,
                                                   const StatisticsResult<accumulate_t<T>>& result,
                                                   const NchwLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    const NchwBlock block(layout);
    const A origin[1] = {to_accumulate(x[first_in_nchw(layout, block.channel, valid)])};
    Statistics<T, kVectorWidth<T>, 1> values{x, {}, 0};
    for_each_in_nchw_block<T, kStatisticsLoads<T, Valid>>(layout, block.channel, block.rank, values, valid);
    Moments<A> moments[1];
    finish_moments(values, origin, moments, [&](auto& lowered) {
        for_each_in_nchw_block<T, 1>(layout, block.channel, block.rank, lowered, valid);
    });
    moments[0] = block_reduce(moments[0], warp_values);
    if (threadIdx.x == 0 && threadIdx.y == 0)
        result.write(moments[0], origin[0], block.channel, block.rank, layout.blocks);
}

template <typename T, int Width, typename Valid = AllPositions>
__device__ __forceinline__ void statistics_of_nhwc(const T* x,
                                                   const StatisticsResult<accumulate_t<T>>& result,
                                                   const NhwcLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[kColumnScratch<Width>];
    const int rank = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, rank);
    Statistics<T, Width, Width> values{x, {}, 0};
    if (channel < layout.channels)
        for_each_in_nhwc_block<kStatisticsLoads<T, Valid>>(layout, channel, rank, values, valid);
    Moments<A> moments[Width];
    A origins[Width];
    const T* const first = x + first_in_nhwc(layout, valid) + channel;
#pragma unroll
    for (int k = 0; k < Width; ++k) origins[k] = channel < layout.channels ? to_accumulate(first[k]) : A(0);
    finish_moments(values, origins, moments,
                   [&](auto& lowered) { for_each_in_nhwc_block<1>(layout, channel, rank, lowered, valid); });
    column_reduce(moments, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
    // The origins are read again, for they would have kept registers.
#pragma unroll
    for (int k = 0; k < Width; ++k)
        result.write(moments[k], to_accumulate(first[k]), channel + k, rank, layout.blocks);
}

//   other arguments   of batch_norm_normalize_nchw and of _nhwc
template <typename T, Epilogue Fused, typename Valid = AllPositions>
__device__ __forceinline__ void normalize_of_nchw(const T* x, const accumulate_t<T>* mean,
                                                  const accumulate_t<T>* deviation,
                                                  const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                                  const T* residual, int activation, T* y,
                                                  accumulate_t<T>* statistics, double eps,
                                                  const NchwLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ A inv_std;
    const NchwBlock block(layout, number_from_the_end());
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
    normalize.norms[0].set(mean ? mean[block.channel] : A(0),
                           statistics != nullptr ? inv_std : deviation[block.channel], gamma, beta,
                           block.channel);
    for_each_in_nchw_block<T, kNormalizeLoads<Fused>>(layout, block.channel, block.rank, normalize, valid);
}

template <typename T, int Width, Epilogue Fused, typename Valid = AllPositions>
__device__ __forceinline__ void normalize_of_nhwc(const T* x, const accumulate_t<T>* mean,
                                                  const accumulate_t<T>* deviation,
                                                  const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                                  const T* residual, int activation, T* y,
                                                  accumulate_t<T>* statistics, double eps,
                                                  const NhwcLayout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    // Of the tile's channels: a vector for each of at most kRowThreads<Width> threads side by side.
    __shared__ A inv_std[kRowThreads<Width> * Width];
    const unsigned int number = number_from_the_end();
    const int rank = number / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, rank, number);
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
        normalize.norms[k].set(
            mean ? mean[channel + k] : A(0),
            statistics != nullptr ? inv_std[threadIdx.x * Width + k] : deviation[channel + k], gamma, beta,
            channel + k);
    }
    for_each_in_nhwc_block<kNormalizeLoads<Fused>>(layout, channel, rank, normalize, valid);
}
