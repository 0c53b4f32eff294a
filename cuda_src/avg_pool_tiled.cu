// Average pooling with common windows: the kernels of avg_pool.cu, by tiles.
#include "pool_divisor.cuh"
#include "pool_tile.cuh"

// As avg_pool_forward, for height and width known when compiled.
//   x, y    as there
//   strip   rows of outputs of a thread
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of outputs.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void forward_strips(const T* x, T* y, int strip, const PoolWindow& window,
                                               const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    // More would take too many registers.
    constexpr int kRowsAtOnce = Kernel > 2 && (ChannelsLast || !Whole) ? 1 : Kernel;
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const T* image = x + input.before(tile);
        const long long before = output.before(tile);
        const AxisTaps<int> depth(window, 0, tile.at[0], input.depth);
        const int column = tile.at[2] * kColumns, left = column * Stride - Pad;
        const int end = min((tile.at[1] + 1) * strip, output.height);
#pragma unroll 1
        for (int row = tile.at[1] * strip; row < end; ++row) {
            const int top = row * Stride - Pad;
            A sum[kColumns][kWidth] = {};
#pragma unroll 1
            for (int kd = depth.begin; kd < depth.end; ++kd) {
                const int d = depth.origin + kd * window.dilation[0];
#pragma unroll kRowsAtOnce
                for (int kh = 0; kh < Kernel; ++kh) {
                    const int h = top + kh;
                    PoolRow<T, Tile::kReach, kWidth> values;
                    values.template load<Whole, Pad, Tile::kBody>(image + input.row(d, h), left, input.width,
                                                                  input.groups, h >= 0 && h < input.height,
                                                                  nothing);
#pragma unroll
                    for (int kw = 0; kw < Kernel; ++kw) {
#pragma unroll
                        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
                            for (int k = 0; k < kWidth; ++k)
                                sum[c][k] += to_accumulate(values.at[c * Stride + kw][k]);
                        }
                    }
                }
            }
            const int taps = divisor.template of_plane<Kernel>(window, tile.at[0], top);
            PoolRow<T, kColumns, kWidth> result;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const A factor = divisor.template of_few<Kernel>(window, taps, left + c * Stride);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) result.at[c][k] = from_accumulate<T>(sum[c][k] * factor);
            }
            result.template store<Whole>(y + before + output.row(tile.at[0], row), column, output.width,
                                         output.groups);
        }
    });
}

template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, 4)
    avg_pool_forward_tiled(const T* x, T* y, int strip, PoolWindow window,
                           PoolDivisor<accumulate_t<T>> divisor) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    if constexpr (!ChannelsLast) {
        if (whole_tiles(window, Tile::kBody, Tile::kColumns)) {
            forward_strips<true, T, Kernel, Stride, Pad, ChannelsLast>(x, y, strip, window, divisor);
            return;
        }
    }
    forward_strips<false, T, Kernel, Stride, Pad, ChannelsLast>(x, y, strip, window, divisor);
}

// As avg_pool_backward, for height and width known when compiled.
//   dy, dx   as there
//   strip    of a thread: so many times Stride rows of inputs
// Launch: as avg_pool_forward_tiled; units are strips of tiles of inputs, which no two threads share.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void backward_strips(const T* dy, T* dx, int strip, const PoolWindow& window,
                                                const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const long long before = output.before(tile);
        T* image = dx + input.before(tile);
        const int column = tile.at[2] * kColumns + Tile::kFirst;
        const int end = min((tile.at[1] + 1) * strip, (input.height + Stride - 1) / Stride);
#pragma unroll 1
        for (int block = tile.at[1] * strip; block < end; ++block) {
#pragma unroll
            for (int r = 0; r < Stride; ++r) {
                const int row = block * Stride + r;
                if (row >= input.height) break;
                A sum[kBody][kWidth] = {};
#pragma unroll 1
                for (int d = depth.last; d >= depth.first; --d) {
                    if (covering_tap(window, 0, tile.at[0], d) < 0) continue;
                    // In the order of the taps: from the last window to the first. A window beyond the ends
                    // has the gradient 0, and 0 is what comes of it with any factor.
#pragma unroll 1
                    for (int i = Tile::last_over(r); i >= Tile::first_over(r); --i) {
                        const int h = block + i;
                        PoolRow<T, Tile::kCovering, kWidth> gradients;
                        gradients.template load<Whole, -Tile::kFirst, kColumns>(
                            dy + before + output.row(d, h), column, output.width, output.groups,
                            h >= 0 && h < output.height, nothing);
                        const int taps = divisor.template of_plane<Kernel>(window, d, h * Stride - Pad);
#pragma unroll
                        for (int j = Tile::kCovering - 1; j >= 0; --j) {
                            const A factor =
                                divisor.template of_few<Kernel>(window, taps, (column + j) * Stride - Pad);
#pragma unroll
                            for (int c = 0; c < kBody; ++c) {
                                const int kw = c + Pad - (j + Tile::kFirst) * Stride;
                                if (kw < 0 || kw >= Kernel) continue;
#pragma unroll
                                for (int k = 0; k < kWidth; ++k)
                                    sum[c][k] = fma(to_accumulate(gradients.at[j][k]), factor, sum[c][k]);
                            }
                        }
                    }
                }
                PoolRow<T, kBody, kWidth> result;
#pragma unroll
                for (int c = 0; c < kBody; ++c) {
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) result.at[c][k] = from_accumulate<T>(sum[c][k]);
                }
                result.template store<Whole>(image + input.row(tile.at[0], row), tile.at[2] * kBody,
                                             input.width, input.groups);
            }
        }
    });
}

// As avg_pool_backward, for windows of Kernel x Kernel side by side, of which an input has at most one: each
// is read once, and all of its inputs written from there.
//   dy, dx   as there
//   strip    of a thread: so many times Kernel rows of inputs
// Launch: as backward_strips.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_strips(const T* dy, T* dx, int strip, const PoolWindow& window,
                                               const PoolDivisor<accumulate_t<T>>& divisor) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Kernel, 0, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
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
        const int end = min((tile.at[1] + 1) * strip, (input.height + Kernel - 1) / Kernel);
#pragma unroll 1
        for (int block = tile.at[1] * strip; block < end; ++block) {
            PoolRow<T, kColumns, kWidth> shares;
            const bool inside = deep && block < output.height;
            shares.template load<Whole, 0, kColumns>(dy + before + output.row(d, block), column, output.width,
                                                     output.groups, inside, nothing);
            const int taps =
                divisor.template of_plane<Kernel>(window, inside ? d : 0, inside ? block * Kernel : 0);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const A factor = divisor.template of_few<Kernel>(window, taps, (column + c) * Kernel);
#pragma unroll
                for (int k = 0; k < kWidth; ++k)
                    shares.at[c][k] = from_accumulate<T>(fma(to_accumulate(shares.at[c][k]), factor, A(0)));
            }
            PoolRow<T, kBody, kWidth> result;
#pragma unroll
            for (int c = 0; c < kBody; ++c) result.at[c] = shares.at[c / Kernel];
#pragma unroll
            for (int r = 0; r < Kernel; ++r) {
                const int row = block * Kernel + r;
                if (row >= input.height) break;
                result.template store<Whole>(image + input.row(tile.at[0], row), tile.at[2] * kBody,
                                             input.width, input.groups);
            }
        }
    });
}

// Either, whichever the windows are for.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void choose_backward(const T* dy, T* dx, int strip, const PoolWindow& window,
                                                const PoolDivisor<accumulate_t<T>>& divisor) {
    if constexpr (Kernel == Stride && Pad == 0) {
        scatter_strips<Whole, T, Kernel, ChannelsLast>(dy, dx, strip, window, divisor);
    } else {
        backward_strips<Whole, T, Kernel, Stride, Pad, ChannelsLast>(dy, dx, strip, window, divisor);
    }
}

template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, 4)
    avg_pool_backward_tiled(const T* dy, T* dx, int strip, PoolWindow window,
                            PoolDivisor<accumulate_t<T>> divisor) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    if constexpr (!ChannelsLast) {
        if (whole_tiles(window, Tile::kBody, Tile::kColumns)) {
            choose_backward<true, T, Kernel, Stride, Pad, ChannelsLast>(dy, dx, strip, window, divisor);
            return;
        }
    }
    choose_backward<false, T, Kernel, Stride, Pad, ChannelsLast>(dy, dx, strip, window, divisor);
}
