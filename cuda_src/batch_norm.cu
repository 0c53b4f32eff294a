// Batch normalisation in two reads of the data: statistics (or gradient sums) of each channel, then the
// result.
//
// A channel is spread over several blocks, whose number depends on the shape alone; each writes its partial
// result, and a warp a channel merges them in a fixed order (a single block's result needs no merging). No
// atomics: the bits are the same in every run.
//
// In every kernel:
//   x, y, dy, dx, residual, dresidual   planes: [batch, channels, plane] T, rows: [rows, channels] T;
//                                       16-byte aligned. residual and dresidual may be null; dx may be dy
//   mean, inv_std, gamma, beta, ...     [channels]; mean, gamma, beta may be null: 0, 1, 0
//   activation                          its number, see with_fused_activation
//   Layout                              NchwLayout, or NhwcLayout<Width>, whose Width divides channels
//   Fused                               whether residual, activation and dresidual are looked at
// Launch: blockDim (x, y) of kChannelThreads in all, for rows y a power of two; planes: channels * blocks
// blocks, rows: tiles * blocks.
#include "batch_norm_backward.cuh"
#include "batch_norm_forward.cuh"

// Statistics: final ones, or partial ones to be merged, see StatisticsResult.
template <typename T, typename Layout>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics(const T* x, const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                          accumulate_t<T>* partial_moments, accumulate_t<T>* statistics,
                          accumulate_t<T>* running_mean, accumulate_t<T>* running_var, long long* batches,
                          long long* skipped, unsigned int* arrived, FoldingRule<accumulate_t<T>> rule,
                          accumulate_t<T> eps, Layout layout) {
    const RunningStatistics<accumulate_t<T>> running{running_mean, running_var, batches, skipped, rule};
    find_statistics(x, {partial_moments, statistics, gamma, beta, running, eps, layout.channels}, arrived,
                    layout);
}

// Blocks that must fit on a multiprocessor at once: there are few of them, and each waits for all that it
// reads.
constexpr int kMergingBlocks = 2;

// Statistics of each channel, from those of its blocks; see StatisticsResult.
//   unbiased   bits of the rule's
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kMergingBlocks)
    batch_norm_merge_statistics(const A* partial_moments, const A* gamma, const A* beta, A* statistics,
                                A* running_mean, A* running_var, long long* batches, long long* skipped,
                                unsigned int* arrived, FoldingRule<A> rule, A eps,
                                unsigned long long unbiased, long long channels, long long blocks) {
    const RunningStatistics<A> running{running_mean, running_var, batches, skipped,
                                       with_unbiased(rule, unbiased)};
    const StatisticsResult<A> result{
        const_cast<A*>(partial_moments), statistics, gamma, beta, running, eps, channels};
    merge_parts(result, channels, blocks);
    result.fold_by_last(arrived, gridDim.x);
}

// y = phi(gamma * (x - mean) * inv_std + beta + residual). y may be x.
//   deviation    inv_std, or the variance if there are statistics to write
//   statistics   [5, channels], see StatisticsRow: from given running statistics, which may change later;
//                or null
//   eps          added to the variance; inv_std is rounded once
template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, Fused>)
    batch_norm_normalize(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* deviation,
                         const accumulate_t<T>* gamma, const accumulate_t<T>* beta, const T* residual,
                         int activation, T* y, accumulate_t<T>* statistics, double eps, Layout layout) {
    normalize<T, Fused>(x, mean, deviation, gamma, beta, residual, activation, y, statistics, eps, layout);
}

// By which the variance of so many values is multiplied to be unbiased.
template <typename A>
__device__ __forceinline__ A unbiased_factor(double values) {
    return static_cast<A>(values / max(values - 1.0, 1.0));
}

// Folds given statistics of a batch into the running ones; see RunningStatistics::fold_all.
//   statistics   [5, channels]
//   accepted     [1], may be null: it is
//   values       [1], of a channel in the batch; null if rule.unbiased and is_empty say enough
// Launch: one block of kChannelThreads.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_fold(const A* statistics, A* running_mean, A* running_var, long long* batches,
                    long long* skipped, const unsigned char* accepted, const double* values,
                    FoldingRule<A> rule, int is_empty, long long channels) {
    if (values != nullptr) {
        is_empty = *values == 0.0;
        rule.unbiased = unbiased_factor<A>(*values);
    }
    const RunningStatistics<A> running{running_mean, running_var, batches, skipped, rule};
    running.fold_all(statistics, channels, accepted == nullptr || *accepted != 0, is_empty);
}

// Mean and variance of all values from those of their parts, in the order of the parts, in double (Chan,
// Golub and LeVeque, 1979); folded into the running ones, whose rule counts nothing here.
//   parts         [part_count, part_size], whose rows kMean and kVar are of channels
//   counts        values of each, `apart` from one to the next; or null: count, of the last one last
//   statistics    [2, channels], kMean and kVar; 0 of no values
//   total         [1], values of all; may be null
//   running_mean, running_var, batches   null where there are none; of no values the batch is only counted
//   arrived       see arrives_last; may be null if the rule does not need all channels
// Launch: 1-D, kChannelThreads, a thread a channel, at least one block.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_parts(const A* parts, const double* counts, unsigned long long count,
                           unsigned long long last, A* statistics, double* total, A* running_mean,
                           A* running_var, long long* batches, long long* skipped, unsigned int* arrived,
                           FoldingRule<A> rule, long long apart, long long part_count, long long part_size,
                           long long channels) {
    const long long channel = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    // Of a thread without a channel too, which may have to fold others in.
    const long long shown = max(min(channel, channels - 1), 0ll);
    double values = 0.0, mean = 0.0, squares = 0.0;
    for (long long part = 0; part < part_count; ++part) {
        const double own =
            counts ? counts[part * apart] : static_cast<double>(part + 1 < part_count ? count : last);
        if (own == 0.0) continue;
        const A* const column = parts + part * part_size + shown;
        const double own_mean = column[kMean * channels], own_squares = column[kVar * channels] * own;
        const double sum = values + own, difference = own_mean - mean;
        const bool is_first = values == 0.0;
        mean = is_first ? own_mean : mean + difference * (own / sum);
        squares =
            is_first ? own_squares : squares + own_squares + difference * difference * (values * own / sum);
        values = sum;
    }
    const bool is_empty = values == 0.0;
    rule.unbiased = unbiased_factor<A>(values);
    const RunningStatistics<A> running{running_mean, running_var, batches, skipped, rule};
    // The first thread counts, also if there are no channels.
    if (channel == 0) {
        if (total) *total = values;
        if (batches && !rule.needs_all()) *batches += 1;
    }
    if (channel < channels) {
        const A all_mean = static_cast<A>(mean);
        const A all_var = static_cast<A>(is_empty ? 0.0 : squares / values);
        statistics[kMean * channels + channel] = all_mean;
        statistics[kVar * channels + channel] = all_var;
        if (running_mean && !is_empty && !rule.needs_all()) {
            rule.fold(running_mean[channel], all_mean);
            rule.fold(running_var[channel], all_var * rule.unbiased);
        }
    }
    if (rule.needs_all() && arrives_last(arrived, gridDim.x))
        running.fold_all(statistics, channels, true, is_empty);
}

// Given statistics and the parameters that go with them, as they are now; see StatisticsRow.
// Launch: 1-D, kChannelThreads, a thread a channel.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_keep_statistics(const A* mean, const A* var, const A* gamma, const A* beta, A* statistics,
                               double eps, long long channels) {
    const long long channel = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (channel >= channels) return;
    write_statistics(statistics, {mean[channel], var[channel], inverse_deviation(var[channel], eps)},
                     ChannelParameters<A>::of(gamma, beta, channel), channel, channels);
}

// Gradients of the parameters: final ones, or partial ones to be merged, see GradientResult.
template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, Fused>)
    batch_norm_gradient_sums(const T* dy, const T* x, const accumulate_t<T>* mean,
                             const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                             const accumulate_t<T>* beta, const T* residual, int activation,
                             accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma, accumulate_t<T>* dbeta,
                             Layout layout) {
    sum_gradients<T, Fused, kSumLoads<Layout, Fused>, GradientArray<T, Layout>>(
        {{dy}, x, residual, activation}, {mean, inv_std, gamma, beta}, {partial_sums, inv_std, dgamma, dbeta},
        layout);
}

// Gradients of the parameters of each channel, from the sums of its blocks; see GradientResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_gradients(const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta,
                               long long channels, long long blocks) {
    merge_parts(GradientResult<A>{const_cast<A*>(partial_sums), inv_std, dgamma, dbeta}, channels, blocks);
}

// The gradients of the parameters over all parts: sums in double, in the order of the parts; or the shares of
// each value in them, which an input gradient takes with an inv_count of 1.
//   sums            [part_count, 2, channels], dgamma and dbeta of each
//   count           [1], values of a channel in all parts; or null: the gradients themselves
//   dgamma, dbeta   [channels]
// Launch: 1-D, kChannelThreads, a thread a number.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_add_gradients(const A* sums, const double* count, A* dgamma, A* dbeta, long long part_count,
                             long long channels) {
    const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    const long long size = 2 * channels;
    if (i >= size) return;
    double sum = sums[i];
    for (long long part = 1; part < part_count; ++part) sum += sums[part * size + i];
    const A added = static_cast<A>(sum) * (count ? static_cast<A>(1.0 / *count) : A(1));
    (i < channels ? dgamma[i] : dbeta[i - channels]) = added;
}

// Gradients of x and of the residual.
//   dgamma, dbeta   may be null: the statistics were given
//   inv_count       1 / values of a channel
template <typename T, typename Layout, Epilogue Fused>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, Fused, false>)
    batch_norm_input_gradient(const T* dy, const T* x, const accumulate_t<T>* mean,
                              const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                              const accumulate_t<T>* beta, const T* residual, int activation,
                              const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                              T* dresidual, accumulate_t<T> inv_count, Layout layout) {
    find_input_gradients<T, Fused, GradientArray<T, Layout>>({{dy}, x, residual, activation},
                                                             {mean, inv_std, gamma, beta}, dgamma, dbeta, dx,
                                                             dresidual, inv_count, layout);
}
