// What batch norm computes for a value and for a channel, whichever kernel has the value: statistics, the
// normalisation with residual and activation, gradients. The bodies are what for_each_in_block
// calls: a thread has vectors of Width values, which are of `Channels` channels: of 1
// in planes, of Width in rows.
#pragma once

#include "activation.cuh"
#include "channel_layout.cuh"
#include "group_barrier.cuh"
#include "moments.cuh"

__device__ __forceinline__ int linear_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Mean, biased variance and 1 / sqrt(variance + eps) of a channel.
template <typename A>
struct ChannelStatistics {
    A mean, var, inv_std;
};

// Rows of what batch norm keeps of the channels: ChannelStatistics, and the parameters that went with them.
enum StatisticsRow { kMean, kVar, kInvStd, kGamma, kBeta };

// How the statistics of a batch are folded into running ones: running = running * old + batch * newest, of
// the variance times unbiased: n / (n - 1) for n values.
//   cumulative    whether each batch counts alike: instead of old and newest
//   finite_only   whether a batch is taken only if all of its statistics are finite
template <typename A>
struct FoldingRule {
    A old, newest, unbiased;
    int cumulative, finite_only;

    // Of these rules one channel depends on the others: on their statistics, or on the number of batches,
    // which is changed only when all channels are done.
    __device__ __forceinline__ bool needs_all() const { return cumulative || finite_only; }

    __device__ __forceinline__ void fold(A& running, A batch) const {
        running = running * old + batch * newest;
    }
};

// The rule with another factor, of these bits: which a launcher tells in each call.
__device__ __forceinline__ FoldingRule<float> with_unbiased(FoldingRule<float> rule,
                                                            unsigned long long bits) {
    rule.unbiased = __uint_as_float(static_cast<unsigned int>(bits));
    return rule;
}
__device__ __forceinline__ FoldingRule<double> with_unbiased(FoldingRule<double> rule,
                                                             unsigned long long bits) {
    rule.unbiased = __longlong_as_double(static_cast<long long>(bits));
    return rule;
}

// Running statistics. Null where there are none.
//   mean, var   [channels]
//   batches     [1], how many are in them
//   skipped     [1], how many were not taken; may be null
template <typename A>
struct RunningStatistics {
    A *mean, *var;
    long long *batches, *skipped;
    FoldingRule<A> rule;

    // A channel of a batch, by one thread, unless the rule needs all of them.
    __device__ __forceinline__ void fold(const ChannelStatistics<A>& batch, long long channel) const {
        if (mean == nullptr || rule.needs_all()) return;
        rule.fold(mean[channel], batch.mean);
        rule.fold(var[channel], batch.var * rule.unbiased);
        if (channel == 0) *batches += 1;
    }

    // All channels of a batch, by a block of kChannelThreads, in few instructions, which all kernels that
    // find statistics carry along.
    //   statistics   [2 or more, channels], see StatisticsRow
    //   accepted     whether it is taken, if the rule allows
    //   is_empty     a batch of no values is counted and nothing else
    __device__ __forceinline__ void fold_all(const A* statistics, long long channels, bool accepted = true,
                                             bool is_empty = false) const {
        static_assert(kMean == 0 && kVar == 1, "the rows that are folded in are the first");
        const int thread = linear_thread();
        if (rule.finite_only) {
#pragma unroll 1
            for (long long i = thread; i < 2 * channels; i += kChannelThreads)
                accepted = accepted && is_finite(statistics[i]);
        }
        // Also: all threads have read the count before it changes.
        const long long before = *batches;
        const bool taken = __syncthreads_and(accepted);
        if (thread == 0) {
            if (taken) *batches = before + 1;
            if (!taken && skipped != nullptr) *skipped += 1;
        }
        if (!taken || is_empty) return;
        FoldingRule<A> applied = rule;
        if (rule.cumulative) {
            const double newest = 1.0 / static_cast<double>(before + 1);
            applied.newest = static_cast<A>(newest);
            applied.old = static_cast<A>(1.0 - newest);
        }
#pragma unroll 1
        for (long long i = thread; i < 2 * channels; i += kChannelThreads) {
            const bool is_mean = i < channels;
            applied.fold(is_mean ? mean[i] : var[i - channels],
                         is_mean ? statistics[i] : statistics[i] * rule.unbiased);
        }
    }
};

template <typename A>
__device__ __forceinline__ void write_statistics(A* statistics, const ChannelStatistics<A>& of_channel,
                                                 const A* gamma, const A* beta, long long channel,
                                                 long long channels) {
    A* column = statistics + channel;
    column[kMean * channels] = of_channel.mean;
    column[kVar * channels] = of_channel.var;
    column[kInvStd * channels] = of_channel.inv_std;
    column[kGamma * channels] = gamma ? gamma[channel] : A(1);
    column[kBeta * channels] = beta ? beta[channel] : A(0);
}

// Writes what a block has found of a channel: its numbers, or, if the channel has other blocks, a part of a
// result that these have to merge. A result, see below, has
//   write_part(part, channel, rank, blocks)
//   merged(channel, blocks)   all of the parts, in lane 0 of a warp, all of whose lanes call it
//   finished(part, channel)   the numbers of a channel, of what was merged or its only part
//   write(numbers, channel), read(channel)
template <typename Result>
__device__ __forceinline__ void write_result(const Result& result, const typename Result::Part& part,
                                             long long channel, long long rank, long long blocks) {
    if (blocks == 1) {
        result.write(result.finished(part, channel), channel);
    } else {
        result.write_part(part, channel, rank, blocks);
    }
}

// Where the statistics of each channel go.
//   partial_moments   [channels, blocks] count, mean - origin, variance, origin: the channel's first value,
//                     see Moments. Unused, and may be null, where a channel has a single block
//   statistics        [5, channels], see StatisticsRow
//   gamma, beta       [channels], copied there; may be null: 1, 0
template <typename A>
struct StatisticsResult {
    A* partial_moments;
    A* statistics;
    const A *gamma, *beta;
    RunningStatistics<A> running;
    A eps;
    long long channels;

    struct Part {
        Moments<A> moments;
        A origin;
    };

    __device__ __forceinline__ void write_part(const Part& part, long long channel, long long rank,
                                               long long blocks) const {
        A* partial = partial_moments + 4 * (channel * blocks + rank);
        partial[0] = part.moments.count;
        partial[1] = part.moments.mean;
        partial[2] = part.moments.var;
        partial[3] = part.origin;
    }

    __device__ __forceinline__ Part merged(long long channel, long long blocks) const {
        const A* partial = partial_moments + 4 * channel * blocks;
        Moments<A> moments = Moments<A>::identity();
        for (long long rank = linear_thread() % kWarpThreads; rank < blocks; rank += kWarpThreads)
            moments = moments.combine({partial[4 * rank], partial[4 * rank + 1], partial[4 * rank + 2]});
        return {warp_reduce(moments), partial[3]};
    }

    __device__ __forceinline__ ChannelStatistics<A> finished(const Part& part, long long) const {
        constexpr A kDown = Lowering<A>::kDown, kUp = Lowering<A>::kUp;
        const Moments<A>& moments = part.moments;
        const A var = moments.var;
        // With an infinity or NaN among the values nothing is known of them, whichever the order they came
        // in.
        if (!is_finite(var)) return {var - var, var - var, var - var};
        if (moments.count > A(0)) return {part.origin + moments.mean, var, A(1) / sqrt(var + eps)};
        return {fma(moments.mean, kUp, part.origin), var * kUp * kUp,
                kDown / sqrt(var + eps * kDown * kDown)};
    }

    __device__ __forceinline__ void write(const ChannelStatistics<A>& of_channel, long long channel) const {
        write_statistics(statistics, of_channel, gamma, beta, channel, channels);
        running.fold(of_channel, channel);
    }

    // Folds in a batch whose rule needs all channels, in the last of so many blocks to come here, each of
    // which has written its channels. All threads of these blocks must call it.
    //   arrived   see arrives_last; may be null if the rule does not
    __device__ __forceinline__ void fold_by_last(unsigned int* arrived, unsigned int blocks) const {
        if (running.rule.needs_all() && arrives_last(arrived, blocks)) running.fold_all(statistics, channels);
    }

    __device__ __forceinline__ ChannelStatistics<A> read(long long channel) const {
        const A* column = statistics + channel;
        return {column[kMean * channels], column[kVar * channels], column[kInvStd * channels]};
    }
};

// Gradients of gamma and beta of a channel: inv_std * sum dz * (x - mean), sum dz.
template <typename A>
struct ChannelGradients {
    A dgamma, dbeta;
};

// Where the sums of the gradients of each channel go.
//   partial_sums    [channels, blocks] of dz, of dz * (x - mean). Unused, and may be null, as above
//   inv_std         [channels]
//   dgamma, dbeta   [channels], see ChannelGradients
template <typename A>
struct GradientResult {
    A* partial_sums;
    const A* inv_std;
    A *dgamma, *dbeta;

    using Part = GradientSums<A>;

    __device__ __forceinline__ void write_part(const Part& sums, long long channel, long long rank,
                                               long long blocks) const {
        A* partial = partial_sums + 2 * (channel * blocks + rank);
        partial[0] = sums.dy;
        partial[1] = sums.dy_deviation;
    }

    __device__ __forceinline__ Part merged(long long channel, long long blocks) const {
        const A* partial = partial_sums + 2 * channel * blocks;
        Part sums = Part::identity();
        for (long long rank = linear_thread() % kWarpThreads; rank < blocks; rank += kWarpThreads)
            sums = sums.combine({partial[2 * rank], partial[2 * rank + 1]});
        return warp_reduce(sums);
    }

    __device__ __forceinline__ ChannelGradients<A> finished(const Part& sums, long long channel) const {
        return {sums.dy_deviation * inv_std[channel], sums.dy};
    }

    __device__ __forceinline__ void write(const ChannelGradients<A>& gradients, long long channel) const {
        dgamma[channel] = gradients.dgamma;
        dbeta[channel] = gradients.dbeta;
    }

    __device__ __forceinline__ ChannelGradients<A> read(long long channel) const {
        return {dgamma[channel], dbeta[channel]};
    }
};

// The numbers of each channel, from its parts: a warp a channel, blockDim.x a multiple of 32.
template <typename Result>
__device__ __forceinline__ void merge_parts(const Result& result, long long channels, long long blocks) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    const typename Result::Part merged = result.merged(channel, blocks);
    if (threadIdx.x % kWarpThreads == 0) result.write(result.finished(merged, channel), channel);
}

// Values that reduce_channels needs room for.
//   Parts   of rows, in how many a thread's channels are combined, one after another
template <typename Layout, int Parts = 1>
constexpr int kReductionScratch = kChannelThreads / kWarpThreads;
template <int Width, int Parts>
constexpr int kReductionScratch<NhwcLayout<Width>, Parts> =
    (Width > Parts ? Width / Parts : 1) * kChannelThreads;

// Combines what the threads of a block have of the same channels: take(k, value) is called by one thread for
// each, which has the channel as its k-th.
//   scratch   [kReductionScratch<Layout, Parts>] in shared memory
//   __shared__ Moments<A> scratch[kReductionScratch<Layout>];
//   reduce_channels(layout, moments, scratch, [&](int k, const Moments<A>& all) { write(channel + k, all);
//   });
// All threads of the block must call it; of rows, blockDim.x is a power of two, of a warp's threads at most.
template <typename Value, int Size, typename Take>
__device__ __forceinline__ void reduce_channels(const NchwLayout&, Value (&values)[1], Value (&scratch)[Size],
                                                Take take) {
    const Value all = block_reduce(values[0], scratch);
    if (linear_thread() == 0) take(0, all);
}
// A warp combines what all threads have of one of their channels.
template <int Width, typename Value, int Size, typename Take>
__device__ __forceinline__ void reduce_channels(const NhwcLayout<Width>&, Value (&values)[Width],
                                                Value (&scratch)[Size], Take take) {
    constexpr int kAtOnce = Size / kChannelThreads, kWarps = kChannelThreads / kWarpThreads;
    static_assert(kAtOnce <= kWarps, "a warp for each");
    const int thread = linear_thread(), lane = thread % kWarpThreads, warp = thread / kWarpThreads;
    const int columns = static_cast<int>(blockDim.x);
#pragma unroll
    for (int first = 0; first < Width; first += kAtOnce) {
        if (first > 0) __syncthreads();
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) scratch[k * kChannelThreads + thread] = values[first + k];
        __syncthreads();
        if (warp >= kAtOnce) continue;
        const Value* const own = scratch + warp * kChannelThreads + lane;
        Value all = own[0], others = own[kWarpThreads];
#pragma unroll 1
        for (int j = 2; j < kWarps; j += 2) {
            all = all.combine(own[j * kWarpThreads]);
            others = others.combine(own[(j + 1) * kWarpThreads]);
        }
        all = all.combine(others);
        for (int delta = kWarpThreads / 2; delta >= columns; delta /= 2)
            all = all.combine(all.shuffled_down(delta));
        if (lane < columns) take(first + warp, all);
    }
}

// 1 / sqrt(variance + eps), rounded once.
template <typename A>
__device__ __forceinline__ A inverse_deviation(A variance, double eps) {
    return static_cast<A>(1.0 / sqrt(static_cast<double>(variance) + eps));
}

// Threads side by side over the channels of rows at most.
template <int Width>
constexpr int kRowThreads = Width == 1 ? 32 : 8;
// Channels of a tile at most.
template <typename Layout>
constexpr int kTileChannels = 1;
template <int Width>
constexpr int kTileChannels<NhwcLayout<Width>> = kRowThreads<Width> * Width;

// Which of a thread's channels value k of a vector belongs to.
template <int Channels>
constexpr int channel_of(int k) {
    return Channels == 1 ? 0 : k;
}

// The vectors at i, i + step, ... of an array; a vector none of whose values count is not read.
template <typename T, int Width, int Count, typename Some>
__device__ __forceinline__ void load_vectors(const T* array, long long i, long long step, const Some& some,
                                             Vector<T, Width> (&loaded)[Count]) {
#pragma unroll
    for (int u = 0; u < Count; ++u) {
        if (some.any(u)) loaded[u] = Vector<T, Width>::load(array + i + u * step);
    }
}

//   Lowers   whether values of some of the channels, those of the bits of `lowered`, are lowered
template <typename T, int Width, int Channels, bool Lowers = false>
struct Statistics {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = true;
    const T* x;
    MomentsAccumulator<A> values[Channels];
    int count;  // of each channel
    unsigned int lowered;

    __device__ __forceinline__ bool lowers(int channel) const { return Lowers && lowered >> channel & 1u; }

    __device__ __forceinline__ A taken(A value, int channel) const {
        return Lowers ? value * (lowers(channel) ? Lowering<A>::kDown : A(1)) : value;
    }

    __device__ __forceinline__ Moments<A> moments(int channel, A origin) const {
        return values[channel].moments(count, origin, lowers(channel));
    }

    __device__ __forceinline__ void take(T x_i) {
        const A value = taken(to_accumulate(x_i), 0);
        if (count == 0) values[0].shift = value;
        values[0].add(value);
        count += 1;
    }

    template <int Count>
    __device__ __forceinline__ void take(const Vector<T, Width> (&loaded)[Count]) {
        if (count == 0) {
#pragma unroll
            for (int c = 0; c < Channels; ++c) values[c].shift = taken(widened(loaded[0], c), c);
        }
        // One vector after the other, so that the order does not depend on how many come together.
#pragma unroll
        for (int u = 0; u < Count; ++u) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                values[c].add(taken(widened(loaded[u], k), c));
            }
        }
        count += Count * (Width / Channels);
    }

    // Likewise.
    template <int Count>
    __device__ __forceinline__ void take(const Vector<T, Width> (&loaded)[Count], const FirstOfVectors& few) {
        if (few.count == 0) return;
        if (count == 0) {
#pragma unroll
            for (int c = 0; c < Channels; ++c) values[c].shift = taken(widened(loaded[0], c), c);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!few.any(u)) continue;
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                values[c].add(taken(widened(loaded[u], k), c));
            }
        }
        count += few.count * (Width / Channels);
    }

    // Of a thread's values that count the first may be any. Of rows all values of a vector count, or none.
    template <int Count, typename Some>
    __device__ __forceinline__ void take(const Vector<T, Width> (&loaded)[Count], const Some& some) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.any(u)) continue;
            if (count == 0) {
#pragma unroll
                for (int k = Width - 1; k >= 0; --k) {
                    const int c = channel_of<Channels>(k);
                    if (some.has(u, k)) values[c].shift = taken(widened(loaded[u], k), c);
                }
            }
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                if (some.has(u, k)) values[c].add(taken(widened(loaded[u], k), c));
            }
            count += some.counted(u);
        }
    }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (counts) take(x[i]);
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> loaded[Count];
        load_vectors(x, i, step, AllOfVectors{}, loaded);
        take(loaded);
    }
    template <int Count, typename Some>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some) {
        Vector<T, Width> loaded[Count];
        load_vectors(x, i, step, some, loaded);
        take(loaded, some);
    }
};

// The first value that counts of each of a thread's channels; 0 where it has none.
template <typename T, typename Layout, typename Valid>
__device__ __forceinline__ void read_origins(const T* x, const Layout& layout, long long channel,
                                             const Valid& valid, T (&origins)[Layout::kChannels]) {
    const T* const first = x + layout.first(channel, valid);
#pragma unroll
    for (int k = 0; k < Layout::kChannels; ++k)
        origins[k] = layout.has(channel) ? first[k] : from_accumulate<T>(accumulate_t<T>(0));
}

// The moments of each of a thread's channels. Where squares of a channel's values were too large, which is
// rare, values are taken once more, lowered.
//   walk(body)   takes them: calls for_each_in_block, one vector at a time
template <typename T, int Width, int Channels, typename Walk>
__device__ __forceinline__ void finish_moments(const Statistics<T, Width, Channels>& statistics,
                                               const T (&origins)[Channels],
                                               Moments<accumulate_t<T>> (&moments)[Channels], Walk walk) {
    unsigned int beyond = 0;
#pragma unroll
    for (int k = 0; k < Channels; ++k) {
        moments[k] = statistics.moments(k, to_accumulate(origins[k]));
        if (!is_finite(moments[k].var) || !is_finite(moments[k].mean)) beyond |= 1u << k;
    }
    if (beyond == 0) return;
    // The others as before, which takes fewer registers than to keep them.
    Statistics<T, Width, Channels, true> again{statistics.x, {}, 0, beyond};
    walk(again);
#pragma unroll
    for (int k = 0; k < Channels; ++k) moments[k] = again.moments(k, to_accumulate(origins[k]));
}

// z = scale * (x - mean) + shift, in that order: a value that is the mean gives exactly shift.
template <typename A>
struct Normalization {
    A mean, scale, shift;

    // mean, gamma, beta may be null: 0, 1, 0.
    __device__ __forceinline__ void load(const A* mean_c, const A* inv_std_c, const A* gamma_c,
                                         const A* beta_c, long long channel) {
        mean = mean_c ? mean_c[channel] : A(0);
        scale = gamma_c ? gamma_c[channel] * inv_std_c[channel] : inv_std_c[channel];
        shift = beta_c ? beta_c[channel] : A(0);
    }

    __device__ __forceinline__ void set(A mean_of_channel, A inv_std, const A* gamma_c, const A* beta_c,
                                        long long channel) {
        mean = mean_of_channel;
        scale = gamma_c ? gamma_c[channel] * inv_std : inv_std;
        shift = beta_c ? beta_c[channel] : A(0);
    }

    __device__ __forceinline__ A apply(A x) const { return fma(x - mean, scale, shift); }
};

// What is done to the normalised values in the same pass: nothing; ReLU or nothing, which ClippingActivation
// is told; a residual is added, and an activation that is straight on either side of 0 is applied; or any
// other one.
enum Epilogue { kIdentity, kClipping, kPiecewiseLinear, kSmooth };

template <Epilogue Fused>
constexpr bool kAddsResidual = Fused == kPiecewiseLinear || Fused == kSmooth;

// Blocks that must fit on a multiprocessor at once: the numbers of what is fused take registers.
template <Epilogue Fused>
constexpr int kFusedBlocks = Fused == kIdentity ? kChannelBlocks : (Fused == kSmooth ? 2 : 3);
// Likewise of rows, whose many numbers, up to six of each of a thread's channels, take registers: two blocks
// with more vectors in flight.
template <typename Layout, Epilogue Fused, bool HasFewNumbers = Fused == kIdentity>
constexpr int kLayoutBlocks = Layout::kIsNchw ? kFusedBlocks<Fused>
                              : HasFewNumbers ? kChannelBlocks
                                              : 2;
// Vectors in flight, as kReductionLoads: of what is normalised, of the sums of gradients, and of the input's.
template <typename Layout, Epilogue Fused>
constexpr int kNormalizeLoads = Fused == kSmooth                        ? 1
                                : Layout::kIsNchw && Fused != kIdentity ? 2
                                                                        : 4;
template <typename Layout, Epilogue Fused>
constexpr int kSumLoads = Fused == kSmooth                        ? 1
                          : Layout::kIsNchw || Fused == kIdentity ? 2
                                                                  : 3;
template <typename Layout, Epilogue Fused, typename Valid>
constexpr int kInputGradientLoads = Fused == kIdentity                    ? (Layout::kIsNchw ? 2 : 4)
                                    : Layout::kIsNchw || Fused == kSmooth ? 1
                                    : kCountsAll<Valid>                   ? 3
                                                                          : 2;

// f(activation) for the activation of this number, one of those of Fused.
template <typename T, Epilogue Fused, typename Function>
__device__ __forceinline__ void with_fused_activation(int number, Function f) {
    if constexpr (Fused == kSmooth) {
        with_curved_activation<T>(number, f);
    } else if constexpr (Fused == kClipping) {
        f(ClippingActivation<accumulate_t<T>>(number));
    } else {
        f(PiecewiseLinearActivation<accumulate_t<T>>(number));
    }
}

// What is added before the activation: a vector of the residual, or -0, which changes nothing.
template <typename T, int Width>
__device__ __forceinline__ Vector<T, Width> residual_at(const T* residual, long long i) {
    if (residual != nullptr) return Vector<T, Width>::load(residual + i);
    Vector<T, Width> none;
#pragma unroll
    for (int k = 0; k < Width; ++k) none[k] = from_accumulate<T>(accumulate_t<T>(-0.0));
    return none;
}
template <typename T>
__device__ __forceinline__ accumulate_t<T> residual_at(const T* residual, long long i) {
    return residual != nullptr ? to_accumulate(residual[i]) : accumulate_t<T>(-0.0);
}

// y = z, or, unless kIdentity, phi(z + residual).
//   residual, activation   as in batch_norm.cu; not used if kIdentity
template <typename T, int Width, int Channels, Epilogue Fused>
struct Normalize {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = true;
    const T* x;
    const T* residual;
    int activation;
    T* y;
    Normalization<A> norms[Channels];

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (!counts) {
            y[i] = from_accumulate<T>(A(0));
            return;
        }
        A z = norms[0].apply(to_accumulate(x[i]));
        if (Fused != kIdentity) {
            z += residual_at(residual, i);
            with_fused_activation<T, Fused>(activation, [&](auto phi) { z = phi.forward(z); });
        }
        y[i] = from_accumulate<T>(z);
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        Vector<T, Width> values[Count], added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.any(u)) continue;
            values[u] = Vector<T, Width>::load(x + i + u * step);
            if (Fused != kIdentity) added[u] = residual_at<T, Width>(residual, i + u * step);
        }
        if (Fused != kIdentity) {
            with_fused_activation<T, Fused>(activation, [&](auto phi) {
                apply<Count>(values, some,
                             [&](A z, int u, int k) { return phi.forward(z + widened(added[u], k)); });
            });
        } else {
            apply<Count>(values, some, [](A z, int, int) { return z; });
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (some.exists(u)) values[u].store(y + i + u * step);
        }
    }

    template <int Count, typename Some, typename Finish>
    __device__ __forceinline__ void apply(Vector<T, Width> (&values)[Count], const Some& some,
                                          Finish finish) const {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.any(u)) {
                values[u] = filled<T, Width>(from_accumulate<T>(A(0)));
                continue;
            }
            A results[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A z = finish(norms[channel_of<Channels>(k)].apply(widened(values[u], k)), u, k);
                results[k] = some.has(u, k) ? z : A(0);
            }
            values[u] = rounded<T, Width>(results);
        }
    }
};
