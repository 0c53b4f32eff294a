// Batch normalisation of a padded batch, as in batch_norm.cu and batch_norm_persistent.cu: of positions that
// do not count nothing is read, and 0 is written there.
//
// Arguments are those of the same kernels there, and
//   valid         which positions count, see SomePositions
//   first_valid   the first of them
//   values        their number, of the whole batch
//   unbiased      bits of the rule's, which follows from their number
//   slots_of_x    of a thread, in those that read once
// Launch: as there; those that read once keep a byte for each slot of a thread, too.
#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"
#include "batch_norm_persistent.cuh"

__device__ __forceinline__ SomePositions positions(const unsigned int* valid,
                                                   unsigned long long first_valid = 0) {
    return {valid, static_cast<long long>(first_valid)};
}

// Those that a block keeps, where its memory begins; its slots follow.
__device__ __forceinline__ PositionsToCache cached(const SomePositions& positions, uint4*& slots,
                                                   int slots_of_x) {
    unsigned char* const cache = reinterpret_cast<unsigned char*>(slots);
    slots += slots_of_x * (kChannelThreads / static_cast<int>(sizeof(uint4)));
    return {positions, cache};
}

// Blocks that must fit on a multiprocessor at once: which values count takes registers, too.
template <typename Layout, Epilogue Fused>
constexpr int kPaddedBlocks =
    Fused == kIdentity ? kFusedBlocks<kPiecewiseLinear> : kLayoutBlocks<Layout, Fused>;

template <typename A>
__device__ __forceinline__ A inverse(unsigned long long values) {
    return static_cast<A>(1.0 / static_cast<double>(values));
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(kChannelThreads, kFusedBlocks<kPiecewiseLinear>)
    padded_batch_norm_statistics(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                 accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                                 accumulate_t<T>* running_mean, accumulate_t<T>* running_var,
                                 long long* batches, long long* skipped, unsigned int* arrived,
                                 FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps,
                                 const unsigned int* valid, unsigned long long first_valid,
                                 unsigned long long unbiased, Layout layout) {
    const RunningStatistics<accumulate_t<T>> running{running_mean, running_var, batches, skipped,
                                                     with_unbiased(rule, unbiased)};
    find_statistics(x, {partial_moments, statistics, gamma, beta, running, eps, layout.channels}, arrived,
                    layout, positions(valid, first_valid));
}

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPaddedBlocks<Layout, Fused>)
    padded_batch_norm_normalize(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* deviation,
                                const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                                int activation, T* y, accumulate_t<T>* statistics, double eps,
                                const unsigned int* valid, Layout layout) {
    normalize<T, Fused>(x, mean, deviation, gamma, beta, residual, activation, y, statistics, eps, layout,
                        positions(valid));
}

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPaddedBlocks<Layout, Fused>)
    padded_batch_norm_gradient_sums(const T* dy, const T* x, const accumulate_t<T>* mean,
                                    const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                    const accumulate_t<T>* beta, const T* residual, int activation,
                                    accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                    accumulate_t<T>* dbeta, const unsigned int* valid, Layout layout) {
    constexpr int kLoads = Layout::kIsNchw ? 1 : kSumLoads<Layout, Fused>;
    sum_gradients<T, Fused, kLoads, GradientArray<T, Layout>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout, positions(valid));
}

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, Fused, false>)
    padded_batch_norm_input_gradient(const T* dy, const T* x, const accumulate_t<T>* mean,
                                     const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                     const accumulate_t<T>* beta, const T* residual, int activation,
                                     const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                     T* dresidual, const unsigned int* valid, unsigned long long values,
                                     Layout layout) {
    find_input_gradients<T, Fused, GradientArray<T, Layout>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx, dresidual,
        inverse<accumulate_t<T>>(values), layout, positions(valid));
}

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks) padded_batch_norm_forward_persistent(
    const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual, int activation,
    T* y, accumulate_t<T>* partial_moments, accumulate_t<T>* statistics, accumulate_t<T>* running_mean,
    accumulate_t<T>* running_var, long long* batches, long long* skipped, unsigned int* barrier_count,
    FoldingRule<accumulate_t<T>> rule, accumulate_t<T> eps, int slots_of_x, const unsigned int* valid,
    unsigned long long first_valid, unsigned long long unbiased, Layout layout) {
    DYNAMIC_SHARED(memory);
    uint4* slots = memory;
    const PositionsToCache counted = cached(positions(valid, first_valid), slots, slots_of_x);
    const RunningStatistics<accumulate_t<T>> running{running_mean, running_var, batches, skipped,
                                                     with_unbiased(rule, unbiased)};
    const NormalizedOutput<T, Fused, SomePositions> output{residual, activation, y};
    forward_persistent(x, {partial_moments, statistics, gamma, beta, running, eps, layout.channels}, output,
                       barrier_count, slots, layout, counted);
}

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    padded_batch_norm_backward_persistent(const T* dy, const T* x, const accumulate_t<T>* mean,
                                          const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                          const accumulate_t<T>* beta, const T* residual, int activation,
                                          accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                          accumulate_t<T>* dbeta, T* dx, T* dresidual,
                                          unsigned int* barrier_count, int slots_of_x,
                                          const unsigned int* valid, unsigned long long values,
                                          Layout layout) {
    DYNAMIC_SHARED(memory);
    uint4* slots = memory;
    const PositionsToCache counted = cached(positions(valid), slots, slots_of_x);
    backward_persistent<T, Fused, GradientArray<T, Layout>>(
        {dy}, x, {mean, inv_std, gamma, beta}, residual, activation, {partial_sums, inv_std, dgamma, dbeta},
        dx, dresidual, barrier_count, inverse<accumulate_t<T>>(values), slots_of_x, slots, layout, counted);
}
