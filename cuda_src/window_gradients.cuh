// What windows give to the inputs that they chose, for tiles of windows known when compiled: all backward
// kernels of max pooling by tiles gather with it.
//   using Tile = PoolTile<T, 3, 2, 1, true>;
//   using Row = WindowRow<T, Tile, false>;
//   const Row row(Row::read<Whole>(dy + image, argmax + image, h * row_values, column, width, groups, true));
//   GatheredRow<T, Tile, false> sums = {};
//   sums.add(row, 0, r, first_tap);  // and other rows of windows, from the last to the first
//   store_row<Whole, Tile>(sums, r, dx + j, first, width, groups);
//
// Sums are those of max_pool_backward: from the last window to the first, whose taps ascend, in A and rounded
// once. Zeros are +0, as of a sum that begins with one.
#pragma once

#include "argmax.cuh"
#include "pool_tile.cuh"

// The tap where there is no window; others are less.
constexpr unsigned char kNoTap = 0x7f;

// Whether half values are gathered two at a time: of windows none of which begins before its own inputs.
// Where all inputs are in many windows pairs would be taken apart for each tap.
//   Deep   windows of a tile come from several depths
template <typename T, typename Tile, bool Deep>
constexpr bool kGathersPairs =
    sizeof(T) == 2 && !Deep && Tile::kKernel < 2 * Tile::kStride && Tile::kFirst == 0;

// The windows of a row over a tile of inputs: read(), and what is read.
template <typename T, typename Tile, bool Deep, bool InPairs = kGathersPairs<T, Tile, Deep>>
struct WindowRow {
    static constexpr int kWidth = Tile::kWidth;
    struct Loaded {
        PoolRow<T, Tile::kCovering, kWidth> gradients;
        PoolRow<unsigned char, Tile::kCovering, kWidth> taps;
    };
    accumulate_t<T> gradients[Tile::kCovering][kWidth];
    PoolRow<unsigned char, Tile::kCovering, kWidth> taps;

    //   dy, argmax   of the image
    //   row          values before the row, which is inside the image; there is no window outside of it, nor
    //                in it unless `exists`
    //   column       of the tile's own first window
    //   Whole        see PoolRow
    template <bool Whole>
    static __device__ __forceinline__ Loaded read(const T* dy, const unsigned char* argmax, int row,
                                                  int column, int size, int groups, bool exists) {
        constexpr int kFirst = Tile::kFirst, kColumns = Tile::kColumns;
        Loaded loaded;
        loaded.gradients.template load<Whole, -kFirst, kColumns>(
            dy + row, column + kFirst, size, groups, exists, filled<T, kWidth>(from_accumulate<T>(0)));
        loaded.taps.template load<Whole, -kFirst, kColumns>(argmax + row, column + kFirst, size, groups,
                                                            exists, filled<unsigned char, kWidth>(kNoTap));
        return loaded;
    }

    __device__ __forceinline__ explicit WindowRow(const Loaded& loaded) : taps(loaded.taps) {
#pragma unroll
        for (int j = 0; j < Tile::kCovering; ++j) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) gradients[j][k] = widened(loaded.gradients.at[j], k);
        }
    }
};

// The gradients of a row of a tile's inputs, row number r of Stride. They begin as {}; of windows side by
// side, with the only one that is over them.
template <typename T, typename Tile, bool Deep, bool InPairs = kGathersPairs<T, Tile, Deep>>
struct GatheredRow {
    static constexpr int kWidth = Tile::kWidth;
    accumulate_t<T> at[Tile::kBody][kWidth];

    // What a row of windows gives, i past the row's own.
    //   first_tap   of the windows' first row, see first_tap_of
    __device__ __forceinline__ void add(const WindowRow<T, Tile, Deep>& windows, int i, int r,
                                        int first_tap) {
        const int tap = first_tap + Tile::row_of_taps(i, r) * Tile::kKernel;
#pragma unroll
        for (int j = Tile::kCovering - 1; j >= 0; --j) {
#pragma unroll
            for (int c = 0; c < Tile::kBody; ++c) {
                const int kw = c + Tile::kPad - (j + Tile::kFirst) * Tile::kStride;
                if (kw < 0 || kw >= Tile::kKernel) continue;
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    const bool chosen = is_tap(windows.taps.at[j], k, tap + kw);
                    if (Deep || Tile::kOverlap) {
                        if (chosen) at[c][k] += windows.gradients[j][k];
                    } else {
                        at[c][k] = chosen ? windows.gradients[j][k] + accumulate_t<T>(0) : accumulate_t<T>(0);
                    }
                }
            }
        }
    }

    // Of channels last, those of input number c; of planes all of them.
    __device__ __forceinline__ Vector<T, kWidth> column(int, int c) const { return rounded<T>(at[c]); }
    __device__ __forceinline__ Vector<T, Tile::kBody> row(int) const {
        accumulate_t<T> sums[Tile::kBody];
#pragma unroll
        for (int c = 0; c < Tile::kBody; ++c) sums[c] = at[c][0];
        return rounded<T>(sums);
    }
};

// ---- two half values at a time ---------------------------------------------------------------------------
//
// Lanes are the neighbours that are alike: the channels of a vector, or windows side by side, and of the
// inputs those that are as far from their own window.

template <typename T>
__device__ __forceinline__ unsigned int sum_of_pairs(unsigned int a, unsigned int b) {
    const typename HalfPair<T>::type sum = __hadd2(pair_of<T>(a), pair_of<T>(b));
    return reinterpret_cast<const unsigned int&>(sum);
}

// All bits of either half of a word, where the highest bit of byte 2 * Pair is set for the low one, and that
// of the byte after it for the high one.
template <int Pair>
__device__ __forceinline__ unsigned int halves_by_sign(unsigned int bytes) {
#ifdef GPU_LAYERS_EMULATED
    return (bytes >> (16 * Pair) & 0x80u ? 0xffffu : 0u) |
           (bytes >> (16 * Pair) & 0x8000u ? 0xffff0000u : 0u);
#else
    // As __byte_perm, which does not repeat the sign of a byte.
    unsigned int halves;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(halves) : "r"(bytes), "n"(Pair == 0 ? 0x9988 : 0xbbaa));
    return halves;
#endif
}

// The gradients of windows, and the taps that they chose.
template <typename T, int Lanes>
struct ChosenPairs {
    unsigned int pairs[Lanes / 2], taps[Lanes / 4];

    __device__ __forceinline__ void set(const Vector<T, Lanes>& gradients,
                                        const Vector<unsigned char, Lanes>& argmax) {
#pragma unroll
        for (int i = 0; i < Lanes / 2; ++i) {
            unsigned int word;
            memcpy(&word, &gradients.values[2 * i], sizeof(word));
            pairs[i] = sum_of_pairs<T>(word, 0);
        }
        memcpy(taps, &argmax, sizeof(taps));
    }
    // Calls take(i, word) for all pairs: the gradients of those that chose this tap, +0 of the others.
    //   tap   not negative, but for rows of inputs that do not exist: of one axis
    template <typename Take>
    __device__ __forceinline__ void by_tap(int tap, Take take) const {
        const unsigned int sought = tap * 0x01010101u;
#pragma unroll
        for (int i = 0; i < Lanes / 4; ++i) {
            // The highest bit of a byte says that it is another tap; from there it goes to all of a half.
            const unsigned int others = (taps[i] ^ sought) + 0x7f7f7f7fu;
            take(2 * i, pairs[2 * i] & ~halves_by_sign<0>(others));
            take(2 * i + 1, pairs[2 * i + 1] & ~halves_by_sign<1>(others));
        }
    }
};

// The sums of inputs.
//   few   whether at most two windows give to each, whose sum is rounded as it is in A: that has more than
//         twice their bits. Known when compiled.
template <typename T, int Lanes>
struct GatheredPairs {
    unsigned int pairs[Lanes / 2];  // of few
    float sums[Lanes];              // of many

    // They begin with what they take by this tap.
    __device__ __forceinline__ void start(const ChosenPairs<T, Lanes>& windows, int tap, bool few) {
        windows.by_tap(tap, [&](int i, unsigned int word) {
            if (few) {
                pairs[i] = word;
            } else {
                sums[2 * i] = widened(of_word(word), 0);
                sums[2 * i + 1] = widened(of_word(word), 1);
            }
        });
    }
    __device__ __forceinline__ void add(const ChosenPairs<T, Lanes>& windows, int tap, bool few) {
        windows.by_tap(tap, [&](int i, unsigned int word) {
            if (few) {
                pairs[i] = sum_of_pairs<T>(pairs[i], word);
            } else {
                sums[2 * i] += widened(of_word(word), 0);
                sums[2 * i + 1] += widened(of_word(word), 1);
            }
        });
    }
    __device__ __forceinline__ Vector<T, Lanes> rounded(bool few) const {
        if (!few) return ::rounded<T>(sums);
        Vector<T, Lanes> result;
        memcpy(&result, pairs, sizeof(result));
        return result;
    }

  private:
    static __device__ __forceinline__ Vector<T, 2> of_word(unsigned int word) {
        Vector<T, 2> values;
        values.words[0] = word;
        return values;
    }
};

// The bits of a value of one or two bytes.
template <typename V>
__device__ __forceinline__ unsigned int bits_of(const V& value) {
    typename MemoryWord<static_cast<int>(sizeof(V))>::type bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// The lanes one place further on, after which there is one more. By words, which bytes and halves would be
// put together of.
template <typename V, int N>
__device__ __forceinline__ Vector<V, N> next_lanes(const Vector<V, N>& own, V after) {
    constexpr int kWords = N * static_cast<int>(sizeof(V)) / 4;
    unsigned int words[kWords + 1];
    memcpy(words, &own, sizeof(own));
    words[kWords] = bits_of(after);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        words[i] = __funnelshift_r(words[i], words[i + 1], 8 * static_cast<int>(sizeof(V)));
    Vector<V, N> result;
    memcpy(&result, words, sizeof(result));
    return result;
}

// Of pairs, what is read of a row of windows.
template <typename T, typename Tile, bool ChannelsLast = (Tile::kWidth > 1)>
struct LoadedPairs {
    static constexpr int kOver = Tile::kLast + 1, kWidth = Tile::kWidth;
    Vector<T, kWidth> gradients[kOver];
    Vector<unsigned char, kWidth> taps[kOver];
};
// Those of a tile of planes, and the one after them.
template <typename T, typename Tile>
struct LoadedPairs<T, Tile, false> {
    Vector<T, Tile::kColumns> gradients;
    Vector<unsigned char, Tile::kColumns> taps;
    T after;
    unsigned char tap_after;
};

// Number j of them are the windows j past the inputs' own.
template <typename T, typename Tile, bool Deep>
struct WindowRow<T, Tile, Deep, true> {
    static constexpr int kOver = Tile::kLast + 1, kLanes = Tile::kLanes;
    static constexpr int kColumns = Tile::kColumns, kWidth = Tile::kWidth;
    static_assert(Tile::kFirst == 0 && kOver <= 2, "their own, and those after them at most");
    using Loaded = LoadedPairs<T, Tile>;
    ChosenPairs<T, kLanes> at[kOver];

    template <bool Whole>
    static __device__ __forceinline__ Loaded read(const T* dy, const unsigned char* argmax, int row,
                                                  int column, int size, int groups, bool exists) {
        Loaded loaded;
        if constexpr (kWidth > 1) {
            // Where there is no window another one is read, and none of its taps taken.
#pragma unroll
            for (int j = 0; j < kOver; ++j) {
                const int nearest = min(column + j, size - 1);
                const int first = row + nearest * (groups * kWidth);
                loaded.gradients[j] = Vector<T, kWidth>::load(dy + first);
                loaded.taps[j] = Vector<unsigned char, kWidth>::load(argmax + first);
                if (!exists || nearest != column + j) loaded.taps[j] = filled<unsigned char, kWidth>(kNoTap);
            }
        } else {
            dy += row + column;
            argmax += row + column;
            if constexpr (!Whole) {
                loaded.gradients = filled<T, kColumns>(from_accumulate<T>(0));
                loaded.taps = filled<unsigned char, kColumns>(kNoTap);
            }
            load_pieces<Whole, kColumns>(loaded.gradients, dy, size - column, size);
            load_pieces<Whole, kColumns>(loaded.taps, argmax, size - column, size);
            if (!exists) loaded.taps = filled<unsigned char, kColumns>(kNoTap);
            loaded.after = from_accumulate<T>(0);
            loaded.tap_after = kNoTap;
            if (kOver > 1 && exists && column + kColumns < size) {
                loaded.after = dy[kColumns];
                loaded.tap_after = argmax[kColumns];
            }
        }
        return loaded;
    }

    __device__ __forceinline__ explicit WindowRow(const Loaded& loaded) {
        if constexpr (kWidth > 1) {
#pragma unroll
            for (int j = 0; j < kOver; ++j) at[j].set(loaded.gradients[j], loaded.taps[j]);
        } else {
            at[0].set(loaded.gradients, loaded.taps);
            if constexpr (kOver > 1)
                at[1].set(next_lanes(loaded.gradients, loaded.after),
                          next_lanes(loaded.taps, loaded.tap_after));
        }
    }
};

// Number c of them are the inputs number c of Stride.
template <typename T, typename Tile, bool Deep>
struct GatheredRow<T, Tile, Deep, true> {
    static constexpr int kStride = Tile::kStride, kLanes = Tile::kLanes;
    GatheredPairs<T, kLanes> at[kStride];

    __device__ __forceinline__ void add(const WindowRow<T, Tile, Deep>& windows, int i, int r,
                                        int first_tap) {
        const int tap = first_tap + Tile::row_of_taps(i, r) * Tile::kKernel;
#pragma unroll
        for (int c = 0; c < kStride; ++c) {
#pragma unroll
            for (int j = Tile::last_over(c); j >= Tile::first_over(c); --j) {
                const int kw = c + Tile::kPad - j * kStride;
                if (kw < 0 || kw >= Tile::kKernel) continue;
                const auto& over = windows.at[j];
                if (i == Tile::last_over(r) && j == Tile::last_over(c)) {
                    at[c].start(over, tap + kw, is_few(r, c));
                } else {
                    at[c].add(over, tap + kw, is_few(r, c));
                }
            }
        }
    }

    __device__ __forceinline__ Vector<T, kLanes> column(int r, int c) const {
        return at[c].rounded(is_few(r, c));
    }
    __device__ __forceinline__ Vector<T, Tile::kBody> row(int r) const {
        static_assert(kStride == 2, "neighbours are of two columns in turn");
        const Vector<T, kLanes> even = column(r, 0), odd = column(r, 1);
        unsigned int words[kLanes];
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            words[i] = __byte_perm(reinterpret_cast<const unsigned int*>(even.words)[i / 2],
                                   reinterpret_cast<const unsigned int*>(odd.words)[i / 2],
                                   i % 2 == 0 ? 0x5410 : 0x7632);
        }
        Vector<T, Tile::kBody> all;
        memcpy(&all, words, sizeof(all));
        return all;
    }

  private:
    static __device__ __forceinline__ constexpr bool is_few(int r, int c) {
        return (Tile::last_over(r) - Tile::first_over(r) + 1) *
                   (Tile::last_over(c) - Tile::first_over(c) + 1) <=
               2;
    }
};

// Writes what a GatheredRow has to places first, ... of a row of `size`, as far as they are inside.
template <bool Whole, typename Tile, typename Sums, typename T>
__device__ __forceinline__ void store_row(const Sums& sums, int r, T* target, int first, int size,
                                          int groups) {
    if constexpr (Tile::kWidth > 1) {
        const int step = groups * Tile::kWidth;
#pragma unroll
        for (int c = 0; c < Tile::kBody; ++c) {
            if (first + c < size) sums.column(r, c).store(target + (first + c) * step);
        }
    } else {
        store_pieces<Whole, Tile::kBody>(sums.row(r), target + first, size - first, size);
    }
}

// Rows of a tile that are written as they are.
template <bool Whole, typename Tile, typename T>
struct StoredRows {
    T* dx;  // of the plane
    int column, row_values, width, groups;

    __device__ __forceinline__ void expect(int) {}
    template <typename Sums>
    __device__ __forceinline__ void write(int row, int r, const Sums& sums) const {
        store_row<Whole, Tile>(sums, r, dx + row * row_values, column, width, groups);
    }
};

// Up its strip a thread takes each row of windows once, and adds the gradients of those whose tap is the
// input's to the rows of inputs that they are over.
//   dy, argmax   as in max_pool_backward; one byte a tap
//   strip        of a thread: so many times Stride rows of inputs
//   finish       of blocks begin .. end - 1, each Stride rows of a tile: finish(tile, plane, begin, end) has
//                expect(block), called before its rows are gathered, from the last block to the first unless
//                Deep, and write(row, r, sums) for each: see StoredRows
//   Deep         an input may be in several windows along depth: rows are taken again for each
//   number       of the block, see for_each_unit
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of inputs, which
// no two threads share.
template <bool Whole, typename T, typename Tile, bool Deep, typename Finish>
__device__ __forceinline__ void gather_strips(const T* dy, const unsigned char* argmax, int strip,
                                              const PoolWindow& window, const Finish& finish,
                                              unsigned int number = blockIdx.x) {
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kStride = Tile::kStride;
    constexpr bool kChannelsLast = kWidth > 1;
    using Plane = PoolPlane<kWidth, kChannelsLast>;
    using Row = WindowRow<T, Tile, Deep>;
    using Sums = GatheredRow<T, Tile, Deep>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const auto gather = [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const long long before = output.before(tile);
        const int column = tile.at[2] * kColumns + Tile::kFirst;
        const int begin = tile.at[1] * strip;
        const int end = min(begin + strip, (input.height + kStride - 1) / kStride);
        auto rows = finish(tile, input, begin, end);
        const auto read = [&](int d, int h, bool inside) {
            const int nearest = min(Tile::kFirst < 0 ? max(h, 0) : h, output.height - 1);
            return Row::template read<Whole>(dy + before, argmax + before, output.row(d, nearest),
                                             tile.at[2] * kColumns, output.width, output.groups,
                                             inside && h == nearest);
        };
        const auto write = [&](int row, int r, const Sums& sums) { rows.write(row, r, sums); };
        if constexpr (!Deep) {
            const int kd = depth.last < depth.first ? -1 : covering_tap(window, 0, tile.at[0], depth.last);
            const int first_tap = first_tap_of<Tile::kKernel, Tile::kPad>(window, max(kd, 0));
            // Rows of windows further up, where there are registers; the first row is read at once.
            constexpr bool kAsks = Tile::kOverlap && (!kChannelsLast || Tile::kGatherBlocks == 2);
            const int asked = min(end - 1 + Tile::kLast, output.height - 1);
            const long long first_asked = before + output.row(max(depth.last, 0), asked - 1) +
                                          max(min(column, output.width - 1), 0) * (output.groups * kWidth);
            const int rows_asked = kAsks ? asked - max(begin + Tile::kFirst, 0) : 0;
            constexpr int kLanes = kChannelsLast ? kWidth : kColumns;
            const int lane = kChannelsLast ? tile.group : tile.at[2];
            const auto rows_of = [&](int bytes) {
                return asks_for_sector(lane * kLanes * bytes, kLanes * bytes) ? rows_asked : 0;
            };
            RowsAhead<T, 1> gradients_ahead(dy + first_asked, -output.row(0, 1), 0,
                                            rows_of(static_cast<int>(sizeof(T))));
            RowsAhead<unsigned char, 1> taps_ahead(argmax + first_asked, -output.row(0, 1), 0, rows_of(1));
            const int d = max(depth.last, 0);
            // Of windows side by side two rows are read together: the one that is taken, and the one after
            // it.
            constexpr bool kInTwos = !Tile::kOverlap;
            typename Row::Loaded after;
            bool is_read = false;
            gather_up<Tile, Sums>(
                begin, end, input.height,
                [&](int h) {
                    if constexpr (kAsks) {
                        gradients_ahead.ask();
                        taps_ahead.ask();
                    }
                    if (h - Tile::kFirst < end) rows.expect(h - Tile::kFirst);
                    if constexpr (!kInTwos) return Row(read(d, h, kd >= 0));
                    typename Row::Loaded own;
                    if (is_read) {
                        own = after;
                    } else {
                        own = read(d, h, kd >= 0);
                        if (h > begin + Tile::kFirst) after = read(d, h - 1, kd >= 0);
                    }
                    is_read = !is_read;
                    return Row(own);
                },
                [&](const Row& row, int i, int r, Sums& sums) { sums.add(row, i, r, first_tap); }, write);
        } else {
            for_each_row<Tile>(begin, end, input.height, [&](int block, int r, int row) {
                if (r == 0) rows.expect(block);
                Sums sums = {};
#pragma unroll 1
                for (int d = depth.last; d >= depth.first; --d) {
                    const int kd = covering_tap(window, 0, tile.at[0], d);
                    if (kd < 0) continue;
                    const int first_tap = first_tap_of<Tile::kKernel, Tile::kPad>(window, kd);
                    // In the order of the taps: from the last window to the first.
#pragma unroll 1
                    for (int i = Tile::last_over(r); i >= Tile::first_over(r); --i)
                        sums.add(Row(read(d, block + i, true)), i, r, first_tap);
                }
                write(row, r, sums);
            });
        }
    };
    for_each_unit<int>(window, gather, number);
}
