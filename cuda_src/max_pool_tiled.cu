// Max pooling with common windows: the kernels of max_pool.cu, by tiles (the picture is in pool_tile.cuh).
//
// Forward, a row of taps has its largest first, and windows that overlap share it (max_pool_tile.cuh).
// Backward there are two ways:
//   gather_strips    windows that overlap: a tile of inputs looks at the windows over it
//   scatter_strips   windows side by side: a tile of windows writes the inputs that are theirs
#include "max_pool_tile.cuh"

// Blocks that must fit on a multiprocessor at once: threads keep the largest of a row for each row of a
// window. With four, what Blackwell's code for deep windows needs would be spilled.
template <int Kernel, bool ChannelsLast, bool Deep>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kForwardBlocks = Kernel > 3 ? 2 : 4;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
constexpr int kForwardBlocks = Kernel > 3 ? (ChannelsLast ? 2 : 3) : 4;
#else
constexpr int kForwardBlocks = Kernel > 3 ? 2 : (Deep && !ChannelsLast ? 3 : 4);
#endif

// Launch: as forward_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, (kForwardBlocks<Kernel, ChannelsLast, Deep>))
    max_pool_forward_tiled(const T* x, T* y, unsigned char* argmax, int strip, PoolWindow window) {
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        forward_strips<decltype(whole)::value, T, Kernel, Stride, Pad, ChannelsLast, Deep>(x, y, argmax,
                                                                                           strip, window);
    });
}

// As max_pool_backward. Up its strip a thread takes each row of windows once, and adds the gradients of those
// whose tap is the input's to the rows of inputs that they are over.
//   dy, argmax, dx   as there; one byte a tap
//   strip            of a thread: so many times Stride rows of inputs
//   Deep             an input may be in several windows along depth: rows are taken again for each
// Launch: as max_pool_forward_tiled; units are strips of tiles of inputs, which no two threads share.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__device__ __forceinline__ void gather_strips(const T* dy, const unsigned char* argmax, T* dx, int strip,
                                              const PoolWindow& window) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    using Sums = RowSums<accumulate_t<T>, kBody, kWidth>;
    struct Chosen {
        accumulate_t<T> gradients[Tile::kCovering][kWidth];
        PoolRow<unsigned char, Tile::kCovering, kWidth> taps;
    };
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    const Vector<unsigned char, kWidth> no_tap = filled<unsigned char, kWidth>(255);
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const long long before = output.before(tile);
        T* image = dx + input.before(tile);
        const int column = tile.at[2] * kColumns + Tile::kFirst;
        const int begin = tile.at[1] * strip;
        const int end = min(begin + strip, (input.height + Stride - 1) / Stride);
        const auto load = [&](int d, int h, bool inside) {
            const long long start = before + output.row(d, h);
            inside = inside && h >= 0 && h < output.height;
            PoolRow<T, Tile::kCovering, kWidth> gradients;
            gradients.template load<Whole, -Tile::kFirst, kColumns>(dy + start, column, output.width,
                                                                    output.groups, inside, nothing);
            Chosen row;
#pragma unroll
            for (int j = 0; j < Tile::kCovering; ++j) {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) row.gradients[j][k] = widened(gradients.at[j], k);
            }
            row.taps.template load<Whole, -Tile::kFirst, kColumns>(argmax + start, column, output.width,
                                                                   output.groups, inside, no_tap);
            return row;
        };
        // Adds to a row of inputs what a row of windows gives it, whose taps in that row begin with
        // first_tap.
        const auto add = [&](const Chosen& row, int first_tap, Sums& sums) {
#pragma unroll
            for (int j = Tile::kCovering - 1; j >= 0; --j) {
#pragma unroll
                for (int c = 0; c < kBody; ++c) {
                    const int kw = c + Pad - (j + Tile::kFirst) * Stride;
                    if (kw < 0 || kw >= Kernel) continue;
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) {
                        if (is_tap(row.taps.at[j], k, first_tap + kw)) sums.at[c][k] += row.gradients[j][k];
                    }
                }
            }
        };
        const auto write = [&](int row, const Sums& sums) {
            store_sums<Whole>(sums, image + input.row(tile.at[0], row), tile.at[2] * kBody, input.width,
                              input.groups);
        };
        if constexpr (!Deep) {
            const int kd = depth.last < depth.first ? -1 : covering_tap(window, 0, tile.at[0], depth.last);
            const int first_tap = first_tap_of<Kernel, Pad>(window, kd);
            // Rows of windows further up, where there are registers; the first row is read at once.
            constexpr bool kAsks = !ChannelsLast || Tile::kGatherBlocks == 2;
            const int asked = min(end - 1 + Tile::kLast, output.height - 1);
            const long long first_asked = before + output.row(max(depth.last, 0), asked - 1) +
                                          max(min(column, output.width - 1), 0) * (output.groups * kWidth);
            const int rows_asked = kAsks ? asked - max(begin + Tile::kFirst, 0) : 0;
            constexpr int kLanes = ChannelsLast ? kWidth : kColumns;
            const int lane = ChannelsLast ? tile.group : tile.at[2];
            const auto rows_of = [&](int bytes) {
                return asks_for_sector(lane * kLanes * bytes, kLanes * bytes) ? rows_asked : 0;
            };
            RowsAhead<T, 1> gradients_ahead(dy + first_asked, -output.row(0, 1), 0,
                                            rows_of(static_cast<int>(sizeof(T))));
            RowsAhead<unsigned char, 1> taps_ahead(argmax + first_asked, -output.row(0, 1), 0, rows_of(1));
            gather_up<Tile, Sums>(
                begin, end, input.height,
                [&](int h) {
                    if constexpr (kAsks) {
                        gradients_ahead.ask();
                        taps_ahead.ask();
                    }
                    return load(depth.last, h, kd >= 0);
                },
                [&](const Chosen& row, int kh, Sums& sums) { add(row, first_tap + kh * Kernel, sums); },
                write);
        } else {
            for_each_row<Tile>(begin, end, input.height, [&](int block, int r, int row) {
                Sums sums = {};
#pragma unroll 1
                for (int d = depth.last; d >= depth.first; --d) {
                    const int kd = covering_tap(window, 0, tile.at[0], d);
                    if (kd < 0) continue;
                    const int first_tap = first_tap_of<Kernel, Pad>(window, kd);
                    // In the order of the taps: from the last window to the first.
#pragma unroll 1
                    for (int i = Tile::last_over(r); i >= Tile::first_over(r); --i)
                        add(load(d, block + i, true), first_tap + (r + Pad - i * Stride) * Kernel, sums);
                }
                write(row, sums);
            });
        }
    });
}

// As max_pool_backward, for windows of Kernel x Kernel side by side. An input is in at most one: each window
// is read once, and all of its inputs are written from there.
//   dy, argmax, dx   as there; one byte a tap
//   strip            of a thread: so many times Kernel rows of inputs
// Launch: as gather_strips.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_strips(const T* dy, const unsigned char* argmax, T* dx, int strip,
                                               const PoolWindow& window) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Kernel, 0, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    const Vector<unsigned char, kWidth> no_tap = filled<unsigned char, kWidth>(255);
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const int kd = depth.last < depth.first ? -1 : covering_tap(window, 0, tile.at[0], depth.last);
        const int first_tap = first_tap_of<Kernel, 0>(window, kd);
        const long long before = output.before(tile);
        T* image = dx + input.before(tile);
        const int column = tile.at[2] * kColumns;
        const int end = min((tile.at[1] + 1) * strip, (input.height + Kernel - 1) / Kernel);
#pragma unroll 1
        for (int block = tile.at[1] * strip; block < end; ++block) {
            const bool inside = kd >= 0 && block < output.height;
            const long long start = before + output.row(depth.last, block);
            PoolRow<T, kColumns, kWidth> gradients;
            PoolRow<unsigned char, kColumns, kWidth> chosen;
            gradients.template load<Whole, 0, kColumns>(dy + start, column, output.width, output.groups,
                                                        inside, nothing);
            chosen.template load<Whole, 0, kColumns>(argmax + start, column, output.width, output.groups,
                                                     inside, no_tap);
#pragma unroll
            for (int r = 0; r < Kernel; ++r) {
                const int row = block * Kernel + r;
                if (row >= input.height) break;
                PoolRow<T, kBody, kWidth> result;
#pragma unroll
                for (int c = 0; c < kBody; ++c) {
                    const int tap = first_tap + r * Kernel + c % Kernel;
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) {
                        // A sum, for it makes +0 of -0.
                        const A gradient = to_accumulate(gradients.at[c / Kernel][k]) + A(0);
                        result.at[c][k] =
                            from_accumulate<T>(chosen.at[c / Kernel][k] == tap ? gradient : A(0));
                    }
                }
                result.template store<Whole>(image + input.row(tile.at[0], row), tile.at[2] * kBody,
                                             input.width, input.groups);
            }
        }
    });
}

// Either of the two, whichever the windows are for.
// Launch: as gather_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads,
                                  (PoolTile<T, Kernel, Stride, Pad, ChannelsLast>::kGatherBlocks))
    max_pool_backward_tiled(const T* dy, const unsigned char* argmax, T* dx, int strip, PoolWindow window) {
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        if constexpr (Kernel == Stride && Pad == 0) {
            scatter_strips<kWhole, T, Kernel, ChannelsLast>(dy, argmax, dx, strip, window);
        } else {
            gather_strips<kWhole, T, Kernel, Stride, Pad, ChannelsLast, Deep>(dy, argmax, dx, strip, window);
        }
    });
}
