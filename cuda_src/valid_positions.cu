// Which positions of a padded batch count, as the bits that SomePositions of channel_layout.cuh reads.
//
// In both kernels:
//   words   [word_count], the bits of 32 positions each; 0 beyond the positions; Word has 32 bits
// Launch: 1-D, kPackingThreads, a warp a word at least.
#include "division64.cuh"

constexpr int kPackingThreads = 256;
constexpr int kPositionsPerWord = 32;

__device__ __forceinline__ long long position_of_thread() {
    return blockIdx.x * static_cast<long long>(kPackingThreads) + threadIdx.x;
}

// Writes the word of the warp's positions. All threads must call it.
template <typename Word>
__device__ __forceinline__ void write_word(Word* words, long long word_count, bool counts) {
    const Word bits = __ballot_sync(0xffffffffu, counts);
    const long long word = position_of_thread() / kPositionsPerWord;
    if (threadIdx.x % kPositionsPerWord == 0 && word < word_count) words[word] = bits;
}

// Those that a mask says.
//   mask   [positions], of zeros and others
template <typename Word>
__global__ void __launch_bounds__(kPackingThreads)
    valid_positions_of_mask(const unsigned char* mask, Word* words, long long positions,
                            long long word_count) {
    const long long position = position_of_thread();
    write_word(words, word_count, position < positions && mask[position] != 0);
}

constexpr int kMostAxes = 3;

//   sizes   of the padded batch, along the last axes; 1 before them
struct PaddedSizes {
    Divisor64 sizes[kMostAxes];
    long long axes;
};
static_assert(sizeof(PaddedSizes) == 80, "the launcher packs it with this size");

// Sizes of few samples, passed by value.
template <int Most>
struct FewLengths {
    unsigned long long values[Most];

    __device__ __forceinline__ long long operator[](long long i) const {
        return static_cast<long long>(values[i]);
    }
};

// Writes those below the lengths of their samples, [samples, axes].
template <typename Word, typename Lengths>
__device__ __forceinline__ void write_words_of_lengths(const Lengths& lengths, Word* words,
                                                       const PaddedSizes& padded, long long positions,
                                                       long long word_count) {
    const long long position = position_of_thread();
    bool counts = position < positions;
    if (counts) {
        unsigned long long place[kMostAxes], sample = static_cast<unsigned long long>(position);
#pragma unroll
        for (int axis = kMostAxes - 1; axis >= 0; --axis) {
            const unsigned long long before = padded.sizes[axis].quotient(sample);
            place[axis] = sample - before * padded.sizes[axis].divisor;
            sample = before;
        }
        const long long own = static_cast<long long>(sample) * padded.axes;
#pragma unroll
        for (int axis = 0; axis < kMostAxes; ++axis) {
            const long long number = axis - (kMostAxes - padded.axes);
            if (number >= 0) counts = counts && static_cast<long long>(place[axis]) < lengths[own + number];
        }
    }
    write_word(words, word_count, counts);
}

template <typename Word>
__global__ void __launch_bounds__(kPackingThreads)
    valid_positions_of_lengths(const long long* lengths, Word* words, PaddedSizes padded, long long positions,
                               long long word_count) {
    write_words_of_lengths(lengths, words, padded, positions, word_count);
}

template <typename Word, int Most>
__global__ void __launch_bounds__(kPackingThreads)
    valid_positions_of_few_lengths(FewLengths<Most> lengths, Word* words, PaddedSizes padded,
                                   long long positions, long long word_count) {
    write_words_of_lengths(lengths, words, padded, positions, word_count);
}
