// Dropout of arrays (samples, positions, channels) in memory, by numbers that count in the order of (samples,
// channels, positions). A thread has Width neighbouring channels at four neighbouring positions: each Philox
// block serves its four decisions.
#pragma once

#include "dropout_rule.cuh"
#include "elementwise.cuh"

constexpr int kPositions = 4;
// Of a thread's positions those that have so many values together.
template <int Values, int Width>
constexpr int kPositionsOf = Values / Width < kPositions ? Values / Width : kPositions;

//   parts       of threads: samples * groups * vectors
//   positions, channels   of a sample; channels is a multiple of Width
//   vectors     channels / Width
//   groups      ceil(positions / 4)
struct ChannelsLast {
    long long parts, positions, channels;
    Divisor64 vectors, groups;
};
static_assert(sizeof(ChannelsLast) == 72, "the launcher packs it with this size");

// A thread's part, of these numbers. (A loop in a function that takes one would cost registers.)
//   for (long long number = first_of_thread(); number < array.parts; number += step_of_threads()) {
//       LastPart<Width> part(array, number);
//       part.decide(rule, stream, start);
__device__ __forceinline__ long long first_of_thread() {
    return blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x;
}
__device__ __forceinline__ long long step_of_threads() {
    return gridDim.x * static_cast<long long>(kElementwiseThreads);
}

template <int Width>
struct LastPart {
    static constexpr unsigned int kAll = (1ull << kPositions * Width) - 1;

    long long first, apart;       // its first element, and how far apart neighbouring positions are
    int count;                    // of its positions
    unsigned long long channel;   // number of its first one, of all samples'
    unsigned long long decision;  // of its first element
    unsigned long long positions;
    unsigned int kept;  // bit 4 * j + i: whether channel j is kept at position i

    __device__ __forceinline__ LastPart(const ChannelsLast& array, long long number)
        : apart(array.channels), positions(static_cast<unsigned long long>(array.positions)), kept(kAll) {
        const unsigned long long row = array.vectors.quotient(static_cast<unsigned long long>(number));
        const unsigned long long sample = array.groups.quotient(row);
        const long long vector = number - static_cast<long long>(row * array.vectors.divisor);
        const long long position = static_cast<long long>(row - sample * array.groups.divisor) * kPositions;
        first =
            (static_cast<long long>(sample) * array.positions + position) * array.channels + vector * Width;
        count = static_cast<int>(min(array.positions - position, static_cast<long long>(kPositions)));
        channel = sample * static_cast<unsigned long long>(array.channels) +
                  static_cast<unsigned long long>(vector * Width);
        decision = channel * positions + static_cast<unsigned long long>(position);
    }

    // Decides over its elements. Loads come after: Philox blocks need the registers.
    template <typename A>
    __device__ __forceinline__ void decide(const DropoutRule<A>& rule, const DropoutStream& stream,
                                           unsigned long long start) {
        unsigned long long g = start + decision;
        kept = 0;
#pragma unroll 1
        for (int j = 0; j < Width; ++j) {
            kept |= kept_neighbours<kPositions>(rule, stream, g) << kPositions * j;
            g += positions;
        }
    }

    __device__ __forceinline__ bool keeps(int i, int j) const {
        return (kept >> (kPositions * j + i) & 1u) != 0;
    }

    // At some of its positions, from `begin` on.
    template <typename T, int Count>
    __device__ __forceinline__ void load(Vector<T, Width> (&values)[Count], const T* source,
                                         int begin = 0) const {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            if (begin + i < count) values[i] = Vector<T, Width>::load(source + first + (begin + i) * apart);
        }
    }

    template <typename T, int Count>
    __device__ __forceinline__ void store(const Vector<T, Width> (&values)[Count], T* target,
                                          int begin = 0) const {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            if (begin + i < count) values[i].store(target + first + (begin + i) * apart);
        }
    }
};
