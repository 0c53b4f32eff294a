// Average pooling with common windows: the kernels of avg_pool.cu, by tiles.
#include "pool_divisor.cuh"
#include "pool_tile.cuh"

// As avg_pool_forward, for height and width known when compiled. Windows that overlap share the sums of rows.
//   x, y    as there
//   strip   rows of outputs of a thread
//   Deep    windows have several taps along depth
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of outputs.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__device__ __forceinline__ void forward_strips(const T* x, T* y, int strip, const PoolWindow& window,
                                               const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    using Row = PoolRow<T, Tile::kReach, kWidth>;
    using Sums = RowSums<A, kColumns, kWidth>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    // Rows of a window, and windows one below the other, that are waited for at once. More would take too
    // many registers.
    constexpr int kAtOnce = Kernel > 2 && (ChannelsLast || !Whole) ? 1 : Kernel;
    constexpr int kOutputs = Kernel == Stride && !ChannelsLast && Whole ? 2 : 1;
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const T* image = x + input.before(tile);
        const long long before = output.before(tile);
        const AxisTaps<int> depth(window, 0, tile.at[0], input.depth);
        const int column = tile.at[2] * kColumns, left = column * Stride - Pad;
        const int begin = tile.at[1] * strip, end = min(begin + strip, output.height);
        int across[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            across[c] = divisor.template of_column<Kernel>(window, left + c * Stride);
        // Row h of the input, at depth d, and the sums of its taps.
        const auto read = [&](int d, int h) {
            Row values;
            values.template load<Whole, Pad, Tile::kBody>(image + input.row(d, h), left, input.width,
                                                          input.groups, h >= 0 && h < input.height, nothing);
            return values;
        };
        const auto sums_of = [&](const Row& values) {
            Sums sums;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    sums.at[c][k] = widened(values.at[c * Stride], k);
#pragma unroll
                    for (int kw = 1; kw < Kernel; ++kw)
                        sums.at[c][k] += widened(values.at[c * Stride + kw], k);
                }
            }
            return sums;
        };
        const auto write = [&](int row, const Sums& sums) {
            const int taps = divisor.template of_plane<Kernel>(window, tile.at[0], row * Stride - Pad);
            Vector<T, Tile::kLanes> result;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const A factor = divisor.of_few(taps, across[c]);
#pragma unroll
                for (int k = 0; k < kWidth; ++k)
                    result[c * kWidth + k] = from_accumulate<T>(sums.at[c][k] * factor);
            }
            store_tile<Whole, kWidth>(result, y + before + output.row(tile.at[0], row), column, output.width,
                                      output.groups);
        };
        if constexpr (!Deep) {
            walk_down<Tile, Sums>(
                begin, end, [&](int h) { return sums_of(read(depth.origin, h)); },
                [&](int row, const Sums(&rows)[Kernel]) {
                    Sums sums = {};
#pragma unroll
                    for (int j = 0; j < Kernel; ++j) sums.add(rows[j]);
                    write(row, sums);
                });
        } else {
#pragma unroll 1
            for (int first = begin; first < end; first += kOutputs) {
                Sums sums[kOutputs] = {};
#pragma unroll 1
                for (int kd = depth.begin; kd < depth.end; ++kd) {
                    const int d = depth.origin + kd * window.dilation[0];
#pragma unroll 1
                    for (int begun = 0; begun < Kernel; begun += kAtOnce) {
                        Row rows[kOutputs][kAtOnce];
#pragma unroll
                        for (int i = 0; i < kOutputs * kAtOnce; ++i)
                            rows[i / kAtOnce][i % kAtOnce] = read(
                                d, min(first + i / kAtOnce, end - 1) * Stride - Pad + begun + i % kAtOnce);
#pragma unroll
                        for (int i = 0; i < kOutputs * kAtOnce; ++i)
                            sums[i / kAtOnce].add(sums_of(rows[i / kAtOnce][i % kAtOnce]));
                    }
                }
#pragma unroll
                for (int u = 0; u < kOutputs; ++u) {
                    if (u == 0 || first + u < end) write(first + u, sums[u]);
                }
            }
        }
    });
}

// Launch: as forward_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<int>)
    avg_pool_forward_tiled(const T* x, T* y, int strip, PoolWindow window,
                           PoolDivisor<accumulate_t<T>> divisor) {
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        forward_strips<decltype(whole)::value, T, Kernel, Stride, Pad, ChannelsLast, Deep>(x, y, strip,
                                                                                           window, divisor);
    });
}

// As avg_pool_backward, for height and width known when compiled.
//   dy, dx   as there
//   strip    of a thread: so many times Stride rows of inputs
//   Deep     an input may be in several windows along depth
// Launch: as avg_pool_forward_tiled; units are strips of tiles of inputs, which no two threads share.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__device__ __forceinline__ void gather_strips(const T* dy, T* dx, int strip, const PoolWindow& window,
                                              const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    using Sums = RowSums<A, kBody, kWidth>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const long long before = output.before(tile);
        T* image = dx + input.before(tile);
        const int column = tile.at[2] * kColumns + Tile::kFirst;
        const int begin = tile.at[1] * strip;
        const int end = min(begin + strip, (input.height + Stride - 1) / Stride);
        int across[Tile::kCovering];
#pragma unroll
        for (int j = 0; j < Tile::kCovering; ++j)
            across[j] = divisor.template of_column<Kernel>(window, (column + j) * Stride - Pad);
        // What the windows of row h, at depth d, give to each row of inputs that they are over. A window
        // beyond the ends has the gradient 0, and 0 is what comes of it with any factor.
        const auto row_shares = [&](int d, int h, bool inside) {
            PoolRow<T, Tile::kCovering, kWidth> gradients;
            gradients.template load<Whole, -Tile::kFirst, kColumns>(
                dy + before + output.row(d, h), column, output.width, output.groups,
                inside && h >= 0 && h < output.height, nothing);
            const int taps = divisor.template of_plane<Kernel>(window, d, h * Stride - Pad);
            Sums sums;
#pragma unroll
            for (int j = Tile::kCovering - 1; j >= 0; --j) {
                const A factor = divisor.of_few(taps, across[j]);
                A shares[kWidth];
#pragma unroll
                for (int k = 0; k < kWidth; ++k) shares[k] = widened(gradients.at[j], k) * factor;
#pragma unroll
                for (int c = 0; c < kBody; ++c) {
                    const int kw = c + Pad - (j + Tile::kFirst) * Stride;
                    if (kw < 0 || kw >= Kernel) continue;
                    // The last window over the column is the first to come.
                    const bool first = j == Tile::kCovering - 1 || kw < Stride;
#pragma unroll
                    for (int k = 0; k < kWidth; ++k)
                        sums.at[c][k] = first ? shares[k] : sums.at[c][k] + shares[k];
                }
            }
            return sums;
        };
        const auto write = [&](int row, int, const Sums& sums) {
            store_sums<Whole>(sums, image + input.row(tile.at[0], row), tile.at[2] * kBody, input.width,
                              input.groups);
        };
        if constexpr (!Deep) {
            const int d = depth.last;
            const bool deep = d >= depth.first && covering_tap(window, 0, tile.at[0], d) >= 0;
            gather_up<Tile, Sums>(
                begin, end, input.height, [&](int h) { return row_shares(d, h, deep); },
                [&](const Sums& shares, int, int, Sums& sums) { sums.add(shares); }, write);
        } else {
            for_each_row<Tile>(begin, end, input.height, [&](int block, int r, int row) {
                Sums sums = {};
#pragma unroll 1
                for (int d = depth.last; d >= depth.first; --d) {
                    if (covering_tap(window, 0, tile.at[0], d) < 0) continue;
                    // In the order of the taps: from the last window to the first.
#pragma unroll 1
                    for (int i = Tile::last_over(r); i >= Tile::first_over(r); --i)
                        sums.add(row_shares(d, block + i, true));
                }
                write(row, r, sums);
            });
        }
    });
}

// As avg_pool_backward, for windows of Kernel x Kernel side by side. An input is in at most one of them: each
// is read once, and all of its inputs written from there.
//   dy, dx   as there
//   strip    of a thread: so many times Kernel rows of inputs
// Launch: as gather_strips.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_strips(const T* dy, T* dx, int strip, const PoolWindow& window,
                                               const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Kernel, 0, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    constexpr int kTogether = ChannelsLast ? 1 : 2;  // rows of windows that are waited for at once
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const int d = depth.last;
        const bool deep = d >= depth.first && covering_tap(window, 0, tile.at[0], d) >= 0;
        const long long before = output.before(tile);
        T* image = dx + input.before(tile);
        const int column = tile.at[2] * kColumns;
        int across[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            across[c] = divisor.template of_column<Kernel>(window, (column + c) * Kernel);
        const int end = min((tile.at[1] + 1) * strip, (input.height + Kernel - 1) / Kernel);
#pragma unroll 1
        for (int first = tile.at[1] * strip; first < end; first += kTogether) {
            PoolRow<T, kColumns, kWidth> shares[kTogether];
            const auto exists = [&](int u) { return u == 0 || first + u < end; };
            const auto is_window = [&](int u) { return deep && exists(u) && first + u < output.height; };
#pragma unroll
            for (int u = 0; u < kTogether; ++u)
                shares[u].template load<Whole, 0, kColumns>(dy + before + output.row(d, first + u), column,
                                                            output.width, output.groups, is_window(u),
                                                            nothing);
#pragma unroll
            for (int u = 0; u < kTogether; ++u) {
                if (!exists(u)) break;
                const int block = first + u;
                const bool inside = is_window(u);
                const int taps =
                    divisor.template of_plane<Kernel>(window, inside ? d : 0, inside ? block * Kernel : 0);
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    const A factor = divisor.of_few(taps, across[c]);
#pragma unroll
                    for (int k = 0; k < kWidth; ++k)
                        shares[u].at[c][k] =
                            from_accumulate<T>(fma(to_accumulate(shares[u].at[c][k]), factor, A(0)));
                }
                PoolRow<T, kBody, kWidth> result;
#pragma unroll
                for (int c = 0; c < kBody; ++c) result.at[c] = shares[u].at[c / Kernel];
#pragma unroll
                for (int r = 0; r < Kernel; ++r) {
                    const int row = block * Kernel + r;
                    if (row >= input.height) break;
                    result.template store<Whole>(image + input.row(tile.at[0], row), tile.at[2] * kBody,
                                                 input.width, input.groups);
                }
            }
        }
    });
}

// Blocks that must fit on a multiprocessor at once.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
constexpr int kBackwardBlocks =
    Kernel == Stride && !ChannelsLast ? kSideBySideBlocks
                                      : PoolTile<T, Kernel, Stride, Pad, ChannelsLast>::kGatherBlocks;

// Either of the two, whichever the windows are for.
// Launch: as gather_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, (kBackwardBlocks<T, Kernel, Stride, Pad, ChannelsLast>))
    avg_pool_backward_tiled(const T* dy, T* dx, int strip, PoolWindow window,
                            PoolDivisor<accumulate_t<T>> divisor) {
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        if constexpr (Kernel == Stride && Pad == 0) {
            scatter_strips<kWhole, T, Kernel, ChannelsLast>(dy, dx, strip, window, divisor);
        } else {
            gather_strips<kWhole, T, Kernel, Stride, Pad, ChannelsLast, Deep>(dy, dx, strip, window, divisor);
        }
    });
}
