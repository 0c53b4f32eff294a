// Dropout, forward and backward: both apply the same mask, which is regenerated, never stored.
//
// In every kernel:
//   x, y     [n] T, 16-byte aligned; y may be x
//   rule     what drops an element, and what becomes of it
//   seed, offset   Philox key and call number;
//   rng_state     [3] in device memory instead of them, or null (see dropout_stream)
//   start    number of the first decision in the whole (sharded) array
// The mask depends on (seed, offset, number of the decision) alone: any launch gives the same bits.
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
#include "channels_last.cuh"
#include "division64.cuh"
#include "dropout_rule.cuh"
#include "elementwise.cuh"
#include "reduce.cuh"

// Vectors of a thread in a turn of dropout_apply_grouped, and elements of its span at most.
constexpr int kRunUnroll = 2, kRunSpan = 1024;
// And in dropout_apply_repeated, at most.
constexpr int kRepeats = 8;

// The rule for element number g, by itself.
template <typename A>
__device__ __forceinline__ A drop_element(A value, const DropoutRule<A>& rule, const DropoutStream& stream,
                                          unsigned long long g) {
    return rule.apply(value, word_of(stream.block(g >> 2), static_cast<int>(g & 3)));
}

// Decides over every element by itself.
//   words_of   the words of a thread's vectors, from the stream and the numbers of their first decisions
template <typename T, typename WordsOf>
__device__ __forceinline__ void apply_to_elements(const T* x, T* y, long long n,
                                                  const DropoutRule<accumulate_t<T>>& rule,
                                                  const DropoutStream& stream, unsigned long long start,
                                                  WordsOf words_of) {
    map_vectors(
        x, y, n,
        [&](Vector<T>(&values)[kElementwiseUnroll], const auto& part) {
            unsigned long long first[kElementwiseUnroll];
#pragma unroll
            for (int u = 0; u < kElementwiseUnroll; ++u)
                first[u] = start + static_cast<unsigned long long>(part.first + part.at(u));
            const auto drawn = words_of(stream, first);
#pragma unroll
            for (int u = 0; u < kElementwiseUnroll; ++u)
                values[u] =
                    dropped_out(values[u], rule, [&](int k) { return rule.keeps(drawn.words[u][k]); });
        },
        [&](accumulate_t<T> value, long long i) {
            return drop_element(value, rule, stream, start + static_cast<unsigned long long>(i));
        });
}

// start is a multiple of 4, of half types of 8.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                  unsigned long long offset, const unsigned long long* rng_state, unsigned long long start) {
    apply_to_elements(x, y, n, rule, dropout_stream(seed, offset, rng_state), start,
                      [](const DropoutStream& stream, const auto& first) {
                          return NeighbourWords<kVectorWidth<T>, kElementwiseUnroll>::aligned(stream, first);
                      });
}

// As dropout_apply, where start is any number.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply_shifted(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule,
                          unsigned long long seed, unsigned long long offset,
                          const unsigned long long* rng_state, unsigned long long start) {
    apply_to_elements(x, y, n, rule, dropout_stream(seed, offset, rng_state), start,
                      [](const DropoutStream& stream, const auto& first) {
                          return NeighbourWords<kVectorWidth<T>, kElementwiseUnroll>::shifted(stream, first);
                      });
}

// Copies the numbers of rows, if they are kept for a backward.
__device__ __forceinline__ void keep_ids(const long long* sample_ids, long long* kept_ids, long long rows) {
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long r = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x; r < rows;
         r += step)
        kept_ids[r] = sample_ids[r];
}

// As dropout_apply, with a mask of its own for each sample: a thread owns the four decisions of one Philox
// block of one row.
//   x, y         any alignment
//   sample_ids   [n / features] number of each row
//   kept_ids     [kept] copies of them; kept is 0 where none are wanted
//   features     elements of a row; start is the number of its first
//   row          Philox blocks of a row
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply_blocks(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule,
                         unsigned long long seed, unsigned long long offset,
                         const unsigned long long* rng_state, unsigned long long start,
                         const long long* sample_ids, long long* kept_ids, long long kept, long long features,
                         Divisor64 row) {
    keep_ids(sample_ids, kept_ids, kept);
    const DropoutStream stream = dropout_stream(seed, offset, rng_state, true);
    const int skipped = static_cast<int>(start & 3);  // decisions of the first block before the shard
    const long long blocks = n / features * static_cast<long long>(row.divisor);
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long b = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x; b < blocks;
         b += step) {
        const long long r = static_cast<long long>(row.quotient(static_cast<unsigned long long>(b)));
        const long long block = b - r * static_cast<long long>(row.divisor), first = r * features;
        const uint4 words =
            sample_stream(stream, sample_ids[r]).block((start >> 2) + static_cast<unsigned long long>(block));
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const long long i = block * 4 + lane - skipped;
            if (i >= 0 && i < features)
                y[first + i] =
                    from_accumulate<T>(rule.apply(to_accumulate(x[first + i]), word_of(words, lane)));
        }
    }
}

// As dropout_apply_blocks, where rows are whole vectors.
//   n            a multiple of the vector's width; start is a multiple of 4, of half types of 8
//   row          elements of a row
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply_samples(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule,
                          unsigned long long seed, unsigned long long offset,
                          const unsigned long long* rng_state, unsigned long long start,
                          const long long* sample_ids, long long* kept_ids, long long kept, Divisor64 row) {
    constexpr int width = kVectorWidth<T>, unroll = kElementwiseUnroll;
    keep_ids(sample_ids, kept_ids, kept);
    const DropoutStream stream = dropout_stream(seed, offset, rng_state, true);
    for_each_tile<unroll, width>(n, [&](const TilePart<unroll, width>& part) {
        Vector<T> values[unroll];
        part.load(values, x);
        unsigned long long first[unroll], place = 0;
        long long ids[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            if (!part.has(u)) {
                // As the one before, which it costs nothing more to draw for.
                first[u] = u == 0 ? 0 : first[u - 1];
                ids[u] = u == 0 ? 0 : ids[u - 1];
                continue;
            }
            constexpr unsigned long long step = kElementwiseThreads * width;
            if (u != 0 && place + step < row.divisor) {
                place += step;
                ids[u] = ids[u - 1];
            } else {
                const unsigned long long i = static_cast<unsigned long long>(part.first + part.at(u));
                const unsigned long long number = row.quotient(i);
                place = i - number * row.divisor;
                ids[u] = sample_ids[number];
            }
            first[u] = start + place;
        }
        bool are_of_one = true;
#pragma unroll
        for (int u = 1; u < unroll; ++u) are_of_one = are_of_one && ids[u] == ids[0];
        const auto drop = [&](int u, const unsigned int (&words)[width]) {
            values[u] = dropped_out(values[u], rule, [&](int k) { return rule.keeps(words[k]); });
        };
        if (are_of_one) {
            const auto drawn = NeighbourWords<width, unroll>::aligned(sample_stream(stream, ids[0]), first);
#pragma unroll
            for (int u = 0; u < unroll; ++u) drop(u, drawn.words[u]);
        } else {
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                drop(u, NeighbourWords<width>::aligned(sample_stream(stream, ids[u]), {first[u]}).words[0]);
        }
        part.store(values, y);
    });
}

// Decides over runs of neighbouring elements: channels, or whole samples. What is dropped is not even read. A
// warp has a span of neighbouring vectors, whose decisions its lanes draw together, four each.
//   run     elements of a run, at least 16: a span's are fewer than the warp draws; start counts runs
//   turns   in which a warp takes its span, which is kRunSpan at most
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    dropout_apply_grouped(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule,
                          unsigned long long seed, unsigned long long offset,
                          const unsigned long long* rng_state, unsigned long long start, Divisor64 run,
                          int turns) {
    constexpr int width = kVectorWidth<T>, unroll = kRunUnroll, together = kWarpThreads * unroll * width;
    constexpr unsigned int all = (1u << width) - 1;
    static_assert(kRunSpan / 16 + 2 <= 4 * (kWarpThreads - 1), "one warp draws all decisions of a span");
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const long long whole = n / width * width;
    const unsigned int lane = threadIdx.x % kWarpThreads;
    const int span = turns * together;
    const long long tile = kElementwiseThreads / kWarpThreads * static_cast<long long>(span);
    for (long long first = blockIdx.x * tile + static_cast<int>(threadIdx.x / kWarpThreads) * span;
         first < whole; first += gridDim.x * tile) {
        const unsigned long long runs_before = run.quotient(static_cast<unsigned long long>(first));
        const unsigned long long begun = static_cast<unsigned long long>(first) - runs_before * run.divisor;
        const unsigned long long decision = start + runs_before;
        // Bit k: the decision over run number k of the lane's block and the next one.
        unsigned int drawn = kept_bits(rule, stream.block((decision >> 2) + lane));
        drawn |= __shfl_down_sync(kFullWarp, drawn, 1) << 4;
        const unsigned int number_of_first = static_cast<unsigned int>(decision & 3);
        const bool keeps_first = (__shfl_sync(kFullWarp, drawn, 0) >> number_of_first & 1u) != 0;
        const int left = static_cast<int>(min(whole - first, static_cast<long long>(span)));
        const bool is_of_one_run = begun + static_cast<unsigned long long>(left) <= run.divisor;
#pragma unroll 1
        for (int turn = 0; turn < left; turn += together) {
            Vector<T> values[unroll];
            unsigned int kept[unroll];
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                const int at = turn + (u * kWarpThreads + static_cast<int>(lane)) * width;
                kept[u] = keeps_first ? all : 0u;
                if (!is_of_one_run) {
                    const unsigned long long place = begun + static_cast<unsigned long long>(at);
                    // A long run ends at most once in a span.
                    const unsigned long long ended =
                        run.divisor >= kRunSpan ? (place >= run.divisor ? 1ull : 0ull) : run.quotient(place);
                    const unsigned int number = number_of_first + static_cast<unsigned int>(ended);
                    const unsigned int decisions =
                        __shfl_sync(kFullWarp, drawn, static_cast<int>(number >> 2)) >> (number & 3);
                    // The vector may reach into one run more.
                    const unsigned long long rest = (ended + 1) * run.divisor - place;
                    const unsigned int of_first = rest < width ? (1u << static_cast<int>(rest)) - 1 : all;
                    kept[u] = (decisions & 1u ? of_first : 0u) | (decisions & 2u ? all - of_first : 0u);
                }
                if (at < left && kept[u] != 0) values[u] = Vector<T>::load(x + first + at);
            }
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                const int at = turn + (u * kWarpThreads + static_cast<int>(lane)) * width;
                if (at >= left) break;
                const bool is_first_kept = (kept[u] & 1u) != 0;
                if (kept[u] == 0 || kept[u] == all) {
                    values[u] = dropped_out(values[u], rule, [&](int) { return is_first_kept; });
                } else {
                    values[u] = dropped_out(values[u], rule, [&](int k) { return (kept[u] >> k & 1u) != 0; });
                }
                values[u].store(y + first + at);
            }
        }
    }
    const long long rest = whole + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) {
        const unsigned long long g = start + run.quotient(static_cast<unsigned long long>(rest));
        y[rest] = from_accumulate<T>(drop_element(to_accumulate(x[rest]), rule, stream, g));
    }
}

// Decides over an array whose channels lie side by side: over elements, or over whole channels of a sample.
//   residual     as x, or null: added to what the rule makes, before that is rounded; y may be it
//   by_channel   whether the positions of a channel share a decision
// Of float and double the compiler is told to stay within 64 registers, which of half types it does untold
// (0).
template <typename T, int Width>
__global__ void __launch_bounds__(kElementwiseThreads, sizeof(T) < 4 ? 0 : 4)
    dropout_apply_last(const T* x, T* y, ChannelsLast array, DropoutRule<accumulate_t<T>> rule,
                       unsigned long long seed, unsigned long long offset,
                       const unsigned long long* rng_state, unsigned long long start, const T* residual,
                       int by_channel) {
    using A = accumulate_t<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    for (long long number = first_of_thread(); number < array.parts; number += step_of_threads()) {
        LastPart<Width> part(array, number);
        if (by_channel) {
            const unsigned int decisions = kept_neighbours<Width>(rule, stream, start + part.channel);
#pragma unroll
            for (int j = 0; j < Width; ++j) {
                if ((decisions >> j & 1u) == 0) part.kept &= ~(0xfu << kPositions * j);
            }
        } else {
            part.decide(rule, stream, start);
        }
        Vector<T, Width> values[kPositions];
        part.load(values, x);
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
            if (i >= part.count) break;
            Vector<T, Width> others;
            if (residual != nullptr) others = Vector<T, Width>::load(residual + part.first + i * part.apart);
#pragma unroll
            for (int j = 0; j < Width; ++j) {
                A value = rule.choose(to_accumulate(values[i][j]), part.keeps(i, j));
                if (residual != nullptr) value += to_accumulate(others[j]);
                values[i][j] = from_accumulate<T>(value);
            }
            values[i].store(y + part.first + i * part.apart);
        }
    }
}

// Decides over rows that have the decisions of the rows after them: locked dropout. A thread has one vector
// of some of these, and draws its words once.
//   parts     of threads: the vectors of a row, of each group
//   rows      see DecisionRows; the innermost digit weighs 0
//   repeats   rows with the same decisions, one after the other: the digit's size
//   vectors   of a row, which are whole
//   groups    of kRepeats rows, of those that share decisions
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, 3)
    dropout_apply_repeated(const T* x, T* y, long long parts, DropoutRule<accumulate_t<T>> rule,
                           unsigned long long seed, unsigned long long offset,
                           const unsigned long long* rng_state, unsigned long long start, DecisionRows rows,
                           long long repeats, Divisor64 vectors, Divisor64 groups) {
    constexpr int width = kVectorWidth<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const long long row = static_cast<long long>(vectors.divisor) * width;
    for (long long number = first_of_thread(); number < parts; number += step_of_threads()) {
        const unsigned long long group = vectors.quotient(static_cast<unsigned long long>(number));
        const unsigned long long outer = groups.quotient(group);
        const long long at = (number - static_cast<long long>(group * vectors.divisor)) * width;
        const long long done = static_cast<long long>(group - outer * groups.divisor) * kRepeats;
        const long long first = static_cast<long long>(outer) * repeats + done;
        const int count = static_cast<int>(min(repeats - done, static_cast<long long>(kRepeats)));
        Vector<T> values[kRepeats];
#pragma unroll
        for (int i = 0; i < kRepeats; ++i) {
            if (i < count) values[i] = Vector<T>::load(x + (first + i) * row + at);
        }
        const long long decision =
            static_cast<long long>(rows.first_decision(static_cast<unsigned long long>(first))) + at;
        const auto drawn = NeighbourWords<width>::of(stream, start, {decision});
#pragma unroll
        for (int i = 0; i < kRepeats; ++i) {
            if (i < count)
                dropped_out(values[i], rule, [&](int k) {
                    return rule.keeps(drawn.words[0][k]);
                }).store(y + (first + i) * row + at);
        }
    }
}

// Decides over elements that share decisions along any axes.
//   rows   see DecisionRows
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    dropout_apply_shared(const T* x, T* y, long long n, DropoutRule<accumulate_t<T>> rule,
                         unsigned long long seed, unsigned long long offset,
                         const unsigned long long* rng_state, unsigned long long start, DecisionRows rows) {
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    constexpr int width = kVectorWidth<T>;
    map_vectors(
        x, y, n,
        [&](Vector<T>(&values)[kElementwiseUnroll], const auto& part) {
            const auto drawn = part.with_positions([&](const auto& places) {
                return words_in_rows<width>(rule, stream, start, rows, nullptr, places);
            });
#pragma unroll
            for (int u = 0; u < kElementwiseUnroll; ++u)
                values[u] =
                    dropped_out(values[u], rule, [&](int k) { return rule.keeps(drawn.words[u][k]); });
        },
        [&](accumulate_t<T> value, long long i) {
            return rule.choose(value, kept_in_rows<1>(rule, stream, start, rows, nullptr,
                                                      static_cast<unsigned long long>(i)) != 0);
        });
}

// count / total, rounded as a division is (Markstein, 1990), by the rounded inverse of the total.
template <typename A>
__device__ __forceinline__ A quotient_of_counts(int count, int total, A inverse) {
    const A near = A(count) * inverse;
    return fma(fma(-near, A(total), A(count)), inverse, near);
}

// Philox blocks of a thread in dropout_moments, of elements that are one row.
constexpr int kCountedBlocks = 4;

// The calls that keep an element, and the others, as parts of all.
template <typename A>
struct alignas(2 * sizeof(A)) Shares {
    A kept, dropped;

    static __device__ __forceinline__ Shares of(int count, int passes, A inverse) {
        return {quotient_of_counts(count, passes, inverse),
                quotient_of_counts(passes - count, passes, inverse)};
    }
};

// Adds up how many of the calls call + 0 .. count - 1, which differ in the lower word alone, keep each
// element of some Philox blocks, whose numbers do so too: what the first two rounds make of a number is the
// same for all calls, and what they make of a call for all blocks.
//   number   of the first block; the others are Apart apart
//   added    a word that keeps becomes 2^32 or more with it
template <int Apart, int Blocks>
__device__ __forceinline__ void count_kept(unsigned int (&counts)[Blocks][4], const PhiloxKeys& keys,
                                           unsigned long long number, unsigned long long call,
                                           unsigned int count, unsigned long long added) {
    unsigned int w[Blocks];
    uint2 z[Blocks];
#pragma unroll
    for (int u = 0; u < Blocks; ++u) {
        const uint2 x = philox_product(kPhiloxX, static_cast<unsigned int>(number) + u * Apart);
        w[u] = held(x.x);
        z[u] = philox_product(kPhiloxZ, xor3(x.y, static_cast<unsigned int>(call >> 32), keys(0).y));
        z[u] = make_uint2(held(z[u].x), held(z[u].y));
    }
#pragma unroll(Blocks == 1 ? 1 : 2)
    for (unsigned int pass = 0; pass < count; ++pass) {
        const uint2 of_call = philox_product(kPhiloxZ, static_cast<unsigned int>(call) + pass);
        const uint2 x =
            philox_product(kPhiloxX, xor3(of_call.y, static_cast<unsigned int>(number >> 32), keys(0).x));
        uint4 words[Blocks];
#pragma unroll
        for (int u = 0; u < Blocks; ++u)
            words[u] =
                make_uint4(xor3(z[u].y, of_call.x, keys(1).x), z[u].x, xor3(x.y, w[u], keys(1).y), x.x);
        philox4x32<2>(words, keys);
#pragma unroll
        for (int u = 0; u < Blocks; ++u) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const unsigned long long pair =
                    static_cast<unsigned long long>(counts[u][k]) << 32 | word_of(words[u], k);
                counts[u][k] = static_cast<unsigned int>((pair + added) >> 32);
            }
        }
    }
}

// Mean and variance over the calls offset .. offset + passes - 1: an element's output takes two values, so
// that the number of calls that keep it tells both. Where the one that is kept is not finite, the mean is
// that value, and the variance NaN. Threads have spans of a row together: all of a warp one of some Philox
// blocks of each lane; but where rows have masks of their own, and may be short, each one of one block.
//   x, features      as in dropout_apply_blocks
//   sample_ids       number of each row; not used if all is one row
//   row              spans of a row; the first and the last may reach beyond it
//   mean, variance   [n] of what T is computed in
// rule's shift and what dropped elements become are not used.
template <typename T, bool BySample>
__global__ void __launch_bounds__(kElementwiseThreads, BySample ? 4 : 2)
    dropout_moments(const T* x, accumulate_t<T>* mean, accumulate_t<T>* variance, long long n,
                    DropoutRule<accumulate_t<T>> rule, unsigned long long seed, unsigned long long offset,
                    unsigned long long start, int passes, const long long* sample_ids, long long features,
                    Divisor64 row) {
    using A = accumulate_t<T>;
    constexpr int lanes = BySample ? 1 : kWarpThreads, blocks = BySample ? 1 : kCountedBlocks;
    constexpr int apart = 4 * lanes, span = blocks * apart, spans_at_once = kElementwiseThreads / lanes;
    const A inverse = A(1) / A(passes);
    // What numbers of calls make is looked up where these are few; of many, to draw is all that takes time.
    __shared__ Shares<A> table[kElementwiseThreads];
    if (threadIdx.x <= static_cast<unsigned int>(passes))
        table[threadIdx.x] = Shares<A>::of(static_cast<int>(threadIdx.x), passes, inverse);
    __syncthreads();
    const bool are_vectors =
        passes < kElementwiseThreads && (start | static_cast<unsigned long long>(features)) % 4 == 0;
    const auto set_moments = [&](A& mean, A& variance, A value, unsigned int kept, const Shares<A>& shares) {
        value = kept == 0 ? A(0) : value;
        mean = value * shares.kept;
        // A product with 0 is NaN where the value is not finite, and else changes nothing.
        variance = fma(value, A(0), mean * (value * shares.dropped));
    };
    const unsigned long long added = rule.drops_any == 0 ? 1ull << 32 : ~rule.last_dropped;
    const int lane = threadIdx.x % lanes;
    const int skipped = static_cast<int>(start % span);
    PhiloxKeys keys(seed);
    const long long spans = static_cast<long long>(row.divisor) * (BySample ? n / features : 1);
    for (long long s = blockIdx.x * static_cast<long long>(spans_at_once) + threadIdx.x / lanes; s < spans;
         s += static_cast<long long>(gridDim.x) * spans_at_once) {
        long long place = s, first = 0;
        if constexpr (BySample) {
            const long long r = static_cast<long long>(row.quotient(static_cast<unsigned long long>(s)));
            keys = PhiloxKeys(sample_stream(DropoutStream{seed, offset}, sample_ids[r]).seed);
            place = s - r * static_cast<long long>(row.divisor);
            first = r * features;
        }
        const unsigned long long number =
            (start / span + static_cast<unsigned long long>(place)) * (span / 4) + lane;
        unsigned int counts[blocks][4] = {};
#pragma unroll 1
        for (unsigned int pass = 0; pass < static_cast<unsigned int>(passes);) {
            const unsigned long long call = offset + pass;
            // Those with this upper word, but for this one.
            const unsigned int others = min(passes - pass - 1, ~static_cast<unsigned int>(call));
            count_kept<lanes>(counts, keys, number, call, others + 1, added);
            pass += others + 1;
        }
        // Which part of the span is of the row; all places are relative to the lane's.
        const long long begin = place * span - skipped;
        const int before = begin < 0 ? skipped : 0;
        const int size = static_cast<int>(min(features - begin, static_cast<long long>(span))) - before;
        const T* const source = x + (first + begin + lane * 4);
        A* const means = mean + (first + begin + lane * 4);
        A* const variances = variance + (first + begin + lane * 4);
        if (are_vectors && size == span) {
            Vector<T, 4> inputs[blocks];
#pragma unroll
            for (int u = 0; u < blocks; ++u) inputs[u] = Vector<T, 4>::load(source + u * apart);
#pragma unroll
            for (int u = 0; u < blocks; ++u) {
                A scaled[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) scaled[k] = widened(inputs[u], k) * rule.scale;
                // The output, rounded as that of a forward is.
                const Vector<T, 4> outputs = rounded<T, 4>(scaled);
                Vector<A, 4> m, v;
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    set_moments(m[k], v[k], widened(outputs, k), counts[u][k], table[counts[u][k]]);
                m.store(means + u * apart);
                v.store(variances + u * apart);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4 * blocks; ++i) {
                const int at = i / 4 * apart + i % 4;
                if (static_cast<unsigned int>(lane * 4 + at - before) >= static_cast<unsigned int>(size))
                    continue;
                const A value = to_accumulate(from_accumulate<T>(to_accumulate(source[at]) * rule.scale));
                const unsigned int kept = counts[i / 4][i % 4];
                set_moments(means[at], variances[at], value, kept,
                            Shares<A>::of(static_cast<int>(kept), passes, inverse));
            }
        }
    }
}

// Takes the numbers of a generator, and advances it: one call, one offset.
//   rng_state    [3] seed, offset, seed of sample 0
//   next    rng_state again, to be written
//   taken   [3] the numbers as they were
// Launch: one thread.
template <typename T>
__global__ void advance_rng_state(const T* rng_state, T* next, T* taken) {
    for (int i = 0; i < 3; ++i) taken[i] = rng_state[i];
    next[1] = taken[1] + 1;
}
