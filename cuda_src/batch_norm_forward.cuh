// Statistics, and the normalisation by given ones: what batch_norm.cu does in each of two reads.
//   valid   AllPositions, or SomePositions: of others nothing is read, and 0 is written there
//
//   normalize<T, kIdentity>(x, mean, inv_std, gamma, beta, nullptr, kNoActivation, y, nullptr, 0.0, layout);
#pragma once

#include "normalization.cuh"

//   arrived   see StatisticsResult::fold_by_last
template <typename T, typename Layout, typename Valid = AllPositions>
__device__ __forceinline__ void find_statistics(const T* x, const StatisticsResult<accumulate_t<T>>& result,
                                                unsigned int* arrived, const Layout& layout,
                                                const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kChannels = Layout::kChannels;
    __shared__ MomentsScratch<A, Layout> scratch;
    const auto block = layout.block();
    const bool exists = layout.has(block.channel);
    const Origins<T, Layout, Valid> origins(x, layout, block.channel, valid);
    Statistics<T, kLayoutWidth<T, Layout>, kChannels> values{x, {}, 0};
    if (exists)
        for_each_in_block<T, kStatisticsLoads<T, Layout, Valid>>(layout, block.channel, block.rank, values,
                                                                 valid);
    const auto again = [&](auto& lowered) {
        if (exists) for_each_in_block<T, 1>(layout, block.channel, block.rank, lowered, valid);
    };
    reduce_moments(layout, values, origins, scratch, again, [&](int k, const auto& part) {
        write_result(result, part, block.channel + k, block.rank, layout.blocks);
    });
    if (layout.blocks == 1) result.fold_by_last(arrived, gridDim.x);
}

//   other arguments   of batch_norm_normalize
template <typename T, Epilogue Fused, typename Layout, typename Valid = AllPositions>
__device__ __forceinline__ void normalize(const T* x, const accumulate_t<T>* mean,
                                          const accumulate_t<T>* deviation, const accumulate_t<T>* gamma,
                                          const accumulate_t<T>* beta, const T* residual, int activation,
                                          T* y, accumulate_t<T>* statistics, double eps, const Layout& layout,
                                          const Valid& valid = {}) {
    using A = accumulate_t<T>;
    __shared__ A inv_std[kTileChannels<Layout>];
    const auto block = layout.block(number_from_the_end());
    const int place = layout.place_in_tile();
    if (statistics != nullptr) {
        const int own = linear_thread();
        const auto staged = block.channel - place + own;
        if (own < layout.tile_channels() && layout.has(staged)) {
            inv_std[own] = inverse_deviation(deviation[staged], eps);
            if (block.rank == 0) {
                write_statistics(statistics, {mean[staged], deviation[staged], inv_std[own]},
                                 ChannelParameters<A>::of(gamma, beta, staged), staged, layout.channels);
            }
        }
        __syncthreads();
    }
    if (!layout.has(block.channel)) return;
    Normalize<T, kLayoutWidth<T, Layout>, Layout::kChannels, Fused> body{x, residual, activation, y, {}};
#pragma unroll
    for (int k = 0; k < Layout::kChannels; ++k) {
        const auto channel = block.channel + k;
        body.norms[k].set(mean ? mean[channel] : A(0),
                          statistics != nullptr ? inv_std[place + k] : deviation[channel], gamma, beta,
                          channel);
    }
    for_each_in_block<T, kNormalizeLoads<Layout, Fused>, false, true>(layout, block.channel, block.rank, body,
                                                                      valid);
}
