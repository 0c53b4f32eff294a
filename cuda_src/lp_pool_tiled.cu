// Power-average pooling of p = 1 and 2 with common windows: the kernels of lp_pool.cu, by tiles.
#include "pool_tile.cuh"
#include "power_rule.cuh"

// Whether squares may leave the range of the type that they are added in: those of half in float, and of
// float32 in double, do not.
template <typename T>
constexpr bool kScalesSquares = false;
template <>
constexpr bool kScalesSquares<__nv_bfloat16> = true;

// By what the values of a window are multiplied before they are squared: a power of two, which rounds
// nothing.
template <typename T>
struct SquareScale {
    using C = power_t<T>;
    C factor = C(1), inverse = C(1);

    //   largest   of the window; of no use where squares stay within the range
    __device__ __forceinline__ explicit SquareScale(C largest) {
        if constexpr (kScalesSquares<T>) {
            if (largest > C(0x1p60)) factor = C(0x1p-70), inverse = C(0x1p70);
            if (largest < C(0x1p-48)) factor = C(0x1p90), inverse = C(0x1p-90);
        }
    }
};

// The norm of a window, or its sum for p = 1, of values multiplied by scale.factor.
//   rows    of the window, whose columns begin at `first`
//   k       channel of the vectors
template <int Norm, typename T, int Kernel>
struct WindowNorm {
    using C = power_t<T>;
    SquareScale<T> scale;
    C norm = C(0);

    template <typename Row>
    __device__ __forceinline__ WindowNorm(const Row (&rows)[Kernel], int first, int k)
        : scale(largest(rows, first, k)) {
#pragma unroll
        for (int j = 0; j < Kernel; ++j) {
#pragma unroll
            for (int kw = 0; kw < Kernel; ++kw) {
                const C value = widened(rows[j].at[first + kw], k);
                if constexpr (Norm == 1) {
                    norm += fabs(value);
                } else {
                    const C scaled = kScalesSquares<T> ? value * scale.factor : value;
                    norm = fma(scaled, scaled, norm);
                }
            }
        }
        if constexpr (Norm == 2) norm = sqrt(norm);
    }

    template <typename Row>
    static __device__ __forceinline__ C largest(const Row (&rows)[Kernel], int first, int k) {
        C most = C(0);
        if constexpr (Norm == 2 && kScalesSquares<T>) {
#pragma unroll
            for (int j = 0; j < Kernel; ++j) {
#pragma unroll
                for (int kw = 0; kw < Kernel; ++kw)
                    most = fmax(most, fabs(C(widened(rows[j].at[first + kw], k))));
            }
        }
        return most;
    }

    __device__ __forceinline__ accumulate_t<T> value() const {
        return static_cast<accumulate_t<T>>(Norm == 2 && kScalesSquares<T> ? norm * scale.inverse : norm);
    }
};

// As lp_pool_forward, for windows of Kernel x Kernel side by side, of one tap along depth and none cut off.
//   x, y    as there
//   strip   rows of outputs of a thread
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of outputs.
template <bool Whole, int Norm, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void forward_strips(const T* x, T* y, int strip, const PoolWindow& window) {
    using Tile = PoolTile<T, Kernel, Kernel, 0, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    using Row = PoolRow<T, Tile::kBody, kWidth>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    constexpr int kAtOnce = ChannelsLast ? Kernel : 2 * Kernel;  // rows that are waited for
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const AxisTaps<int> depth(window, 0, tile.at[0], input.depth);
        const T* image = x + input.before(tile);
        T* target = y + output.before(tile);
        const int column = tile.at[2] * kColumns;
        const int begin = tile.at[1] * strip, end = min(begin + strip, output.height);
        walk_down_together<Tile, Row, kAtOnce>(
            begin, end,
            // One axis has a single row.
            [&](int h) {
                Row row;
                row.template load<Whole, 0, Tile::kBody>(image + input.row(depth.origin, h), column * Kernel,
                                                         input.width, input.groups, h < input.height,
                                                         nothing);
                return row;
            },
            [](const Row& row, int) { return row; },
            [&](int row, const Row(&rows)[Kernel]) {
                Vector<T, Tile::kLanes> result;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) {
                        const WindowNorm<Norm, T, Kernel> found(rows, c * Kernel, k);
                        result[c * kWidth + k] = from_accumulate<T>(found.value());
                    }
                }
                store_tile<Whole, kWidth>(result, target + output.row(tile.at[0], row), column, output.width,
                                          output.groups);
            });
    });
}

// As lp_pool_backward, for the same windows: an input is in at most one, whose norm is computed again.
//   dy, x, dx   as there
//   strip       of a thread: so many times Kernel rows of inputs
// Launch: as forward_strips; units are strips of tiles of inputs.
template <bool Whole, int Norm, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_strips(const T* dy, const T* x, T* dx, int strip,
                                               const PoolWindow& window) {
    using A = accumulate_t<T>;
    using C = power_t<T>;
    using Tile = PoolTile<T, Kernel, Kernel, 0, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const CoveringWindows<int> depth(window, 0, tile.at[0]);
        const int d = depth.last;
        const bool deep = d >= depth.first && covering_tap(window, 0, tile.at[0], d) >= 0;
        const T* gradient = dy + output.before(tile);
        const long long start = input.before(tile);
        const int column = tile.at[2] * kColumns, left = tile.at[2] * kBody;
        const int end = min((tile.at[1] + 1) * strip, (input.height + Kernel - 1) / Kernel);
#pragma unroll 1
        for (int block = tile.at[1] * strip; block < end; ++block) {
            const bool inside = deep && block < output.height;
            PoolRow<T, kColumns, kWidth> gradients;
            gradients.template load<Whole, 0, kColumns>(gradient + output.row(d, block), column, output.width,
                                                        output.groups, inside, nothing);
            PoolRow<T, kBody, kWidth> rows[Kernel];
#pragma unroll
            for (int j = 0; j < Kernel; ++j) {
                const int h = block * Kernel + j;
                rows[j].template load<Whole, 0, kBody>(x + start + input.row(tile.at[0], h), left,
                                                       input.width, input.groups, h < input.height, nothing);
            }
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const bool covered = inside && (Whole || column + c < output.width);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    C slope = C(1);
                    SquareScale<T> scale(slope);
                    if constexpr (Norm == 2) {
                        const WindowNorm<Norm, T, Kernel> found(rows, c * Kernel, k);
                        slope = C(1) / found.norm;
                        scale = found.scale;
                    }
#pragma unroll
                    for (int j = 0; j < Kernel; ++j) {
#pragma unroll
                        for (int kw = 0; kw < Kernel; ++kw) {
                            Vector<T, kWidth>& values = rows[j].at[c * Kernel + kw];
                            const A value = widened(values, k);
                            C part = slope;
                            if constexpr (Norm == 2)
                                part *= kScalesSquares<T> ? fabs(C(value)) * scale.factor : fabs(C(value));
                            // A sum, for it makes +0 of -0. Of no window it is 0, whatever the norm is.
                            const C sum = covered ? fma(C(widened(gradients.at[c], k)), part, C(0)) : C(0);
                            values[k] = from_accumulate<T>(signed_as(value, static_cast<A>(sum)));
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < Kernel; ++j) {
                const int h = block * Kernel + j;
                if (h >= input.height) break;
                rows[j].template store<Whole>(dx + start + input.row(tile.at[0], h), left, input.width,
                                              input.groups);
            }
        }
    });
}

// Calls run(whole, Constant<1>()) or run(whole, Constant<2>()), see by_whole_tiles.
template <typename Tile, typename Run>
__device__ __forceinline__ void by_power(int power, const PoolWindow& window, Run run) {
    if (power == 1) {
        by_whole_tiles<Tile>(window, [&](auto whole) { run(whole, Constant<1>()); });
    } else {
        by_whole_tiles<Tile>(window, [&](auto whole) { run(whole, Constant<2>()); });
    }
}

// Stride, Pad and Deep are as other tiled kernels have them.
//   power   1 or 2
// Launch: as forward_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, ChannelsLast ? kSideBySideBlocks : kPoolBlocks<int>)
    lp_pool_forward_tiled(const T* x, T* y, int strip, PoolWindow window, int power) {
    static_assert(Kernel == Stride && Pad == 0, "windows side by side");
    by_power<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(power, window, [&](auto whole, auto norm) {
        forward_strips<decltype(whole)::value, decltype(norm)::value, T, Kernel, ChannelsLast>(x, y, strip,
                                                                                               window);
    });
}

// Launch: as scatter_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<int>)
    lp_pool_backward_tiled(const T* dy, const T* x, T* dx, int strip, PoolWindow window, int power) {
    static_assert(Kernel == Stride && Pad == 0, "windows side by side");
    by_power<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(power, window, [&](auto whole, auto norm) {
        scatter_strips<decltype(whole)::value, decltype(norm)::value, T, Kernel, ChannelsLast>(dy, x, dx,
                                                                                               strip, window);
    });
}
