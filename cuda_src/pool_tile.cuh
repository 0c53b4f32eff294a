// Common windows, whose height and width are known when compiled. A thread has a tile: some neighbours of a
// row. It reads what their windows share once, keeps it in registers, and walks along a strip of rows.
//
// Kernel 3, Stride 2, Pad 1, four outputs a tile (kColumns = 4); what the thread of outputs 4 .. 7 reads:
//
//     column of the input    7 | 8   9  10  11  12  13  14  15 |
//                         -----+--------------------------------+
//     row 2 r - 1         halo |              body              |   one aligned vector, kBody = 8 values,
//     row 2 r             halo |              body              |   and Pad before it: kReach = 9 in all
//     row 2 r + 1         halo |              body              |
//                         -----+--------------------------------+
//     outputs of row r           4       5       6       7          4 is over columns 7 .. 9, 5 over 9 .. 11
//
// The next output below, of row r + 1, shares row 2 r + 1: it is read once and carried down (walk_down). For
// channels last a tile is one column of a vector of channels. Backward the picture is the other way round:
// the tile is the body, and it reads the windows over it, kCovering of a row (gather_up).
//
// A kernel is one line for each of these steps:
//   using Tile = PoolTile<T, 3, 2, 1, false>;
//   walk_down<Tile, Row>(begin, end, take_row, [&](int row, Row(&rows)[3]) { store_tile(...); });
#pragma once

#include "pool_window.cuh"

// Blocks that must fit on a multiprocessor at once, whose windows side by side leave nothing from row to row.
// (sm_75 holds 1024 threads.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kSideBySideBlocks = 4;
#else
constexpr int kSideBySideBlocks = 5;
#endif

// Windows of Kernel x Kernel over height and width, Stride apart, Pad before the first element; depth is that
// of PoolWindow. One axis is a plane of height 1, whose windows have their other rows outside.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
struct PoolTile {
    // Outputs of a tile (see the picture): one vector of channels for channels last, else neighbours whose
    // inputs are 16 bytes; more than four would take too many registers.
    static constexpr int kKernel = Kernel, kStride = Stride, kPad = Pad;
    static constexpr int kWidth = ChannelsLast ? kVectorWidth<T> : 1;
    static constexpr int kColumns = ChannelsLast                   ? 1
                                    : kVectorWidth<T> / Stride > 4 ? 4
                                                                   : kVectorWidth<T> / Stride;
    static constexpr int kLanes = kWidth * kColumns;
    // The body of a row, and how many values its windows reach, from Pad before it.
    static constexpr int kBody = kColumns * Stride;
    static constexpr int kReach = kBody - Stride + Kernel;
    // Windows over Stride neighbouring inputs, from kFirst to kLast past their own number.
    static constexpr int kFirst = -((Kernel - Pad - 1) / Stride);
    static constexpr int kLast = (Stride - 1 + Pad) / Stride;
    static constexpr int kCovering = kColumns + kLast - kFirst;
    // Blocks that must fit on a multiprocessor at once, whose threads keep what they gather and the gradients
    // of a row of windows.
    static constexpr int kGathered = kCovering * kWidth;
    static constexpr int kGatherBlocks =
        kBody * kWidth > 8 || kGathered > 24 ? 2 : (Kernel > 3 || kGathered > 12 ? 3 : 4);
    // Whether an input may be in several windows, so that a thread keeps sums from row to row.
    static constexpr bool kOverlap = kLast > kFirst;
    // Those over input number `r` of Stride.
    static __device__ __forceinline__ constexpr int first_over(int r) {
        return -((Kernel - 1 - Pad - r) / Stride);
    }
    static __device__ __forceinline__ constexpr int last_over(int r) { return (Pad + r) / Stride; }
    // The row of taps by which windows `i` past that number are over it.
    static __device__ __forceinline__ constexpr int row_of_taps(int i, int r) { return r + Pad - i * Stride; }
};

// A row of Count places in registers, Width values at each.
//   PoolRow<T, Tile::kReach, 1> values;  // the body and the halo of a row of the input, 0 outside
//   values.load<Whole, Tile::kPad, Tile::kBody>(row, left, width, 1, is_inside, zero);
//   use(values.at[0][0]);
template <typename T, int Count, int Width>
struct PoolRow {
    Vector<T, Width> at[Count];

    // Places first .. first + Count - 1 of a row of `size`; outside, and everywhere unless `inside`, fill.
    //   row     its first vector; the others follow `groups` apart
    //   Whole   Body values from place first + Lead on are inside, and one aligned vector: Width is 1
    template <bool Whole, int Lead, int Body>
    __device__ __forceinline__ void load(const T* row, int first, int size, int groups, bool inside,
                                         const Vector<T, Width>& fill) {
        const int step = groups * Width;
        const T* source = row + first * step;
        // Neighbours of one aligned vector, or of some of four values: longer ones would take too many
        // registers.
        constexpr bool kInPieces = Width == 1 && Body > 1 && (Whole || Body <= 4);
        Vector<T, Body> body;
        if constexpr (kInPieces) {
#pragma unroll
            for (int i = 0; i < Body; ++i) body[i] = fill[0];
            if (inside) load_pieces<Whole, Body>(body, source + Lead, size - first - Lead, size);
        }
        // Two on either side are inside, or none: one access each. For wider ones there are no registers.
        constexpr bool kBesideInPairs =
            kInPieces && Whole && sizeof(T) <= 2 && Lead == 2 && Count == Body + 2 * Lead;
        Vector<T, kBesideInPairs ? 2 : Width> before, after;
        if constexpr (kBesideInPairs) {
            before = after = filled<T, 2>(fill[0]);
            if (inside && first >= 0) before = Vector<T, 2>::load(source);
            if (inside && first + Lead + Body < size) after = Vector<T, 2>::load(source + Lead + Body);
        }
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            if (kInPieces && i >= Lead && i < Lead + Body) {
                at[i][0] = body[i - Lead];
                continue;
            }
            if constexpr (kBesideInPairs) {
                at[i][0] = i < Lead ? before[i] : after[i - Lead - Body];
                continue;
            }
            // Of a whole tile nothing before the body can be too far, nothing after it too early.
            const int place = first + i;
            const bool reached = (Whole && i >= Lead) || place >= 0;
            const bool within = (Whole && i < Lead) || place < size;
            at[i] = fill;
            if (inside && reached && within) at[i] = Vector<T, Width>::load(source + i * step);
        }
    }

    // Those of a vector, and the one before it: they are all there are.
    template <int Body>
    __device__ __forceinline__ void set(const Vector<T, Body>& body, T before) {
        static_assert(Width == 1 && (Count == Body || Count == Body + 1), "a value before them at most");
        at[0][0] = before;
#pragma unroll
        for (int i = 0; i < Body; ++i) at[Count - Body + i][0] = body[i];
    }

    // What places inside become, of a row that load has read: at[i][0] = f(at[i][0]).
    template <bool Whole, int Lead, int Body, typename Function>
    __device__ __forceinline__ void change(int first, int size, Function f) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const int place = first + i;
            const bool in_body = Whole && i >= Lead && i < Lead + Body;
            if (in_body || (place >= 0 && place < size)) at[i][0] = f(at[i][0]);
        }
    }

    // Writes places 0 .. Count - 1 to first .. of a row of `size`, as far as they are inside.
    template <bool Whole>
    __device__ __forceinline__ void store(T* row, int first, int size, int groups) const {
        if constexpr (Width == 1) {
            Vector<T, Count> all;
#pragma unroll
            for (int i = 0; i < Count; ++i) all[i] = at[i][0];
            store_pieces<Whole, Count>(all, row + first, size - first, size);
        } else {
            const int step = groups * Width;
            T* target = row + first * step;
#pragma unroll
            for (int i = 0; i < Count; ++i) {
                if (first + i < size) at[i].store(target + i * step);
            }
        }
    }
};

// A row of half values in registers, two in a word, for windows over neighbouring values.
//   PoolPairRow<T, Tile::kReach, Tile::kPad, Tile::kBody> values;
//   values.load<Whole>(row, left, width, fill);
//   use(values.pair(0, 2));  // the values at places 0 and 2, of two windows 2 apart, in one word
template <typename T, int Count, int Lead, int Body>
struct PoolPairRow {
    // One value in each of the first Lead and of the last words.
    static constexpr int kWords = Count - Body + Body / 2;
    unsigned int words[kWords];

    static __device__ __forceinline__ unsigned int bits(const T* value) {
        return *reinterpret_cast<const unsigned short*>(value);
    }

    // As PoolRow::load, of a row inside.
    //   fill   in both halves
    template <bool Whole>
    __device__ __forceinline__ void load(const T* row, int first, int size, unsigned int fill) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = fill;
        const T* source = row + first;
        if constexpr (Whole) {
            const Vector<T, Body> body = Vector<T, Body>::load(source + Lead);
#pragma unroll
            for (int i = 0; i < Body / 2; ++i)
                words[Lead + i] = reinterpret_cast<const unsigned int*>(body.words)[i];
        }
        // As in PoolRow.
        constexpr bool kBesideInPairs = Whole && Lead == 2 && Count == Body + 2 * Lead;
        if constexpr (kBesideInPairs) {
            if (first >= 0) set_beside(0, source);
            if (first + Lead + Body < size) set_beside(kWords - 2, source + Lead + Body);
        }
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const bool in_body = i >= Lead && i < Lead + Body;
            if (kBesideInPairs || (Whole && in_body)) continue;
            const int place = first + i;
            const bool reached = (Whole && i >= Lead) || place >= 0;
            const bool within = (Whole && i < Lead) || place < size;
            if (!reached || !within) continue;
            const unsigned int value = bits(source + i);
            unsigned int& word = words[word_of(i)];
            if (!in_body) {
                word = value;
            } else {
                word = half_of(i) ? (word & 0xffff) | value << 16 : (word & 0xffff0000) | value;
            }
        }
    }

    // Two neighbours, in a word of their own each.
    __device__ __forceinline__ void set_beside(int word, const T* values) {
        const unsigned int pair = *reinterpret_cast<const unsigned int*>(values);
        words[word] = pair & 0xffff;
        words[word + 1] = pair >> 16;
    }

    // As PoolRow::set.
    __device__ __forceinline__ void set(const Vector<T, Body>& body, T before) {
        static_assert(Count == Lead + Body && Lead <= 1, "a value before them at most");
        words[0] = bits(&before);
#pragma unroll
        for (int i = 0; i < Body / 2; ++i)
            words[Lead + i] = reinterpret_cast<const unsigned int*>(body.words)[i];
    }

    // What places inside become, of a row that load has read: f gives a word for a word.
    template <bool Whole, typename Function>
    __device__ __forceinline__ void change(int first, int size, Function f) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const bool in_body = w >= Lead && w < Lead + Body / 2;
            if (Whole && in_body) {
                words[w] = f(words[w]);
                continue;
            }
            const int place = first + (w < Lead ? w : in_body ? Lead + 2 * (w - Lead) : w + Body / 2);
            unsigned int inside = place >= 0 && place < size ? 0xffffu : 0u;
            if (!in_body) {
                inside |= inside << 16;
            } else if (place + 1 >= 0 && place + 1 < size) {
                inside |= 0xffff0000u;
            }
            if (inside != 0) words[w] = (f(words[w]) & inside) | (words[w] & ~inside);
        }
    }

    static __device__ __forceinline__ constexpr int word_of(int i) {
        return i < Lead ? i : i < Lead + Body ? Lead + (i - Lead) / 2 : i - Body / 2;
    }
    static __device__ __forceinline__ constexpr int half_of(int i) {
        return i >= Lead && i < Lead + Body ? (i - Lead) % 2 : 0;
    }
    // Places i and j in one word.
    __device__ __forceinline__ unsigned int pair(int i, int j) const {
        const unsigned int low = words[word_of(i)], high = words[word_of(j)];
        return __byte_perm(low, high, (half_of(i) ? 0x32 : 0x10) | (half_of(j) ? 0x7600 : 0x5400));
    }
};

// Sums of a row of Count places, Width values at each.
template <typename A, int Count, int Width>
struct RowSums {
    A at[Count][Width];

    __device__ __forceinline__ void add(const RowSums& row) {
#pragma unroll
        for (int c = 0; c < Count; ++c) {
#pragma unroll
            for (int k = 0; k < Width; ++k) at[c][k] += row.at[c][k];
        }
    }
};

// Writes sums of a row, rounded, to places first, ... of a row of `size`, as far as they are inside.
template <bool Whole, typename T, int Count, int Width>
__device__ __forceinline__ void store_sums(const RowSums<accumulate_t<T>, Count, Width>& sums, T* row,
                                           int first, int size, int groups) {
    PoolRow<T, Count, Width> result;
#pragma unroll
    for (int c = 0; c < Count; ++c) {
#pragma unroll
        for (int k = 0; k < Width; ++k) result.at[c][k] = from_accumulate<T>(sums.at[c][k]);
    }
    result.template store<Whole>(row, first, size, groups);
}

// Writes the columns of a tile, from column `first` on, as far as they are inside a row of `size`.
template <bool Whole, int Width, typename T, int Lanes>
__device__ __forceinline__ void store_tile(const Vector<T, Lanes>& lanes, T* row, int first, int size,
                                           int groups) {
    T* target = row + first * (groups * Width);
    if constexpr (Whole || Lanes == Width) {
        lanes.store(target);
    } else {
#pragma unroll
        for (int i = 0; i < Lanes; ++i) {
            if (first + i < size) target[i] = lanes[i];
        }
    }
}

// The sizes of an array's images, which have fewer than 2^31 values.
template <int Width, bool ChannelsLast>
struct PoolPlane {
    int depth, height, width, groups;

    __device__ __forceinline__ PoolPlane(const long long (&sizes)[3], long long vectors)
        : depth(static_cast<int>(sizes[0])),
          height(static_cast<int>(sizes[1])),
          width(static_cast<int>(sizes[2])),
          groups(ChannelsLast ? static_cast<int>(vectors) : 1) {}

    // Values before the image of a tile and, in it, before the tile's group.
    __device__ __forceinline__ long long before(const PoolPosition<int>& tile) const {
        return tile.image * (static_cast<long long>(depth) * height * width * groups * Width) +
               (ChannelsLast ? tile.group * Width : 0);
    }
    // Values of the image before a row.
    __device__ __forceinline__ int row(int d, int h) const {
        return (d * height + h) * (width * groups * Width);
    }
};

// Rows that a thread has asked for before it takes them.
constexpr int kRowsAhead = 4;

// Asks for the rows that a walk will come to.
//   RowsAhead<T, 1> rows(first, step, 0, count);  // for the first kRowsAhead of them
//   rows.ask();                                   // for one more, with each that is taken
//   Vectors   that are asked for of each row
template <typename T, int Vectors>
struct RowsAhead {
    const T* next;
    int step, apart, left;

    //   first, step   where they begin, and from one to the next
    //   apart         from one vector to the next
    //   count         of rows; there may be none
    __device__ __forceinline__ RowsAhead(const T* first, int step, int apart, int count)
        : next(first), step(step), apart(apart), left(count) {
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) ask();
    }
    __device__ __forceinline__ void ask() {
        if (left-- <= 0) return;
#pragma unroll
        for (int i = 0; i < Vectors; ++i) prefetch(next + i * apart);
        next += step;
    }
};

// Walks down the outputs begin .. end - 1 of a strip, whose windows share rows of inputs: each of those is
// taken once and carried to the windows below.
//   walk_down<Tile, Sums>(begin, end, [&](int h) { return sums_of_row(h); },
//                         [&](int row, Sums(&rows)[3]) { write(row, rows[0] + rows[1] + rows[2]); });
//   Unroll              outputs of a round: of Kernel ones the rows come round to their registers, and none
//                       is moved
//   take(h)             Row made of row h of the input
//   finish(row, rows)   an output, made of the rows of its window; those that the next one shares are carried
//                       to it as it leaves them
template <typename Tile, typename Row, int Unroll = 1, typename Take, typename Finish>
__device__ __forceinline__ void walk_down(int begin, int end, Take take, Finish finish) {
    constexpr int kShared = Tile::kKernel > Tile::kStride ? Tile::kKernel - Tile::kStride : 0;
    Row rows[Tile::kKernel];
#pragma unroll
    for (int j = 0; j < kShared; ++j) rows[j] = take(begin * Tile::kStride - Tile::kPad + j);
#pragma unroll Unroll
    for (int row = begin; row < end; ++row) {
#pragma unroll
        for (int j = kShared; j < Tile::kKernel; ++j) rows[j] = take(row * Tile::kStride - Tile::kPad + j);
        finish(row, rows);
#pragma unroll
        for (int j = 0; j < kShared; ++j) rows[j] = rows[j + Tile::kStride];
    }
}

// The same, where the rows of as many outputs as take at most AtOnce rows are read before the first is taken.
//   walk_down_together<Tile, Sums, 4>(begin, end, [&](int h) { return row(h); },
//                                     [&](const auto& row, int h) { return sums_of(row); }, finish);
//   read(h)        row h of the input, as take(row, h) is given it
template <typename Tile, typename Row, int AtOnce, typename Read, typename Take, typename Finish>
__device__ __forceinline__ void walk_down_together(int begin, int end, Read read, Take take, Finish finish) {
    constexpr int kKernel = Tile::kKernel, kStride = Tile::kStride;
    constexpr int kShared = kKernel > kStride ? kKernel - kStride : 0, kNew = kKernel - kShared;
    constexpr int kOutputs = AtOnce / kNew > 1 ? AtOnce / kNew : 1;
    const auto row_of = [&](int row, int j) { return row * kStride - Tile::kPad + j; };
    const int last = row_of(end - 1, kKernel - 1);
    Row rows[kKernel];
#pragma unroll
    for (int j = 0; j < kShared; ++j) rows[j] = take(read(row_of(begin, j)), row_of(begin, j));
#pragma unroll 1
    for (int first = begin; first < end; first += kOutputs) {
        decltype(read(0)) values[kOutputs][kNew];
#pragma unroll
        for (int i = 0; i < kOutputs * kNew; ++i)
            values[i / kNew][i % kNew] = read(min(row_of(first + i / kNew, kShared + i % kNew), last));
#pragma unroll
        for (int u = 0; u < kOutputs; ++u) {
            if (u != 0 && first + u >= end) break;
#pragma unroll
            for (int j = 0; j < kNew; ++j)
                rows[kShared + j] = take(values[u][j], row_of(first + u, kShared + j));
            finish(first + u, rows);
#pragma unroll
            for (int j = 0; j < kShared; ++j) rows[j] = rows[j + kStride];
        }
    }
}

// Walks up the blocks end - 1 .. begin of a strip, of kStride rows of inputs each: a row of windows is taken
// once and gives to all rows of inputs that it is over, to which it comes in the order of the taps, from the
// last window to the first.
//   gather_up<Tile, Sums>(begin, end, height, [&](int h) { return gradients_of_row(h); },
//                         [&](const auto& row, int i, int r, Sums& sums) { sums.add(row); }, write);
//   take(h)                row h of windows
//   add(row, i, r, sums)   adds what it gives row r of a block, past whose own row of windows it is i; by row
//                          row_of_taps(i, r) of its taps
//   write(row, r, sums)    a row of inputs, row r of its block
template <typename Tile, typename Sums, typename Take, typename Add, typename Write>
__device__ __forceinline__ void gather_up(int begin, int end, int height, Take take, Add add, Write write) {
    constexpr int kStride = Tile::kStride, kFirst = Tile::kFirst, kLast = Tile::kLast;
    // Blocks that have had some of their windows; the first has had all but one. Windows side by side leave
    // none: what adds begins with the only one.
    constexpr int kBegun = kLast - kFirst;
    Sums begun[kBegun > 0 ? kBegun : 1][kStride] = {};
    const auto add_row = [&](const auto& row, int i, int r, Sums& sums) {
        if (Tile::first_over(r) <= i && i <= Tile::last_over(r)) add(row, i, r, sums);
    };
#pragma unroll 1
    for (int h = end - 1 + kLast;; --h) {
        const auto row = take(h);
        const int block = h - kFirst;
        if (block < end) {
#pragma unroll
            for (int r = 0; r < kStride; ++r) {
                add_row(row, kFirst, r, begun[0][r]);
                if (block * kStride + r < height) write(block * kStride + r, r, begun[0][r]);
            }
        }
        if (h == begin + kFirst) break;
#pragma unroll
        for (int i = 1; i <= kBegun; ++i) {
#pragma unroll
            for (int r = 0; r < kStride; ++r) {
                begun[i - 1][r] = i < kBegun ? begun[i][r] : Sums{};
                add_row(row, kFirst + i, r, begun[i - 1][r]);
            }
        }
    }
}

// Calls visit(block, r, row) for the rows of inputs of the blocks begin .. end - 1, row number r of each.
template <typename Tile, typename Visit>
__device__ __forceinline__ void for_each_row(int begin, int end, int height, Visit visit) {
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
#pragma unroll
        for (int r = 0; r < Tile::kStride; ++r) {
            const int row = block * Tile::kStride + r;
            if (row < height) visit(block, r, row);
        }
    }
}

// Number of the tap in row 0 and column 0 of a window, in depth kd; less for one axis, whose taps are a row.
template <int Kernel, int Pad>
__device__ __forceinline__ int first_tap_of(const PoolWindow& window, int kd) {
    return kd * Kernel * Kernel - (window.kernel[1] < Kernel ? Pad * Kernel : 0);
}

// Calls run(Constant<true>()) where every tile of both arrays is whole, which are planes, else
// run(Constant<false>()).
template <typename Tile, typename Run>
__device__ __forceinline__ void by_whole_tiles(const PoolWindow& window, Run run) {
    if constexpr (Tile::kWidth == 1) {
        if (static_cast<int>(window.input[2]) % Tile::kBody == 0 &&
            static_cast<int>(window.output[2]) % Tile::kColumns == 0) {
            run(Constant<true>());
            return;
        }
    }
    run(Constant<false>());
}
