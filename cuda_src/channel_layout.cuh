// How a block walks over the values of its channel, or channels.
//
// Planes: (batch, channels, plane), the values of a channel are `batch` runs of `plane` neighbours. A block
// has one channel and a part of its chunks: a chunk is a run, or a piece of a long one. Rows: (rows,
// channels), a value of every channel in each row. A block has a tile of channels, a vector of neighbours for
// each thread along x, and a part of the rows.
//
// What is the same of both is written once, for a Layout, which is NchwLayout or NhwcLayout<Width>: a tile is
// a channel there, or `Width` neighbouring channels for each thread along x.
#pragma once

#include "vector_io.cuh"

constexpr int kChannelThreads = 256;
// Blocks that must fit on a multiprocessor at once, which leaves a thread 64 registers.
constexpr int kChannelBlocks = 4;
// Vectors that a thread of the statistics has in flight. A thread that reads several arrays, or writes, needs
// fewer to keep the memory busy, and its registers for the numbers of its channels.
constexpr int kReductionLoads = 4;

// Which positions of a batch count: all of them, ...
struct AllPositions {};
// ... or those whose bit is set, which is bit p & 31 of words[p >> 5] for position p: a place in a sample's
// plane, or a row, counted over the batch. There is a word more than the positions need.
//   first   of these positions
struct SomePositions {
    const unsigned int* words;
    long long first;

    // Bits of Width positions, first of this one.
    template <int Width>
    __device__ __forceinline__ unsigned int from(long long position) const {
        const unsigned int* word = words + (position >> 5);
        const int shift = static_cast<int>(position & 31);
        unsigned int bits = word[0] >> shift;
        if (shift > 32 - Width) bits |= word[1] << (32 - shift);
        return bits & ((1u << Width) - 1u);
    }
    __device__ __forceinline__ bool has(long long position) const {
        return words[position >> 5] >> (position & 31) & 1u;
    }
};

// The channels of a thread and the part of a block: one of those that share a tile.
//   channel   the first of Layout::kChannels neighbours; of rows there may be none, see Layout::has
template <typename Channel>
struct ChannelBlock {
    Channel channel;
    int rank;
};

// In both layouts:
//   kChannels         of a thread
//   tile_count()      blocks of a grid are tile_count() * blocks
//   channel_of(tile)  first of this thread's channels in a tile, and has(channel), whether it exists
//   block(number)     of a grid that takes parts of a channel in turn, or of rows tiles
//   tile_channels()   channels of a tile at most, and place_in_tile(), that of this thread's first
//   gets_results()    whether this thread has what reduce_channels makes of its channels
//   first(channel, valid)   index of the first value that counts of a channel
struct NchwLayout {
    static constexpr bool kIsNchw = true;
    static constexpr int kChannels = 1;
    long long channels;
    long long plane;             // values of a channel in one sample
    long long chunk;             // values of a chunk at most; a multiple of the vector width
    long long chunks_per_plane;  // ceil(plane / chunk)
    long long chunks;            // of a channel: batch * chunks_per_plane
    long long chunks_per_block;  // of a block
    long long blocks;            // blocks of a channel

    __device__ __forceinline__ long long tile_count() const { return channels; }
    __device__ __forceinline__ int channel_of(int tile) const { return tile; }
    __device__ __forceinline__ constexpr bool has(long long) const { return true; }
    __device__ __forceinline__ ChannelBlock<int> block(unsigned int number = blockIdx.x) const {
        const int channel = number / static_cast<int>(blocks);
        return {channel, static_cast<int>(number) - channel * static_cast<int>(blocks)};
    }
    __device__ __forceinline__ constexpr int tile_channels() const { return 1; }
    __device__ __forceinline__ constexpr int place_in_tile() const { return 0; }
    __device__ __forceinline__ bool gets_results() const { return threadIdx.x == 0 && threadIdx.y == 0; }
    __device__ __forceinline__ long long first(long long channel, const AllPositions&) const {
        return channel * plane;
    }
    __device__ __forceinline__ long long first(long long channel, const SomePositions& valid) const {
        const long long sample = valid.first / plane;
        return (sample * channels + channel - sample) * plane + valid.first;
    }
};
static_assert(sizeof(NchwLayout) == 56, "the launcher packs it with this size");

//   Width   channels of a thread: those of a vector
template <int Width>
struct NhwcLayout {
    static constexpr bool kIsNchw = false;
    static constexpr int kChannels = Width;
    long long rows;
    long long channels;
    long long tiles;           // blocks side by side, to cover the channels
    long long rows_per_block;  // of a block
    long long blocks;          // blocks of a tile

    __device__ __forceinline__ long long tile_count() const { return tiles; }
    __device__ __forceinline__ long long channel_of(int tile) const {
        // The vectors of a row can be counted in 32 bits.
        return static_cast<long long>(tile * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) *
               Width;
    }
    __device__ __forceinline__ bool has(long long channel) const { return channel < channels; }
    __device__ __forceinline__ ChannelBlock<long long> block(unsigned int number = blockIdx.x) const {
        const int rank = number / static_cast<int>(tiles);
        return {channel_of(static_cast<int>(number) - rank * static_cast<int>(tiles)), rank};
    }
    __device__ __forceinline__ int tile_channels() const { return static_cast<int>(blockDim.x) * Width; }
    __device__ __forceinline__ int place_in_tile() const { return static_cast<int>(threadIdx.x) * Width; }
    __device__ __forceinline__ bool gets_results() const { return threadIdx.y == 0; }
    __device__ __forceinline__ long long first(long long channel, const AllPositions&) const {
        return channel;
    }
    __device__ __forceinline__ long long first(long long channel, const SomePositions& valid) const {
        return valid.first * channels + channel;
    }
};
static_assert(sizeof(NhwcLayout<1>) == 40, "the launcher packs it with this size");

// Values of a vector, in either layout.
template <typename T, typename Layout>
constexpr int kLayoutWidth = kVectorWidth<T>;
template <typename T, int Width>
constexpr int kLayoutWidth<T, NhwcLayout<Width>> = Width;

// What one thread of `threads` (a power of two) has of `count` things that they take in turn: groups of
// Unroll, and some that are left. All have as many groups: lanes of a warp that disagree go through a loop
// for the most that any of them has.
//   left   Unroll at most
template <int Unroll>
struct Share {
    int left, groups;

    __device__ __forceinline__ Share(int count, int thread, int threads) {
        const int of_all = count >> (__ffs(threads) - 1);
        groups = Unroll > 1 ? of_all / Unroll : 0;
        left = of_all - groups * Unroll + (thread < (count & (threads - 1)) ? 1 : 0);
    }
};

// Which of the values of some vectors count: all of them, ...
//   exists     whether a vector is there at all: results are written for it
//   any, has   whether any of its values counts, and whether value k does
struct AllOfVectors {
    __device__ __forceinline__ constexpr bool exists(int) const { return true; }
    __device__ __forceinline__ constexpr bool any(int) const { return true; }
    __device__ __forceinline__ constexpr bool has(int, int) const { return true; }
};
// ... those of the first vectors, as there are no more, ...
struct FirstOfVectors {
    int count;

    __device__ __forceinline__ bool exists(int u) const { return u < count; }
    __device__ __forceinline__ bool any(int u) const { return u < count; }
    __device__ __forceinline__ bool has(int u, int) const { return u < count; }
};
// ... or value k of vector u if bit k of bits[u] is set.
template <int Count>
struct SomeOfVectors {
    unsigned int bits[Count];

    __device__ __forceinline__ constexpr bool exists(int) const { return true; }
    __device__ __forceinline__ bool any(int u) const { return bits[u] != 0; }
    __device__ __forceinline__ bool has(int u, int k) const { return bits[u] >> k & 1u; }
};

template <typename Valid>
constexpr bool kCountsAll = true;
template <>
constexpr bool kCountsAll<SomePositions> = false;
// Vectors of a thread of the statistics in flight: which of their values count takes the registers of two,
// and so do wide sums.
template <typename T, typename Valid>
constexpr int kStatisticsLoads = kCountsAll<Valid> && sizeof(T) < 8 ? kReductionLoads : kReductionLoads / 2;

// Calls body.vectors<Count>(i, step), or, where not all of the vectors' values count, with which of them do.
//   position   of the first value, and the step between those of two vectors, in a plane
template <int Count, int Width, typename Body>
__device__ __forceinline__ void take_vectors(Body& body, long long i, long long step, const AllPositions&,
                                             long long) {
    body.template vectors<Count>(i, step);
}
template <int Count, int Width, typename Body>
__device__ __forceinline__ void take_vectors(Body& body, long long i, long long step,
                                             const SomePositions& valid, long long position) {
    SomeOfVectors<Count> some;
    unsigned int common = ~0u;
#pragma unroll
    for (int u = 0; u < Count; ++u) common &= some.bits[u] = valid.from<Width>(position + u * step);
    if (common == (1u << Width) - 1u) {
        body.template vectors<Count>(i, step);
    } else {
        body.template vectors<Count>(i, step, some);
    }
}
// The same of rows, of which all values count or none.
template <int Count, typename Body>
__device__ __forceinline__ void take_rows(Body& body, long long i, long long step, const AllPositions&,
                                          long long, int) {
    body.template vectors<Count>(i, step);
}
template <int Count, typename Body>
__device__ __forceinline__ void take_rows(Body& body, long long i, long long step, const SomePositions& valid,
                                          long long row, int rows_apart) {
    SomeOfVectors<Count> some;
    unsigned int common = ~0u;
#pragma unroll
    for (int u = 0; u < Count; ++u) common &= some.bits[u] = valid.has(row + u * rows_apart) ? ~0u : 0u;
    if (common) {
        body.template vectors<Count>(i, step);
    } else {
        body.template vectors<Count>(i, step, some);
    }
}
// Those that are left over by groups of Unroll: at once where all positions count and the body has
// kTakesFew, which is to say that it takes FirstOfVectors; otherwise one by one.
template <typename Body>
__device__ __forceinline__ constexpr auto takes_few(int) -> decltype(Body::kTakesFew) {
    return Body::kTakesFew;
}
template <typename>
__device__ __forceinline__ constexpr bool takes_few(long) {
    return false;
}
template <typename Body>
__device__ __forceinline__ void take_scalar(Body& body, long long i, const AllPositions&, long long) {
    body.scalar(i);
}
template <typename Body>
__device__ __forceinline__ void take_scalar(Body& body, long long i, const SomePositions& valid,
                                            long long position) {
    body.scalar(i, valid.has(position));
}

// Calls body for all values of channel `channel` in the block of rank `rank`: body.vectors<Count>(i, step)
// for Count whole aligned vectors at i, i + step, ..., and body.scalar(i) for the others; i is the index in
// the array. Where only some positions count, body.vectors<Count>(i, step, some) and body.scalar(i, counts),
// also for those that do not.
//   struct Sums {
//       template <int Count> __device__ void vectors(long long i, long long step);  // of x + i + u * step
//       __device__ void scalar(long long i);                                        // of x[i]
//   } sums;
//   for_each_in_block<T, kReductionLoads>(layout, block.channel, block.rank, sums);
//   Whole   planes consist of whole vectors: none is left over for body.scalar
//   valid   AllPositions or SomePositions
//   Launch: threads x, a power of two, walk along a chunk, threads y take chunks in turn.
template <typename T, int Unroll, bool Whole = false, typename Body, typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_block(const NchwLayout& layout, long long channel, long long rank,
                                                  Body& body, const Valid& valid = {}) {
    constexpr int width = kVectorWidth<T>;
    const long long begin = rank * layout.chunks_per_block;
    const long long end = min(begin + layout.chunks_per_block, layout.chunks);
#pragma unroll 1
    for (long long s = begin + threadIdx.y; s < end; s += blockDim.y) {
        const long long sample = layout.chunks_per_plane == 1 ? s : s / layout.chunks_per_plane;
        const long long first = (s - sample * layout.chunks_per_plane) * layout.chunk;
        const long long base = (sample * layout.channels + channel) * layout.plane + first;
        // From an index in the array to its position.
        const long long to_position = sample * layout.plane + first - base;
        const int length = static_cast<int>(min(layout.chunk, layout.plane - first));
        // Planes of an odd size start anywhere: up to the first whole vector, and after the last, one by one.
        const int head = Whole ? 0 : min(length, static_cast<int>(-base & (width - 1)));
        const int vectors = (length - head) / width;
        const int tail = head + vectors * width;
        if constexpr (!Whole) {
#pragma unroll 1
            for (int i = threadIdx.x; i < head; i += blockDim.x)
                take_scalar(body, base + i, valid, base + i + to_position);
        }
        const Share<Unroll> share(vectors, threadIdx.x, blockDim.x);
        long long i = base + head + static_cast<long long>(threadIdx.x) * width;
        const long long step = static_cast<long long>(blockDim.x) * width;
        if constexpr (takes_few<Body>(0) && Unroll > 1 && kCountsAll<Valid>) {
            body.template vectors<Unroll>(i, step, FirstOfVectors{share.left});
            i += share.left * step;
        } else {
#pragma unroll 1
            for (int n = 0; n < share.left; ++n, i += step)
                take_vectors<1, width>(body, i, 0, valid, i + to_position);
        }
#pragma unroll 1
        for (int n = 0; n < share.groups; ++n, i += Unroll * step)
            take_vectors<Unroll, width>(body, i, step, valid, i + to_position);
        if constexpr (!Whole) {
#pragma unroll 1
            for (int i = tail + threadIdx.x; i < length; i += blockDim.x)
                take_scalar(body, base + i, valid, base + i + to_position);
        }
    }
}

// Number of a block that takes the work from the end: what a launch before has read last is still in the
// cache.
__device__ __forceinline__ unsigned int number_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

// Calls body.vectors<Count>(i, step) for this thread's channels in some rows: Count of them at once, at i,
// i + step, ...; i is the index in the array of the first channel. Where only some rows count,
// body.vectors<Count>(i, step, some).
//   channel   first channel of this thread; the caller has checked that it exists
//   valid     AllPositions or SomePositions
//   Launch: threads x are side by side over channels, threads y, a power of two, take rows in turn.
template <int Unroll, int Width, typename Body, typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_rows(const NhwcLayout<Width>& layout, long long channel,
                                                 long long begin, int rows, Body& body,
                                                 const Valid& valid = {}) {
    if (rows <= 0) return;
    const int apart = static_cast<int>(blockDim.y);
    const Share<Unroll> share(rows, threadIdx.y, blockDim.y);
    long long row = begin + threadIdx.y;
    long long i = row * layout.channels + channel;
    const long long step = apart * layout.channels;
    if constexpr (takes_few<Body>(0) && Unroll > 1 && kCountsAll<Valid>) {
        body.template vectors<Unroll>(i, step, FirstOfVectors{share.left});
        i += share.left * step;
    } else {
#pragma unroll 1
        for (int n = 0; n < share.left; ++n, i += step, row += apart)
            take_rows<1>(body, i, 0, valid, row, apart);
    }
#pragma unroll 1
    for (int n = 0; n < share.groups; ++n, i += Unroll * step, row += Unroll * apart)
        take_rows<Unroll>(body, i, step, valid, row, apart);
}

// First row of the block of rank `rank`, and how many it has.
struct BlockRows {
    long long begin;
    int rows;

    template <int Width>
    __device__ __forceinline__ BlockRows(const NhwcLayout<Width>& layout, long long rank)
        : begin(rank * layout.rows_per_block),
          rows(static_cast<int>(min(layout.rows_per_block, layout.rows - begin))) {}
};

// The same in all rows of the block of rank `rank`.
template <typename T, int Unroll, bool = false, int Width, typename Body, typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_block(const NhwcLayout<Width>& layout, long long channel,
                                                  long long rank, Body& body, const Valid& valid = {}) {
    const BlockRows of_block(layout, rank);
    for_each_in_rows<Unroll>(layout, channel, of_block.begin, of_block.rows, body, valid);
}
