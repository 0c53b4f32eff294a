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

// gamma and beta of a channel: 1 and 0 where there are none.
template <typename A>
struct ChannelParameters {
    A gamma, beta;

    static __device__ __forceinline__ ChannelParameters of(const A* gamma_c, const A* beta_c,
                                                           long long channel) {
        return {gamma_c ? gamma_c[channel] : A(1), beta_c ? beta_c[channel] : A(0)};
    }
};

template <typename A>
__device__ __forceinline__ void write_statistics(A* statistics, const ChannelStatistics<A>& of_channel,
                                                 const ChannelParameters<A>& parameters, long long channel,
                                                 long long channels) {
    A* column = statistics + channel;
    column[kMean * channels] = of_channel.mean;
    column[kVar * channels] = of_channel.var;
    column[kInvStd * channels] = of_channel.inv_std;
    column[kGamma * channels] = parameters.gamma;
    column[kBeta * channels] = parameters.beta;
}

// Writes what a block has found of a channel: its numbers, or, if the channel has other blocks, a part of a
// result that these have to merge. A result, see below, has
//   write_part(part, channel, rank, blocks)
//   merged<AtOnce>(channel, blocks)   all of the parts, in lane 0 of a warp, all of whose lanes call it; each
//                                     reads so many at once
//   finished(part, channel)           the numbers of a channel, of what was merged or its only part
//   write(numbers, channel), read(channel)
//   of_channel(channel)               the same for this channel alone, which has already read what the others
//                                     would wait for once they have merged
template <typename Result>
__device__ __forceinline__ void write_result(const Result& result, const typename Result::Part& part,
                                             long long channel, long long rank, long long blocks) {
    if (blocks == 1) {
        result.write(result.finished(part, channel), channel);
    } else {
        result.write_part(part, channel, rank, blocks);
    }
}

// What the lanes of a warp have of a channel's parts, AtOnce of each lane at once.
//   load(rank, exists)      reads part `rank`: the last one where a lane has no more, to count for nothing
//   take(parts, is_first)   takes what was read
template <int AtOnce, typename Load, typename Take>
__device__ __forceinline__ void for_each_group_of_parts(long long blocks, Load load, Take take) {
    const int lane = linear_thread() % kWarpThreads;
#pragma unroll 1
    for (long long first = 0; first < blocks; first += AtOnce * kWarpThreads) {
        decltype(load(first, true)) parts[AtOnce];
#pragma unroll
        for (int u = 0; u < AtOnce; ++u) {
            const long long rank = first + u * kWarpThreads + lane;
            parts[u] = load(min(rank, blocks - 1), rank < blocks);
        }
        take(parts, first == 0);
    }
}

template <typename A>
struct StatisticsResultOfChannel;
template <typename A>
struct GradientResultOfChannel;

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

    template <int AtOnce>
    __device__ __forceinline__ Part merged(long long channel, long long blocks) const {
        const A* const partial = partial_moments + 4 * channel * blocks;
        const A origin = partial[3];
        // Whether parts are merged as if all of them were lowered, and whether one of them was.
        bool lowers = false, some_lowered = false;
        const auto merge = [&] {
            A centre;
            Sums<A, 3> sums = Sums<A, 3>::identity();
            const auto load = [&](long long rank, bool exists) {
                const A* const own = partial + 4 * rank;
                return Moments<A>{exists ? own[0] : A(0), own[1], own[2]};
            };
            for_each_group_of_parts<AtOnce>(blocks, load, [&](Moments<A>(&parts)[AtOnce], bool is_first) {
#pragma unroll
                for (int u = 0; u < AtOnce; ++u) {
                    some_lowered |= parts[u].is_lowered();
                    if (lowers) parts[u] = parts[u].lowered();
                }
                // Of each lane's first part, whatever is on its way with it.
                if (is_first) centre = Centre<A>::of(warp_reduce(parts[0].about_origin())).mean;
#pragma unroll
                for (int u = 0; u < AtOnce; ++u) sums = sums.combine(parts[u].about(centre));
            });
            sums = warp_reduce(sums);
            return Centre<A>::at(centre, sums.of[0]).moments(sums.of[1], sums.of[2], lowers);
        };
        Moments<A> all = merge();
        if (__any_sync(kFullWarp, some_lowered)) {
            lowers = true;
            all = merge();
        }
        return {all, origin};
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

    __device__ __forceinline__ ChannelParameters<A> parameters_of(long long channel) const {
        return ChannelParameters<A>::of(gamma, beta, channel);
    }
    __device__ __forceinline__ void write(const ChannelStatistics<A>& numbers, long long channel) const {
        write(numbers, channel, parameters_of(channel));
    }
    __device__ __forceinline__ void write(const ChannelStatistics<A>& numbers, long long channel,
                                          const ChannelParameters<A>& parameters) const {
        write_statistics(statistics, numbers, parameters, channel, channels);
        running.fold(numbers, channel);
    }
    __device__ __forceinline__ StatisticsResultOfChannel<A> of_channel(long long channel) const {
        return {*this, parameters_of(channel)};
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

template <typename A>
struct StatisticsResultOfChannel : StatisticsResult<A> {
    ChannelParameters<A> parameters;

    __device__ __forceinline__ const ChannelParameters<A>& parameters_of(long long) const {
        return parameters;
    }
    __device__ __forceinline__ void write(const ChannelStatistics<A>& numbers, long long channel) const {
        StatisticsResult<A>::write(numbers, channel, parameters);
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

    using Part = Sums<A, 2>;

    __device__ __forceinline__ void write_part(const Part& sums, long long channel, long long rank,
                                               long long blocks) const {
        A* partial = partial_sums + 2 * (channel * blocks + rank);
        partial[0] = sums.of[0];
        partial[1] = sums.of[1];
    }

    template <int AtOnce>
    __device__ __forceinline__ Part merged(long long channel, long long blocks) const {
        const A* const partial = partial_sums + 2 * channel * blocks;
        const auto load = [&](long long rank, bool exists) {
            const Part own{{partial[2 * rank], partial[2 * rank + 1]}};
            return exists ? own : Part::identity();
        };
        Part sums = Part::identity();
        for_each_group_of_parts<AtOnce>(blocks, load, [&](const Part(&parts)[AtOnce], bool) {
#pragma unroll
            for (int u = 0; u < AtOnce; ++u) sums = sums.combine(parts[u]);
        });
        return warp_reduce(sums);
    }

    __device__ __forceinline__ A inv_std_of(long long channel) const { return inv_std[channel]; }

    __device__ __forceinline__ ChannelGradients<A> finished(const Part& sums, long long channel) const {
        return {sums.of[1] * inv_std[channel], sums.of[0]};
    }

    __device__ __forceinline__ void write(const ChannelGradients<A>& gradients, long long channel) const {
        dgamma[channel] = gradients.dgamma;
        dbeta[channel] = gradients.dbeta;
    }

    __device__ __forceinline__ ChannelGradients<A> read(long long channel) const {
        return {dgamma[channel], dbeta[channel]};
    }
    __device__ __forceinline__ GradientResultOfChannel<A> of_channel(long long channel) const {
        return {*this, inv_std[channel]};
    }
};

template <typename A>
struct GradientResultOfChannel : GradientResult<A> {
    A inv_std_of_channel;

    __device__ __forceinline__ A inv_std_of(long long) const { return inv_std_of_channel; }

    __device__ __forceinline__ ChannelGradients<A> finished(const Sums<A, 2>& sums, long long) const {
        return {sums.of[1] * inv_std_of_channel, sums.of[0]};
    }
};

// The numbers of each channel, from its parts: a warp a channel, blockDim.x a multiple of 32.
template <template <typename> class Result, typename A>
__device__ __forceinline__ void merge_parts(const Result<A>& result, long long channels, long long blocks) {
    // As many parts of a lane as its registers hold: nothing else is done.
    constexpr int kAtOnce = 80 / sizeof(A);
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    const auto own = result.of_channel(channel);
    const auto merged = own.template merged<kAtOnce>(channel, blocks);
    if (threadIdx.x % kWarpThreads == 0) own.write(own.finished(merged, channel), channel);
}

// Threads side by side over the channels of rows at most.
template <int Width>
constexpr int kRowThreads = Width == 1 ? 32 : 8;
// Channels of a tile at most.
template <typename Layout>
constexpr int kTileChannels = 1;
template <int Width>
constexpr int kTileChannels<NhwcLayout<Width>> = kRowThreads<Width> * Width;

// Values that reduce_channels needs room for: of each warp.
constexpr int kChannelWarps = kChannelThreads / kWarpThreads;
template <typename Layout>
constexpr int kReductionScratch = kChannelWarps * kTileChannels<Layout>;

// Threads side by side, and channels of each.
__device__ __forceinline__ int columns_of(const NchwLayout&) { return 1; }
template <int Width>
__device__ __forceinline__ int columns_of(const NhwcLayout<Width>&) {
    return static_cast<int>(blockDim.x);
}

// Two lanes share what both have of the first 2 * Kept values: each keeps one half, combined with the
// other's, and is told which value its first one was.
//   mask   of the bit in which the numbers of the two differ; set: the second half
template <int Kept, int Count, typename Value>
__device__ __forceinline__ int keep_half(Value (&values)[Count], int mask) {
    const bool second = linear_thread() & mask;
#pragma unroll
    for (int k = 0; k < Kept; ++k) {
        const Value kept = second ? values[k + Kept] : values[k];
        const Value given = second ? values[k] : values[k + Kept];
        values[k] = kept.combine(given.shuffled_xor(mask));
    }
    return second ? Kept : 0;
}

// What the threads of each warp have of the same channels, combined: number k * columns + x of a warp is that
// of the k-th channel of the threads x.
//   scratch   see reduce_channels
template <int Channels, typename Layout, typename Value, int Size>
__device__ __forceinline__ void combine_in_warps(const Layout& layout, const Value (&values)[Channels],
                                                 Value (&scratch)[Size]) {
    static_assert(Size == kReductionScratch<Layout>, "room for all warps");
    // Rows are at most 8 vectors of several channels wide: numbers of lanes have two bits above.
    constexpr int kHalvings = Channels >= 4 ? 2 : Channels / 2, kKept = Channels >> kHalvings;
    const int thread = linear_thread(), lane = thread % kWarpThreads, columns = columns_of(layout);
    Value own[Channels];
#pragma unroll
    for (int k = 0; k < Channels; ++k) own[k] = values[k];
    int first = 0, mask = kWarpThreads / 2 >> kHalvings;
    if constexpr (kHalvings > 0) first += keep_half<Channels / 2>(own, kWarpThreads / 2);
    if constexpr (kHalvings > 1) first += keep_half<Channels / 4>(own, kWarpThreads / 4);
    const int same = 2 * mask;  // lanes that have the same channels, or others beside them
#pragma unroll 1
    for (; mask >= columns; mask /= 2) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) own[k] = own[k].combine(own[k].shuffled_xor(mask));
    }
    if (lane % same >= columns) return;
    Value* const of_warp = scratch + (thread / kWarpThreads * Channels + first) * columns + lane % columns;
#pragma unroll
    for (int k = 0; k < kKept; ++k) of_warp[k * columns] = own[k];
}

// The total of what all warps have: number `number` of each.
template <int Channels, typename Layout, typename Value, int Size>
__device__ __forceinline__ Value total_of_warps(const Layout& layout, const Value (&scratch)[Size],
                                                int number) {
    const int step = Channels * columns_of(layout);
    Value parts[kChannelWarps];
#pragma unroll
    for (int warp = 0; warp < kChannelWarps; ++warp) parts[warp] = scratch[warp * step + number];
#pragma unroll
    for (int count = kChannelWarps / 2; count > 0; count /= 2) {
#pragma unroll
        for (int warp = 0; warp < count; ++warp) parts[warp] = parts[warp].combine(parts[warp + count]);
    }
    return parts[0];
}

// Combines what the threads of a block have of the same channels: take(k, value) is called by one thread for
// each, which has the channel as its k-th.
//   scratch   [kReductionScratch<Layout>] in shared memory
//   __shared__ Sums<A, 2> scratch[kReductionScratch<Layout>];
//   reduce_channels(layout, sums, scratch, [&](int k, const Sums<A, 2>& all) { write(channel + k, all); });
// All threads of the block must call it; of rows, blockDim.x is a power of two.
template <int Channels, typename Layout, typename Value, int Size, typename Take>
__device__ __forceinline__ void reduce_channels(const Layout& layout, const Value (&values)[Channels],
                                                Value (&scratch)[Size], Take take) {
    combine_in_warps(layout, values, scratch);
    __syncthreads();
    const int thread = linear_thread(), columns = columns_of(layout);
    if (thread < Channels * columns)
        take(thread / columns, total_of_warps<Channels>(layout, scratch, thread));
}

// 1 / sqrt(variance + eps), rounded once.
template <typename A>
__device__ __forceinline__ A inverse_deviation(A variance, double eps) {
    return static_cast<A>(1.0 / sqrt(static_cast<double>(variance) + eps));
}

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

// The first value that counts of each of a thread's channels; 0 where it has none. That of planes is read at
// once, so that it is there when it is needed. Those of rows would keep registers: they are read when they
// are.
//   const Origins<T, Layout, Valid> origins(x, layout, channel, valid);
template <typename T, typename Layout, typename Valid>
struct Origins {
    using Values = Vector<T, Layout::kChannels>;
    const T* x;
    const Layout& layout;
    long long channel;
    const Valid& valid;
    Values early;

    __device__ __forceinline__ Origins(const T* array, const Layout& its_layout, long long first_channel,
                                       const Valid& its_valid)
        : x(array), layout(its_layout), channel(first_channel), valid(its_valid) {
        if constexpr (Layout::kIsNchw) early = read();
    }

    __device__ __forceinline__ Values read() const {
        if (!layout.has(channel)) return filled<T, Layout::kChannels>(from_accumulate<T>(accumulate_t<T>(0)));
        return Values::load(x + layout.first(channel, valid));
    }
    __device__ __forceinline__ Values all() const { return Layout::kIsNchw ? early : read(); }
    // Of the k-th channel, which exists.
    __device__ __forceinline__ accumulate_t<T> of(int k) const {
        return to_accumulate(Layout::kIsNchw ? early[0] : x[layout.first(channel + k, valid)]);
    }
};

// Shared memory of reduce_moments. Of planes the sums of the second step have their own, which saves a
// barrier.
template <typename A, typename Layout>
struct MomentsScratch {
    static constexpr int kSteps = Layout::kIsNchw ? 2 : 1;
    Sums<A, 2> sums[kSteps][kReductionScratch<Layout>];
    A centres[kTileChannels<Layout>];
};

// Merges what the threads of a block have found of the same channels, as reduce_channels, but for channels
// that do not exist: take(k, part), a part of a StatisticsResult. Where squares of a channel's values may be
// too large, which is rare, they are taken once more, lowered.
//   own          changed then
//   walk(body)   takes a thread's values: calls for_each_in_block, one vector at a time, if it has channels
//   __shared__ MomentsScratch<A, Layout> scratch;
//   reduce_moments(layout, own, origins, scratch, walk, [&](int k, const auto& part) { ... });
template <typename T, int Width, int Channels, typename Layout, typename Valid, typename Walk, typename Take>
__device__ __forceinline__ void reduce_moments(const Layout& layout, Statistics<T, Width, Channels>& own,
                                               const Origins<T, Layout, Valid>& origins,
                                               MomentsScratch<accumulate_t<T>, Layout>& scratch, Walk walk,
                                               Take take) {
    using A = accumulate_t<T>;
    constexpr int kLastStep = MomentsScratch<A, Layout>::kSteps - 1;
    const int thread = linear_thread(), columns = columns_of(layout), column = thread % columns;
    // Of the thread's channels, as bits: those that are lowered, and those that should be.
    unsigned int lowered = 0, beyond = 0;
    Sums<A, 2> sums[Channels];
    const auto sum_about_origins = [&] {
        const Vector<T, Channels> of_channels = origins.all();
#pragma unroll
        for (int k = 0; k < Channels; ++k) {
            const A origin = widened(of_channels, k);
            own.values[k].shift -= lowered >> k & 1u ? origin * Lowering<A>::kDown : origin;
            sums[k] = own.values[k].about_origin(own.count);
            if (own.values[k].is_beyond(sums[k])) beyond |= 1u << k;
        }
        combine_in_warps(layout, sums, scratch.sums[0]);
    };
    sum_about_origins();
    if (__syncthreads_or(beyond != 0)) {
        // A channel is lowered by all threads that have it.
#pragma unroll 1
        for (int number = 0; number < Channels * columns; ++number) {
            const unsigned int bit = number % columns == column ? 1u << number / columns : 0u;
            if (__syncthreads_or((beyond & bit) != 0)) lowered |= bit;
        }
        Statistics<T, Width, Channels, true> again{own.x, {}, 0, lowered};
        walk(again);
#pragma unroll
        for (int k = 0; k < Channels; ++k) own.values[k] = again.values[k];
        sum_about_origins();
        __syncthreads();
    }
    // Of the channel of this thread's number, which it has as its k-th; of planes of the only one.
    Centre<A> centre;
    if (Layout::kIsNchw || thread < Channels * columns)
        centre =
            Centre<A>::of(total_of_warps<Channels>(layout, scratch.sums[0], Layout::kIsNchw ? 0 : thread));
    if constexpr (!Layout::kIsNchw) {
        if (thread < Channels * columns) scratch.centres[thread] = centre.mean;
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < Channels; ++k)
        sums[k] = own.values[k].about(own.count,
                                      Layout::kIsNchw ? centre.mean : scratch.centres[k * columns + column]);
    reduce_channels(layout, sums, scratch.sums[kLastStep], [&](int k, const Sums<A, 2>& all) {
        if (!layout.has(origins.channel)) return;
        const bool is_lowered = (lowered >> k & 1u) != 0;
        take(k, typename StatisticsResult<A>::Part{centre.moments(all.of[0], all.of[1], is_lowered),
                                                   origins.of(k)});
    });
}

// z = scale * (x - mean) + shift, in that order: a value that is the mean gives exactly shift.
template <typename A>
struct Normalization {
    A mean, scale, shift;

    // mean, gamma, beta may be null: 0, 1, 0.
    __device__ __forceinline__ void load(const A* mean_c, const A* inv_std_c, const A* gamma_c,
                                         const A* beta_c, long long channel) {
        set(mean_c ? mean_c[channel] : A(0), inv_std_c[channel], gamma_c, beta_c, channel);
    }

    __device__ __forceinline__ void set(A mean_of_channel, A inv_std, const A* gamma_c, const A* beta_c,
                                        long long channel) {
        mean = mean_of_channel;
        scale = gamma_c ? gamma_c[channel] * inv_std : inv_std;
        shift = beta_c ? beta_c[channel] : A(0);
    }

    __device__ __forceinline__ void set(A mean_of_channel, A inv_std,
                                        const ChannelParameters<A>& parameters) {
        mean = mean_of_channel;
        scale = parameters.gamma * inv_std;
        shift = parameters.beta;
    }

    __device__ __forceinline__ A apply(A x) const { return fma(x - mean, scale, shift); }
};

// The numbers of neighbouring channels, from an array that is aligned to 16 bytes; if it is null,
// `otherwise`. One at a time would take long, for the few values of a tile.
template <int Count, typename A>
__device__ __forceinline__ void load_neighbours(const A* array, int first, A otherwise, A (&numbers)[Count]) {
    constexpr int kAtOnce = Count < kVectorWidth<A> ? Count : kVectorWidth<A>;
#pragma unroll
    for (int i = 0; i < Count; i += kAtOnce) {
        auto some = filled<A, kAtOnce>(otherwise);
        if (array != nullptr) some = Vector<A, kAtOnce>::load(array + first + i);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) numbers[i + k] = some[k];
    }
}

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
