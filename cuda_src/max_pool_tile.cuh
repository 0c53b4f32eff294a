// The forward of max pooling by tiles, of values as they are or as they become on the way: what
// max_pool_tiled.cu and batch_norm_max_pool.cu share.
#pragma once

#include "argmax.cuh"
#include "pool_tile.cuh"
#include "running_max.cuh"

// The largest of the rows of a window. Of five rows, one after the other, the first three carry the larger of
// their own and the row below, which is how they come to the next window: three comparisons in place of four.
//   is_first   of a strip: rows are what was read
template <int Stride, typename Best, int Kernel>
__device__ __forceinline__ Best largest_of_rows(Best (&rows)[Kernel], bool is_first) {
    Best best = rows[0];
    if constexpr (Kernel == 5 && Stride == 1) {
        if (is_first) {
#pragma unroll
            for (int j = 0; j < 3; ++j) rows[j].take(rows[j + 1]);
            best = rows[0];
        }
        rows[3].take(rows[4]);
        best.take(rows[2]);
        best.take(rows[4]);
    } else {
#pragma unroll
        for (int j = 1; j < Kernel; ++j) best.take(rows[j]);
    }
    return best;
}

// What a tile of neighbours reads of a row: half values in pairs.
template <typename T, typename Tile, bool InPairs = RunningMax<T, Tile::kLanes>::kInPairs>
struct TileRowOf {
    using type = PoolRow<T, Tile::kReach, 1>;
};
template <typename T, typename Tile>
struct TileRowOf<T, Tile, true> {
    using type = PoolPairRow<T, Tile::kReach, Tile::kPad, Tile::kBody>;
};
template <typename T, typename Tile>
using TileRow = typename TileRowOf<T, Tile>::type;

// The largest of a row's taps, of each window of a tile of neighbours.
//   left      column of its first value
//   row_tap   number of the first tap in the row; beside the row values are -inf
template <typename T, typename Tile>
__device__ __forceinline__ RunningMax<T, Tile::kLanes> largest_of_taps(const TileRow<T, Tile>& row, int left,
                                                                       int row_tap) {
    using Best = RunningMax<T, Tile::kLanes>;
    Best best;
    int first[Tile::kLanes];
#pragma unroll
    for (int k = 0; k < Tile::kLanes; ++k) {
        const int offset = k * Tile::kStride;
        first[k] = row_tap + (offset < Tile::kPad ? max(-(left + offset), 0) : 0);
    }
#pragma unroll
    for (int kw = 0; kw < Tile::kKernel; ++kw) {
        const auto values = [&](int k) {
            if constexpr (Best::kInPairs) {
                return row.pair(2 * k * Tile::kStride + kw, (2 * k + 1) * Tile::kStride + kw);
            } else {
                return row.at[k * Tile::kStride + kw][0];
            }
        };
        if (kw == 0) {
            best.start(values, first);
        } else {
            best.take(values, row_tap + kw);
        }
    }
    return best;
}

// Values are pooled as they are.
struct AsTheyAre {
    template <typename T, int Width>
    struct OfTile {
        static constexpr bool kChanges = false;
        __device__ __forceinline__ OfTile(const AsTheyAre&, const PoolPosition<int>&) {}
    };
};

// As max_pool_forward, for height and width known when compiled. A row of taps has its largest first, which
// windows that overlap share.
//   x, y, argmax   as there; one byte a tap
//   strip          rows of outputs of a thread
//   change         what values become when they are read, once for each row of a tile: AsTheyAre, or what has
//                  OfTile<T, Width>, for the Width channels of a tile, with vector(Vector<T, Width>) and, of
//                  one channel, value(T) and pair(word of two half values)
//   Deep           windows have several taps along depth
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of outputs.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep,
          typename Change = AsTheyAre>
__device__ __forceinline__ void forward_strips(const T* x, T* y, unsigned char* argmax, int strip,
                                               const PoolWindow& window, const Change& change = {}) {
    using Changed = typename Change::template OfTile<T, ChannelsLast ? kVectorWidth<T> : 1>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kLanes = Tile::kLanes;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    accumulate_t<T> infinity;
    set_negative_infinity(infinity);
    const Vector<T, 1> outside = filled<T, 1>(from_accumulate<T>(infinity));
    using Best = RunningMax<T, kLanes>;
    constexpr bool kInPairs = Best::kInPairs;
    // Of wide windows moving rows is a tenth of the work. Older GPUs, and wider types, have no registers for
    // more than one output at a time.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kRound = 1;
#else
    constexpr int kRound = kInPairs && Kernel > 3 ? Kernel : 1;
#endif
    // Rows of neighbours that are read before the first is needed. What changes them, or many rows that are
    // carried, leave no registers for it; nor have older GPUs any.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    constexpr int kRowsTogether = 0;
#else
    constexpr int kRowsTogether = !ChannelsLast && Stride > 1 && !Changed::kChanges ? 4 : 0;
#endif
    // More would take too many registers.
    constexpr int kRowsAtOnce = ChannelsLast && Kernel > 2 ? 1 : Kernel;
    // Outputs one below the other whose rows are read together: of windows side by side.
    constexpr int kOutputs = Whole && Kernel == Stride && kRowsTogether > 0 ? kRowsTogether / Kernel : 1;
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const T* image = x + input.before(tile);
        const long long before = output.before(tile);
        const Changed changed(change, tile);
        const AxisTaps<int> depth(window, 0, tile.at[0], input.depth);
        const int column = tile.at[2] * kColumns, left = column * Stride - Pad;
        const int begin = tile.at[1] * strip, end = min(begin + strip, output.height);
        // Row h of the input, at depth d. Its taps are numbered as those of windows that begin in row `top`,
        // where they begin with first_tap. A tap outside the input is replaced by the nearest inside, value
        // and number: that one is seen twice, which changes nothing. Beside a row of channels first it is
        // -inf, which is never larger, with the number of the first tap inside.
        const auto nearest_row = [&](int h) { return min(max(h, 0), input.height - 1); };
        const auto read = [&](int d, int h) {
            TileRow<T, Tile> values;
            const T* start = image + input.row(d, nearest_row(h));
            if constexpr (kInPairs) {
                values.template load<Whole>(start, left, input.width, HalfPair<T>::kNegativeInfinity);
                if constexpr (Changed::kChanges) {
                    values.template change<Whole>(left, input.width,
                                                  [&](unsigned int word) { return changed.pair(word); });
                }
            } else {
                values.template load<Whole, Pad, Tile::kBody>(start, left, input.width, 1, true, outside);
                if constexpr (Changed::kChanges) {
                    values.template change<Whole, Pad, Tile::kBody>(
                        left, input.width, [&](T value) { return changed.value(value); });
                }
            }
            return values;
        };
        const auto row_max_of = [&](const TileRow<T, Tile>& values, int h, int top, int first_tap) {
            return largest_of_taps<T, Tile>(values, left, first_tap + (nearest_row(h) - top) * Kernel);
        };
        const auto row_max = [&](int d, int h, int top, int first_tap) {
            if constexpr (ChannelsLast) {
                const int nearest = nearest_row(h);
                const int row_tap = first_tap + (nearest - top) * Kernel;
                const T* start = image + input.row(d, nearest);
                int first[kLanes];
#pragma unroll
                for (int k = 0; k < kLanes; ++k) first[k] = row_tap + (Pad > 0 ? max(-left, 0) : 0);
                Best best;
#pragma unroll
                for (int kw = 0; kw < Kernel; ++kw) {
                    const int place = min(max(left + kw, 0), input.width - 1);
                    auto vector = Vector<T, kWidth>::load(start + place * input.groups * kWidth);
                    if constexpr (Changed::kChanges) vector = changed.vector(vector);
                    const auto values = Best::of(vector);
                    if (kw == 0) {
                        best.start(values, first);
                    } else {
                        best.take(values, row_tap + place - left);
                    }
                }
                return best;
            } else {
                return row_max_of(read(d, h), h, top, first_tap);
            }
        };
        const auto write = [&](int row, const Best& best) {
            const long long start = before + output.row(tile.at[0], row);
            store_tile<Whole, kWidth>(best.values(), y + start, column, output.width, output.groups);
            store_tile<Whole, kWidth>(best.taps(), argmax + start, column, output.width, output.groups);
        };
        if constexpr (!Deep) {
            // Taps are numbered as those of the strip's first window; or, where rows are moved anyway, of the
            // next.
            constexpr bool kRenumbers = Stride == 1 && kRound == 1;
            int top = begin * Stride - Pad;
            const int first_tap = first_tap_of<Kernel, Pad>(window, 0);
            const auto finish = [&](int row, Best(&rows)[Kernel]) {
                Best best = largest_of_rows<Stride>(rows, row == begin);
                if constexpr (kRenumbers) {
                    top += Stride;
#pragma unroll
                    for (int j = Stride; j < Kernel; ++j) rows[j].renumber(Stride * Kernel);
                } else {
                    best.renumber((row - begin) * Stride * Kernel);
                }
                write(row, best);
            };
            if constexpr (kRowsTogether > 0) {
                walk_down_together<Tile, Best, kRowsTogether>(
                    begin, end, [&](int h) { return read(depth.origin, h); },
                    [&](const auto& values, int h) { return row_max_of(values, h, top, first_tap); }, finish);
            } else {
                // What the tiles beside this one do not ask for; the first row is read at once.
                constexpr int kAsked = ChannelsLast ? Stride : 1;
                constexpr int kBytes = (ChannelsLast ? kWidth : Tile::kBody) * static_cast<int>(sizeof(T));
                const int vector = input.groups * kWidth,
                          place = max(min(column * Stride, input.width - kAsked), 0);
                const int asked = max(begin * Stride - Pad + 1, 0);
                int rows_asked = min((end - 1) * Stride - Pad + Kernel, input.height) - asked;
                if (!asks_for_sector((ChannelsLast ? tile.group : tile.at[2]) * kBytes, kBytes))
                    rows_asked = 0;
                RowsAhead<T, kAsked> ahead(image + input.row(depth.origin, asked) + place * vector,
                                           input.row(0, 1), input.width < kAsked ? 0 : vector, rows_asked);
                walk_down<Tile, Best, kRound>(
                    begin, end,
                    [&](int h) {
                        ahead.ask();
                        return row_max(depth.origin, h, top, first_tap);
                    },
                    finish);
            }
        } else {
#pragma unroll 1
            for (int begun = begin; begun < end; begun += kOutputs) {
                Best best[kOutputs];
                const int first[kLanes] = {};
#pragma unroll
                for (int u = 0; u < kOutputs; ++u) best[u].start_with_nothing(first);
#pragma unroll 1
                for (int kd = depth.begin; kd < depth.end; ++kd) {
                    const int d = depth.origin + kd * window.dilation[0];
                    const int first_tap = first_tap_of<Kernel, Pad>(window, kd);
                    const auto top = [&](int u) {
                        return (u == 0 ? begun : min(begun + u, end - 1)) * Stride - Pad;
                    };
                    const auto take = [&](int u, int j, const Best& row_best) {
                        if (kd == depth.begin && j == 0) {
                            best[u] = row_best;
                        } else {
                            best[u].take(row_best);
                        }
                    };
                    if constexpr (kOutputs > 1) {
                        TileRow<T, Tile> rows[kOutputs * Kernel];
#pragma unroll
                        for (int i = 0; i < kOutputs * Kernel; ++i)
                            rows[i] = read(d, top(i / Kernel) + i % Kernel);
#pragma unroll
                        for (int i = 0; i < kOutputs * Kernel; ++i) {
                            const int u = i / Kernel, j = i % Kernel;
                            take(u, j, row_max_of(rows[i], top(u) + j, top(u), first_tap));
                        }
                    } else {
#pragma unroll kRowsAtOnce
                        for (int j = 0; j < Kernel; ++j)
                            take(0, j, row_max(d, top(0) + j, top(0), first_tap));
                    }
                }
#pragma unroll
                for (int u = 0; u < kOutputs; ++u) {
                    if (u == 0 || begun + u < end) write(begun + u, best[u]);
                }
            }
        }
    });
}
