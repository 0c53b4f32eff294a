// Batch normalisation in one read of the data, where the values of a channel fit into the shared memory of a
// group of blocks.
//
// The blocks of a group share a channel (rows: a tile of channels) as in batch_norm.cu: a part each, walked
// in the same order, merged in the same order, so that the bits are those of batch_norm.cu. A block keeps the
// values of its part while the group agrees on the sums; then it takes them from where it kept them. Groups
// go from channel to channel on their own: while one waits or writes, another reads.
//
// Arguments are those of batch_norm.cu, and
//   barrier_count   [groups + 1], 0: see group_barrier; the last one, see arrives_last. Where a channel has a
//                   single block there is only the last one; null if the rule does not need all channels
// Launch: blockDim as in batch_norm.cu; blocks blocks a group, any number of groups; cooperative if blocks >
// 1; dynamic shared memory for what each thread keeps, kVectorBytes for a vector or a single value.
#include "batch_norm_persistent.cuh"

template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_forward_persistent(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                  const T* residual, int activation, T* y, accumulate_t<T>* partial_moments,
                                  accumulate_t<T>* statistics, accumulate_t<T>* running_mean,
                                  accumulate_t<T>* running_var, long long* batches, long long* skipped,
                                  unsigned int* barrier_count, FoldingRule<accumulate_t<T>> rule,
                                  accumulate_t<T> eps, Layout layout) {
    DYNAMIC_SHARED(slots);
    const RunningStatistics<accumulate_t<T>> running{running_mean, running_var, batches, skipped, rule};
    forward_persistent(x, {partial_moments, statistics, gamma, beta, running, eps, layout.channels},
                       NormalizedOutput<T, Fused>{residual, activation, y}, barrier_count, slots, layout);
}

//   activation   none or ReLU, whose gradient is exact; shared memory: what is kept of x, then of dz
template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_backward_persistent(const T* dy, const T* x, const accumulate_t<T>* mean,
                                   const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                   const accumulate_t<T>* beta, const T* residual, int activation,
                                   accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                   accumulate_t<T>* dbeta, T* dx, T* dresidual, unsigned int* barrier_count,
                                   accumulate_t<T> inv_count, int slots_of_x, Layout layout) {
    DYNAMIC_SHARED(slots);
    backward_persistent<T, Fused, GradientArray<T, Layout>>(
        {dy}, x, {mean, inv_std, gamma, beta}, residual, activation, {partial_sums, inv_std, dgamma, dbeta},
        dx, dresidual, barrier_count, inv_count, slots_of_x, slots, layout);
}
