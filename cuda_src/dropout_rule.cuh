// What a dropout decides, and by which random numbers.
//
//   const DropoutStream stream = dropout_stream(seed, offset, rng_state);
//   const unsigned int kept = kept_neighbours<8>(rule, stream, start + i);  // a bit each, of eight elements
//   y = dropped_out(x, rule, [&](int k) { return (kept >> k & 1u) != 0; });
#pragma once

#include "division64.cuh"
#include "philox.cuh"
#include "vector_io.cuh"

// What drops an element, and what becomes of it.
//   last_dropped   the largest 32-bit word that drops, where drops_any is not 0
//   drops_any      0 if no word drops
//   only_scales    not 0 if shift is -0 and dropped is +0
//   scale, shift   a kept value becomes value * scale + shift; a shift of -0 changes no bit
//   dropped        what a dropped value becomes
template <typename A>
struct DropoutRule {
    unsigned int last_dropped;
    unsigned int drops_any;
    unsigned int only_scales;
    A scale, shift, dropped;

    __device__ __forceinline__ bool keeps(unsigned int word) const {
        return word > last_dropped || drops_any == 0;
    }

    // A dropped value is replaced, not multiplied, so that NaN and infinity go too.
    __device__ __forceinline__ A apply(A value, unsigned int word) const {
        return choose(value, keeps(word));
    }

    __device__ __forceinline__ A choose(A value, bool is_kept) const {
        return is_kept ? value * scale + shift : dropped;
    }
};

// Step between the seeds of samples with neighbouring numbers: 2^64 / golden ratio, rounded to odd.
constexpr unsigned long long kSampleStep = 0x9E3779B97F4A7C15ull;

// The words of a call: by its numbers, or, if rng_state is not null, by those in device memory.
//   rng_state   [3] seed, offset, and the seed of sample 0
//   by_sample   whether the seed is to be that of sample 0
__device__ __forceinline__ DropoutStream dropout_stream(unsigned long long seed, unsigned long long offset,
                                                        const unsigned long long* rng_state,
                                                        bool by_sample = false) {
    if (rng_state == nullptr) return DropoutStream{seed, offset};
    return DropoutStream{rng_state[by_sample ? 2 : 0], rng_state[1]};
}

// The words of one sample: those of a call with a seed of its own.
__device__ __forceinline__ DropoutStream sample_stream(const DropoutStream& zero, long long sample_id) {
    return DropoutStream{zero.seed + static_cast<unsigned long long>(sample_id) * kSampleStep, zero.offset};
}

// Applies the rule to a vector.
//   keeps   called with the number of a value in it: whether it is kept
template <typename T, int Width, typename Keeps>
__device__ __forceinline__ Vector<T, Width> dropped_out(const Vector<T, Width>& values,
                                                        const DropoutRule<accumulate_t<T>>& rule,
                                                        Keeps keeps) {
    using A = accumulate_t<T>;
    A results[Width];
    if (rule.only_scales != 0) {
#pragma unroll
        for (int i = 0; i < Width; ++i) results[i] = keeps(i) ? widened(values, i) * rule.scale : A(0);
    } else {
#pragma unroll
        for (int i = 0; i < Width; ++i) results[i] = rule.choose(widened(values, i), keeps(i));
    }
    return rounded<T, Width>(results);
}

// The words of Width neighbours, at Count places.
template <int Width, int Count = 1>
struct NeighbourWords {
    static constexpr int kBlocks = Width < 4 ? 1 : Width / 4;
    unsigned int words[Count][Width];

    // From decision number first[u] on for each u; they are multiples of Width.
    static __device__ __forceinline__ NeighbourWords aligned(const DropoutStream& stream,
                                                             const unsigned long long (&first)[Count]) {
        unsigned long long indices[Count * kBlocks];
        uint4 blocks[Count * kBlocks];
#pragma unroll
        for (int i = 0; i < Count * kBlocks; ++i) {
            // No sum: such blocks differ in the lowest bits alone, and the first rounds' work is shared.
            indices[i] = first[i / kBlocks] >> 2 | static_cast<unsigned long long>(i % kBlocks);
        }
        stream.fill(blocks, indices);
        NeighbourWords result;
#pragma unroll
        for (int i = 0; i < Count * Width; ++i) {
            const int u = i / Width, k = i % Width;
            // Fewer than a block's are where the number tells.
            const int lane = Width < 4 ? static_cast<int>(first[u] & (4 - Width)) + k : k % 4;
            result.words[u][k] = word_of(blocks[u * kBlocks + k / 4], lane);
        }
        return result;
    }

    // From any decisions on.
    static __device__ __forceinline__ NeighbourWords shifted(const DropoutStream& stream,
                                                             const unsigned long long (&first)[Count]) {
        constexpr int each = kBlocks + 1;
        unsigned long long indices[Count * each];
        uint4 blocks[Count * each];
#pragma unroll
        for (int i = 0; i < Count * each; ++i)
            indices[i] = (first[i / each] >> 2) + static_cast<unsigned long long>(i % each);
        stream.fill(blocks, indices);
        NeighbourWords result;
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            unsigned int words[4 * each];
#pragma unroll
            for (int i = 0; i < 4 * each; ++i) words[i] = word_of(blocks[u * each + i / 4], i % 4);
#pragma unroll
            for (int i = 0; i < Width + 2; ++i) words[i] = (first[u] & 1) != 0 ? words[i + 1] : words[i];
#pragma unroll
            for (int i = 0; i < Width; ++i)
                result.words[u][i] = (first[u] & 2) != 0 ? words[i + 2] : words[i];
        }
        return result;
    }

    // From decision start + at[u] on, where at[u] is a multiple of Width: all threads go the same way.
    static __device__ __forceinline__ NeighbourWords of(const DropoutStream& stream, unsigned long long start,
                                                        const long long (&at)[Count]) {
        unsigned long long first[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) first[u] = start + static_cast<unsigned long long>(at[u]);
        return start % Width == 0 ? aligned(stream, first) : shifted(stream, first);
    }
};

// Which of the four decisions of a block keep: bit i for word i.
template <typename A>
__device__ __forceinline__ unsigned int kept_bits(const DropoutRule<A>& rule, uint4 words) {
    return (rule.keeps(words.x) ? 1u : 0u) | (rule.keeps(words.y) ? 2u : 0u) |
           (rule.keeps(words.z) ? 4u : 0u) | (rule.keeps(words.w) ? 8u : 0u);
}

// The decisions over Width neighbours, wherever they begin: bit i is set where element g + i is kept.
template <int Width, typename A>
__device__ __forceinline__ unsigned int kept_neighbours(const DropoutRule<A>& rule,
                                                        const DropoutStream& stream, unsigned long long g) {
    constexpr int blocks = Width < 4 ? 1 : Width / 4;
    constexpr unsigned int all = (1u << Width) - 1;
    if (rule.drops_any == 0) return all;
    const unsigned long long block = g >> 2;
    const int lane = static_cast<int>(g & 3);
    unsigned int kept = 0;
#pragma unroll
    for (int i = 0; i < blocks; ++i) kept |= kept_bits(rule, stream.block(block + i)) << 4 * i;
    // They reach into one block more.
    if (lane + Width > 4 * blocks) kept |= kept_bits(rule, stream.block(block + blocks)) << 4 * blocks;
    return kept >> lane & all;
}

constexpr int kMostDigits = 8;

// Which decision each element has, where they are not simply numbered. An array is rows of neighbours: those
// of a row share one decision, or have consecutive ones. The number of a row has digits, the innermost first,
// and the row's first decision is the sum of the digits times their weights: 0 for axes that share decisions.
//   row         elements of a row; a divisor of 0: all elements are one row, with consecutive decisions
//   sizes, weights, digits   of all digits but the last, whose size nobody needs
//   rest        weight of the last digit
//   is_shared   whether a row is one decision
struct DecisionRows {
    Divisor64 row;
    Divisor64 sizes[kMostDigits];
    unsigned long long weights[kMostDigits];
    unsigned long long rest;
    int digits;
    int is_shared;

    __device__ __forceinline__ unsigned long long first_decision(unsigned long long number) const {
        unsigned long long decision = 0;
#pragma unroll 1
        for (int i = 0; i < digits; ++i) {
            const unsigned long long rest = sizes[i].quotient(number);
            decision += (number - rest * sizes[i].divisor) * weights[i];
            number = rest;
        }
        return decision + number * rest;
    }
};
static_assert(sizeof(DecisionRows) == 296, "the launcher packs it with this size");

// As kept_neighbours, of the Width neighbours from element i on, which may be of several rows.
//   sample_ids   number of each row, whose stream it has then, or null; stream is that of sample 0 then
template <int Width, typename A>
__device__ __forceinline__ unsigned int kept_in_rows(const DropoutRule<A>& rule, const DropoutStream& stream,
                                                     unsigned long long start, const DecisionRows& rows,
                                                     const long long* sample_ids, unsigned long long i) {
    constexpr unsigned int all = (1u << Width) - 1;
    if (rule.drops_any == 0) return all;
    if (rows.row.divisor == 0) return kept_neighbours<Width>(rule, stream, start + i);
    unsigned int kept = 0;
    int done = 0;
#pragma unroll 1
    do {
        const unsigned long long number = rows.row.quotient(i + done);
        const unsigned long long place = i + done - number * rows.row.divisor;
        const unsigned long long g =
            start + rows.first_decision(number) + (rows.is_shared != 0 ? 0ull : place);
        const DropoutStream of_row =
            sample_ids == nullptr ? stream : sample_stream(stream, sample_ids[number]);
        const unsigned int bits = rows.is_shared == 0 ? kept_neighbours<Width>(rule, of_row, g)
                                  : kept_neighbours<1>(rule, of_row, g) ? all
                                                                        : 0u;
        const int count =
            static_cast<int>(min(rows.row.divisor - place, static_cast<unsigned long long>(Width - done)));
        kept |= (bits & ((1u << count) - 1)) << done;
        done += count;
    } while (done < Width);
    return kept;
}

// As NeighbourWords::of, of elements that may be of several rows: words that the rule takes as it does
// theirs. Places from n on, which a thread has beyond the last element, have no row, and any words.
template <int Width, int Count, typename A>
__device__ __forceinline__ NeighbourWords<Width, Count> words_in_rows(
    const DropoutRule<A>& rule, const DropoutStream& stream, unsigned long long start,
    const DecisionRows& rows, const long long* sample_ids, const long long (&at)[Count],
    long long n = 0x7fffffffffffffffll) {
    using Words = NeighbourWords<Width, Count>;
    if (rows.row.divisor == 0) return Words::of(stream, start, at);
    const bool is_shared = rows.is_shared != 0;
    unsigned long long first[Count], place = 0, of_row = 0, last = 0;
    bool are_in_one_row = true;
#pragma unroll
    for (int u = 0; u < Count; ++u) {
        const unsigned long long i = static_cast<unsigned long long>(at[u]);
        const unsigned long long step = u == 0 ? 0 : i - static_cast<unsigned long long>(at[u - 1]);
        if (u != 0 && place + step < rows.row.divisor) {
            place += step;
        } else {
            const unsigned long long number = rows.row.quotient(i);
            place = i - number * rows.row.divisor;
            of_row = start + rows.first_decision(number);
        }
        first[u] = of_row + (is_shared ? 0ull : place);
        last |= first[u];
        are_in_one_row = are_in_one_row && place + Width <= rows.row.divisor;
    }
    if (are_in_one_row && !is_shared && sample_ids == nullptr)
        return last % Width == 0 ? Words::aligned(stream, first) : Words::shifted(stream, first);
    Words result;
#pragma unroll
    for (int u = 0; u < Count; ++u) {
        const unsigned int kept = at[u] < n ? kept_in_rows<Width>(rule, stream, start, rows, sample_ids,
                                                                  static_cast<unsigned long long>(at[u]))
                                            : 0u;
#pragma unroll
        for (int k = 0; k < Width; ++k) result.words[u][k] = kept >> k & 1u ? 0xffffffffu : 0u;
    }
    return result;
}
