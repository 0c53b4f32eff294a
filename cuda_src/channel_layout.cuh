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

    // Of Width positions from this one on, a bit each.
    template <int Width>
    __device__ __forceinline__ unsigned int bits_at(long long position) const {
        const unsigned int* const word = words + (position >> 5);
        const unsigned int shift = static_cast<unsigned int>(position) & 31;
        return __funnelshift_r(word[0], word[1], shift) & ((1u << Width) - 1u);
    }
    __device__ __forceinline__ unsigned int word_at(long long position) const { return words[position >> 5]; }
    static __device__ __forceinline__ bool is_set(unsigned int word, long long position) {
        return word >> (position & 31) & 1u;
    }
    __device__ __forceinline__ bool has(long long position) const {
        return is_set(word_at(position), position);
    }
};
// ... or those whose bit is set in what a block keeps of SomePositions, see StorePositions: a byte for each
// vector or single value of a thread, in the order in which for_each_in_block takes them.
//   own     of this thread; kChannelThreads further on is the next one
//   first   as above
struct CachedPositions {
    const unsigned char* own;
    long long first;
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
    __device__ __forceinline__ long long first(long long channel, const AllPositions&) const {
        return channel * plane;
    }
    template <typename Valid>
    __device__ __forceinline__ long long first(long long channel, const Valid& valid) const {
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
    __device__ __forceinline__ long long first(long long channel, const AllPositions&) const {
        return channel;
    }
    template <typename Valid>
    __device__ __forceinline__ long long first(long long channel, const Valid& valid) const {
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
//   mask       which of its values count, as bits
struct AllOfVectors {
    __device__ __forceinline__ constexpr bool exists(int) const { return true; }
    __device__ __forceinline__ constexpr bool any(int) const { return true; }
    __device__ __forceinline__ constexpr bool has(int, int) const { return true; }
    __device__ __forceinline__ constexpr unsigned int mask(int) const { return 0xffu; }
};
// ... those of the first vectors, as there are no more, ...
struct FirstOfVectors {
    int count;

    __device__ __forceinline__ bool exists(int u) const { return u < count; }
    __device__ __forceinline__ bool any(int u) const { return u < count; }
    __device__ __forceinline__ bool has(int u, int) const { return u < count; }
};
// ... value k of vector u, of the first `count` vectors, if bit k of bits[u] is set, ...
//   counted   values of a vector, of each of its channels
template <int Count>
struct SomeOfVectors {
    unsigned int bits[Count];
    int count;

    __device__ __forceinline__ bool exists(int u) const { return u < count; }
    __device__ __forceinline__ bool any(int u) const { return bits[u] != 0; }
    __device__ __forceinline__ bool has(int u, int k) const { return bits[u] >> k & 1u; }
    __device__ __forceinline__ unsigned int mask(int u) const { return bits[u]; }
    __device__ __forceinline__ int counted(int u) const { return __popc(bits[u]); }
};
// ... or, of rows, all of vector u, of the first `count`, if bit u is set.
struct SomeOfRows {
    unsigned int bits;
    int count;

    __device__ __forceinline__ bool exists(int u) const { return u < count; }
    __device__ __forceinline__ bool any(int u) const { return bits >> u & 1u; }
    __device__ __forceinline__ bool has(int u, int) const { return any(u); }
    __device__ __forceinline__ unsigned int mask(int u) const { return any(u); }
    __device__ __forceinline__ constexpr int counted(int) const { return 1; }
};

template <typename Valid>
constexpr bool kCountsAll = false;
template <>
constexpr bool kCountsAll<AllPositions> = true;
template <typename Valid>
constexpr bool kIsCached = false;
template <>
constexpr bool kIsCached<CachedPositions> = true;
// Vectors of a thread of the statistics in flight: wide sums take the registers of two, and so do planes of
// which some values count.
template <typename T, typename Layout, typename Valid>
constexpr int kStatisticsLoads =
    sizeof(T) < 8 && (kCountsAll<Valid> || !Layout::kIsNchw) ? kReductionLoads : kReductionLoads / 2;

// Where only some positions count, calls take(first, count, words) for a thread's vectors, Unroll at a time,
// and fewer the first time: `count` of them from vector `first` on, with words[u] = read(first + u), which
// says which values of one count. Those of the next vectors are read before these are taken.
template <int Unroll, typename Read, typename Take>
__device__ __forceinline__ void take_some(const Share<Unroll>& share, Read read, Take take) {
    // Of single vectors all are left over.
    int first = 0, count = Unroll > 1 && share.left > 0 ? share.left : Unroll;
    int groups = Unroll > 1 ? share.groups + (share.left > 0 ? 1 : 0) : share.left;
    if (groups == 0) return;
    struct Words {
        decltype(read(0)) of[Unroll];
    } next;
    const auto read_next = [&](int from, int some) {
#pragma unroll
        for (int u = 0; u < Unroll; ++u)
            if (u < some) next.of[u] = read(from + u);
    };
    read_next(first, count);
#pragma unroll 1
    for (; groups > 0; --groups) {
        const Words words = next;
        if (groups > 1) read_next(first + count, Unroll);
        take(first, count, words.of);
        first += count;
        count = Unroll;
    }
}
// The same of planes: take(first, some), where read(first + u) are those values of vector u that count. Those
// of several calls are read at once.
template <int Unroll, typename Read, typename Take>
__device__ __forceinline__ void take_some_of_plane(const Share<Unroll>& share, Read read, Take take) {
    constexpr int kGroups = 8 / Unroll;
    int first = 0, count = Unroll > 1 && share.left > 0 ? share.left : Unroll;
    int groups = Unroll > 1 ? share.groups + (share.left > 0 ? 1 : 0) : share.left;
#pragma unroll 1
    while (groups > 0) {
        // Without a branch: all are on their way at once. Where there are no more, the last one again.
        const int last = first + count + (groups - 1) * Unroll - 1;
        unsigned long long bits = 0;
#pragma unroll
        for (int n = 0; n < kGroups * Unroll; ++n) {
            const int after = n < Unroll ? n : count + n - Unroll;
            const unsigned long long own = read(min(first + after, last));
            if (n >= Unroll || n < count) bits |= own << n * 8;
        }
#pragma unroll 1
        for (int n = min(groups, kGroups); n > 0; --n) {
            SomeOfVectors<Unroll> some{{}, count};
#pragma unroll
            for (int u = 0; u < Unroll; ++u) some.bits[u] = static_cast<unsigned int>(bits) >> u * 8 & 0xffu;
            take(first, some);
            bits >>= Unroll * 8;
            first += count;
            count = Unroll;
        }
        groups -= kGroups;
    }
}
// The same of what a block keeps, in either layout.
template <int Unroll, typename Take>
__device__ __forceinline__ void take_cached(const Share<Unroll>& share, const unsigned char*& own,
                                            Take take) {
    int first = 0, count = Unroll > 1 && share.left > 0 ? share.left : Unroll;
    int groups = Unroll > 1 ? share.groups + (share.left > 0 ? 1 : 0) : share.left;
#pragma unroll 1
    for (; groups > 0; --groups) {
        SomeOfVectors<Unroll> some{{}, count};
#pragma unroll
        for (int u = 0; u < Unroll; ++u) some.bits[u] = u < count ? own[u * kChannelThreads] : 0u;
        take(first, some);
        own += count * kChannelThreads;
        first += count;
        count = Unroll;
    }
}
// Vectors that are left over by groups of Unroll are taken at once where the body has kTakesFew, which is to
// say that it takes FirstOfVectors; otherwise one by one.
template <typename Body>
__device__ __forceinline__ constexpr auto takes_few(int) -> decltype(Body::kTakesFew) {
    return Body::kTakesFew;
}
template <typename>
__device__ __forceinline__ constexpr bool takes_few(long) {
    return false;
}
// Whether a body keeps what it takes, so that other threads find it: chunks of whole vectors have as many
// slots in each thread then, and body.skip_slot() is called where one stays empty.
template <typename Body>
__device__ __forceinline__ constexpr auto has_slots(int) -> decltype(&Body::skip_slot, true) {
    return true;
}
template <typename>
__device__ __forceinline__ constexpr bool has_slots(long) {
    return false;
}
template <int Unroll, typename Body>
__device__ __forceinline__ void take_all(const Share<Unroll>& share, Body& body, long long i,
                                         long long step) {
    if constexpr (takes_few<Body>(0) && Unroll > 1) {
        body.template vectors<Unroll>(i, step, FirstOfVectors{share.left});
        i += share.left * step;
    } else {
#pragma unroll 1
        for (int n = 0; n < share.left; ++n, i += step) body.template vectors<1>(i, 0);
    }
#pragma unroll 1
    for (int n = 0; n < share.groups; ++n, i += Unroll * step) body.template vectors<Unroll>(i, step);
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
template <typename Body>
__device__ __forceinline__ void take_scalar(Body& body, long long i, CachedPositions& valid, long long) {
    body.scalar(i, *valid.own != 0);
    valid.own += kChannelThreads;
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
//   Whole        planes consist of whole vectors: none is left over for body.scalar
//   FromTheEnd   the last ones first: those that a launch before, which took them in order, has left in the
//                cache
//   valid        AllPositions, SomePositions or CachedPositions
//   Launch: threads x, a power of two, walk along a chunk, threads y take chunks in turn.
template <typename T, int Unroll, bool Whole = false, bool FromTheEnd = false, typename Body,
          typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_block(const NchwLayout& layout, long long channel, long long rank,
                                                  Body& body, Valid valid = {}) {
    constexpr int width = kVectorWidth<T>;
    const long long begin = rank * layout.chunks_per_block;
    const long long end = min(begin + layout.chunks_per_block, layout.chunks);
#pragma unroll 1
    for (long long turn = begin + threadIdx.y; turn < end; turn += blockDim.y) {
        const long long s = FromTheEnd ? begin + end - 1 - turn : turn;
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
        const int first_vector = static_cast<int>(FromTheEnd ? vectors - 1 - threadIdx.x : threadIdx.x);
        const long long own = base + head + static_cast<long long>(first_vector) * width;
        const long long step = static_cast<long long>(blockDim.x) * (FromTheEnd ? -width : width);
        if constexpr (kCountsAll<Valid>) {
            take_all(share, body, own, step);
        } else {
            const auto take = [&](int i, const SomeOfVectors<Unroll>& some) {
                constexpr unsigned int kAll = (1u << width) - 1u;
                unsigned int common = kAll;
#pragma unroll
                for (int u = 0; u < Unroll; ++u) common &= some.bits[u];
                if (common == kAll) {
                    body.template vectors<Unroll>(own + i * step, step);
                } else {
                    body.template vectors<Unroll>(own + i * step, step, some);
                }
            };
            if constexpr (kIsCached<Valid>) {
                take_cached(share, valid.own, take);
            } else {
                const long long position = own + to_position;
                take_some_of_plane(
                    share, [&](int i) { return valid.template bits_at<width>(position + i * step); }, take);
            }
        }
        if constexpr (Whole && has_slots<Body>(0)) {
            const int more = vectors & static_cast<int>(blockDim.x - 1);
            if (more != 0 && static_cast<int>(threadIdx.x) >= more) body.skip_slot();
        }
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
//   valid     AllPositions, SomePositions or CachedPositions
//   Launch: threads x are side by side over channels, threads y, a power of two, take rows in turn.
template <int Unroll, bool FromTheEnd = false, int Width, typename Body, typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_rows(const NhwcLayout<Width>& layout, long long channel,
                                                 long long begin, int rows, Body& body, Valid valid = {}) {
    if (rows <= 0) return;
    const int apart = static_cast<int>(blockDim.y) * (FromTheEnd ? -1 : 1);
    const Share<Unroll> share(rows, threadIdx.y, blockDim.y);
    const long long row = begin + static_cast<int>(FromTheEnd ? rows - 1 - threadIdx.y : threadIdx.y);
    const long long own = row * layout.channels + channel, step = apart * layout.channels;
    if constexpr (kCountsAll<Valid>) {
        take_all(share, body, own, step);
    } else {
        const auto take = [&](int i, int count, auto counts) {
            SomeOfRows some{0, count};
#pragma unroll
            for (int u = 0; u < Unroll; ++u)
                if (u < count && counts(u)) some.bits |= 1u << u;
            body.template vectors<Unroll>(own + i * step, step, some);
        };
        if constexpr (kIsCached<Valid>) {
            take_cached(share, valid.own, [&](int i, const SomeOfVectors<Unroll>& some) {
                take(i, some.count, [&](int u) { return some.any(u); });
            });
        } else {
            take_some(
                share, [&](int i) { return valid.word_at(row + i * apart); },
                [&](int i, int count, const unsigned int (&words)[Unroll]) {
                    take(i, count, [&](int u) { return Valid::is_set(words[u], row + (i + u) * apart); });
                });
        }
    }
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
template <typename T, int Unroll, bool = false, bool FromTheEnd = false, int Width, typename Body,
          typename Valid = AllPositions>
__device__ __forceinline__ void for_each_in_block(const NhwcLayout<Width>& layout, long long channel,
                                                  long long rank, Body& body, const Valid& valid = {}) {
    const BlockRows of_block(layout, rank);
    for_each_in_rows<Unroll, FromTheEnd>(layout, channel, of_block.begin, of_block.rows, body, valid);
}

// What fills CachedPositions.
//   StorePositions<kLayoutWidth<T, Layout>> store{own};
//   for_each_in_block<T, 4>(layout, channel, rank, store, positions);
template <int Width>
struct StorePositions {
    unsigned char* own;

    __device__ __forceinline__ void scalar(long long, bool counts) {
        *own = counts;
        own += kChannelThreads;
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long, long long, const Some& some = {}) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            *own = some.mask(u) & ((1u << Width) - 1u);
            own += kChannelThreads;
        }
    }
};
