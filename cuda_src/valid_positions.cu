// Which positions of a padded batch count, as the bits that SomePositions of channel_layout.cuh reads.
//
// In both kernels:
//   words   [word_count], the bits of 32 positions each; 0 beyond the positions; Word has 32 bits
// Launch: 1-D, any number of threads and blocks that are a thread a word at least.

constexpr int kThreads = 256;
constexpr int kPositionsPerWord = 32;

// Those that a mask says.
//   mask   [positions], of zeros and others
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    valid_positions_of_mask(const unsigned char* mask, Word* words, long long positions,
                            long long word_count) {
    const long long word = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (word >= word_count) return;
    const long long first = word * kPositionsPerWord;
    const int own = static_cast<int>(min(static_cast<long long>(kPositionsPerWord), positions - first));
    Word bits = 0;
    for (int i = 0; i < own; ++i) bits |= static_cast<Word>(mask[first + i] != 0) << i;
    words[word] = bits;
}

constexpr int kMostAxes = 3;

// The positions of a sample.
//   sizes       of the padded batch, along the last axes; 1 before them
//   of_sample   all of a sample
struct PaddedSizes {
    long long of_sample;
    int axes;
    int sizes[kMostAxes];
};
static_assert(sizeof(PaddedSizes) == 24, "the launcher packs it with this size");

// Those below the lengths of their samples.
//   lengths   [samples, axes]
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    valid_positions_of_lengths(const long long* lengths, Word* words, PaddedSizes padded, long long positions,
                               long long word_count) {
    const long long word = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (word >= word_count) return;
    long long position = word * kPositionsPerWord;
    const long long last = min(position + kPositionsPerWord, positions);
    long long sample = position / padded.of_sample, rest = position - sample * padded.of_sample;
    int place[kMostAxes];
#pragma unroll
    for (int axis = kMostAxes - 1; axis >= 0; --axis) {
        const long long next = rest / padded.sizes[axis];
        place[axis] = static_cast<int>(rest - next * padded.sizes[axis]);
        rest = next;
    }
    Word bits = 0;
    for (Word bit = 1; position < last; ++position, bit <<= 1) {
        bool counts = true;
#pragma unroll
        for (int axis = 0; axis < kMostAxes; ++axis) {
            const int own = axis - (kMostAxes - padded.axes);
            if (own >= 0) counts = counts && place[axis] < lengths[sample * padded.axes + own];
        }
        if (counts) bits |= bit;
        // The next one: a step along the last axis, and along the one before where that is at its end.
        bool carries = true;
#pragma unroll
        for (int axis = kMostAxes - 1; axis >= 0; --axis) {
            if (!carries) continue;
            carries = ++place[axis] == padded.sizes[axis];
            if (carries) place[axis] = 0;
        }
        if (carries) ++sample;
    }
    words[word] = bits;
}
