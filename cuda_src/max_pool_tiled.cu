// Max pooling with common windows: the kernels of max_pool.cu, by tiles.
#include "pool_tile.cuh"

// The largest of the values seen by each of Width windows, and their taps. The values stay what they are, so
// that a NaN keeps its bits.
template <typename T, int Width>
struct RunningMax {
    static constexpr bool kInPairs = false;
    T best[Width];
    int chosen[Width];

    //   first_tap   inside the input: what stays chosen where all are -inf
    __device__ __forceinline__ void start(const int (&first_tap)[Width]) {
        accumulate_t<T> infinity;
        set_negative_infinity(infinity);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            best[k] = from_accumulate<T>(infinity);
            chosen[k] = first_tap[k];
        }
    }
    //   values   value number k
    template <typename Values>
    __device__ __forceinline__ void take(Values values, int tap) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const T taken = values(k);
            const accumulate_t<T> value = to_accumulate(taken);
            if (value > to_accumulate(best[k]) || value != value) {
                best[k] = taken;
                chosen[k] = tap;
            }
        }
    }
    __device__ __forceinline__ T value(int k) const { return best[k]; }
    __device__ __forceinline__ unsigned char tap(int k) const {
        return static_cast<unsigned char>(chosen[k]);
    }
};

template <typename T>
struct HalfPair;
template <>
struct HalfPair<__half> {
    using type = __half2;
    static constexpr unsigned int kNegativeInfinity = 0xfc00fc00;
};
template <>
struct HalfPair<__nv_bfloat16> {
    using type = __nv_bfloat162;
    static constexpr unsigned int kNegativeInfinity = 0xff80ff80;
};

// Two half values at a time: a comparison makes a mask, a mask chooses values and taps.
template <typename T, int Width>
struct RunningPairMax {
    static constexpr bool kInPairs = true;
    static constexpr int kPairs = Width / 2;
    unsigned int best[kPairs], chosen[kPairs];

    static __device__ __forceinline__ typename HalfPair<T>::type as_pair(unsigned int bits) {
        typename HalfPair<T>::type pair;
        memcpy(&pair, &bits, sizeof(pair));
        return pair;
    }
    __device__ __forceinline__ void start(const int (&first_tap)[Width]) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            best[k] = HalfPair<T>::kNegativeInfinity;
            chosen[k] = first_tap[2 * k] | static_cast<unsigned int>(first_tap[2 * k + 1]) << 16;
        }
    }
    //   pairs   pair number k in a word
    template <typename Pairs>
    __device__ __forceinline__ void take(Pairs pairs, int tap) {
        const unsigned int taps = tap * 0x10001u;
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            const unsigned int bits = pairs(k);
            const typename HalfPair<T>::type pair = as_pair(bits);
            const unsigned int mask = __hgt2_mask(pair, as_pair(best[k])) | __hneu2_mask(pair, pair);
            best[k] = (bits & mask) | (best[k] & ~mask);
            chosen[k] = (taps & mask) | (chosen[k] & ~mask);
        }
    }
    __device__ __forceinline__ T value(int k) const {
        const unsigned short bits = static_cast<unsigned short>(best[k / 2] >> (k % 2 * 16));
        T half;
        memcpy(&half, &bits, sizeof(half));
        return half;
    }
    __device__ __forceinline__ unsigned char tap(int k) const {
        return static_cast<unsigned char>(chosen[k / 2] >> (k % 2 * 16));
    }
};
template <int Width>
struct RunningMax<__half, Width> : RunningPairMax<__half, Width> {};
// Of bfloat16 these are instructions since compute capability 9.0 only.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <int Width>
struct RunningMax<__nv_bfloat16, Width> : RunningPairMax<__nv_bfloat16, Width> {};
#endif

// Number of the tap in row 0 and column 0 of a window, in depth kd; less for one axis, whose taps are a row.
template <int Kernel, int Pad>
__device__ __forceinline__ int first_tap_of(const PoolWindow& window, int kd) {
    return kd * Kernel * Kernel - (window.kernel[1] < Kernel ? Pad * Kernel : 0);
}

// As max_pool_forward, for height and width known when compiled.
//   x, y, taps   as there; one byte a tap
//   strip        rows of outputs of a thread
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are strips of tiles of outputs.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void forward_strips(const T* x, T* y, unsigned char* taps, int strip,
                                               const PoolWindow& window) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kLanes = Tile::kLanes;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    accumulate_t<T> infinity;
    set_negative_infinity(infinity);
    const Vector<T, kWidth> outside = filled<T, kWidth>(from_accumulate<T>(infinity));
    constexpr bool kInPairs = RunningMax<T, kLanes>::kInPairs;
    // More would take too many registers.
    constexpr int kRowsAtOnce = ChannelsLast && Kernel > 2 ? 1 : Kernel;
    for_each_unit<int>(window, [&](const PoolPosition<int>& tile, long long) {
        const T* image = x + input.before(tile);
        const long long before = output.before(tile);
        const AxisTaps<int> depth(window, 0, tile.at[0], input.depth);
        const int column = tile.at[2] * kColumns, left = column * Stride - Pad;
        const int end = min((tile.at[1] + 1) * strip, output.height);
#pragma unroll 1
        for (int row = tile.at[1] * strip; row < end; ++row) {
            const int top = row * Stride - Pad;
            int first[kLanes];
#pragma unroll
            for (int k = 0; k < kLanes; ++k) {
                const int begin = left + (ChannelsLast ? 0 : k * Stride);
                first[k] = depth.begin < depth.end ? first_tap_of<Kernel, Pad>(window, depth.begin) +
                                                         max(-top, 0) * Kernel + max(-begin, 0)
                                                   : 0;
            }
            RunningMax<T, kLanes> running;
            running.start(first);
#pragma unroll 1
            for (int kd = depth.begin; kd < depth.end; ++kd) {
                const int d = depth.origin + kd * window.dilation[0];
                const int first_tap = first_tap_of<Kernel, Pad>(window, kd);
#pragma unroll kRowsAtOnce
                for (int kh = 0; kh < Kernel; ++kh) {
                    const int h = top + kh;
                    // What is outside, -inf, is never larger.
                    const bool inside = h >= 0 && h < input.height;
                    const T* start = image + input.row(d, h);
                    if constexpr (kInPairs && !ChannelsLast) {
                        PoolPairRow<T, Tile::kReach, Pad, Tile::kBody> values;
                        values.template load<Whole>(start, left, input.width, inside,
                                                    HalfPair<T>::kNegativeInfinity);
#pragma unroll
                        for (int kw = 0; kw < Kernel; ++kw) {
                            const auto pairs = [&](int k) {
                                return values.pair(2 * k * Stride + kw, (2 * k + 1) * Stride + kw);
                            };
                            running.take(pairs, first_tap + kh * Kernel + kw);
                        }
                    } else {
                        PoolRow<T, Tile::kReach, kWidth> values;
                        values.template load<Whole, Pad, Tile::kBody>(start, left, input.width, input.groups,
                                                                      inside, outside);
#pragma unroll
                        for (int kw = 0; kw < Kernel; ++kw) {
                            const auto lanes = [&](int k) {
                                if constexpr (kInPairs) {
                                    return reinterpret_cast<const unsigned int*>(values.at[kw].words)[k];
                                } else {
                                    return values.at[k / kWidth * Stride + kw][k % kWidth];
                                }
                            };
                            running.take(lanes, first_tap + kh * Kernel + kw);
                        }
                    }
                }
            }
            PoolRow<T, kColumns, kWidth> result;
            PoolRow<unsigned char, kColumns, kWidth> chosen;
#pragma unroll
            for (int k = 0; k < kLanes; ++k) {
                result.at[k / kWidth][k % kWidth] = running.value(k);
                chosen.at[k / kWidth][k % kWidth] = running.tap(k);
            }
            const long long start = before + output.row(tile.at[0], row);
            result.template store<Whole>(y + start, column, output.width, output.groups);
            chosen.template store<Whole>(taps + start, column, output.width, output.groups);
        }
    });
}

template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, 4)
    max_pool_forward_tiled(const T* x, T* y, unsigned char* taps, int strip, PoolWindow window) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    if constexpr (!ChannelsLast) {
        if (whole_tiles(window, Tile::kBody, Tile::kColumns)) {
            forward_strips<true, T, Kernel, Stride, Pad, ChannelsLast>(x, y, taps, strip, window);
            return;
        }
    }
    forward_strips<false, T, Kernel, Stride, Pad, ChannelsLast>(x, y, taps, strip, window);
}

// As max_pool_backward, for height and width known when compiled.
//   dy, taps, dx   as there; one byte a tap
//   strip          of a thread: so many times Stride rows of inputs
// Launch: as max_pool_forward_tiled; units are strips of tiles of inputs, which no two threads share.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void backward_strips(const T* dy, const unsigned char* taps, T* dx, int strip,
                                                const PoolWindow& window) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kBody = Tile::kBody;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane input(window.input, window.groups), output(window.output, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    const Vector<unsigned char, kWidth> no_tap = filled<unsigned char, kWidth>(255);
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
                    const int kd = covering_tap(window, 0, tile.at[0], d);
                    if (kd < 0) continue;
                    // In the order of the taps: from the last window to the first.
#pragma unroll 1
                    for (int i = Tile::last_over(r); i >= Tile::first_over(r); --i) {
                        const int h = block + i;
                        const bool inside = h >= 0 && h < output.height;
                        const long long start = before + output.row(d, h);
                        const int first_tap =
                            first_tap_of<Kernel, Pad>(window, kd) + (r + Pad - i * Stride) * Kernel;
                        PoolRow<T, Tile::kCovering, kWidth> gradients;
                        PoolRow<unsigned char, Tile::kCovering, kWidth> chosen;
                        gradients.template load<Whole, -Tile::kFirst, kColumns>(
                            dy + start, column, output.width, output.groups, inside, nothing);
                        chosen.template load<Whole, -Tile::kFirst, kColumns>(
                            taps + start, column, output.width, output.groups, inside, no_tap);
#pragma unroll
                        for (int j = Tile::kCovering - 1; j >= 0; --j) {
#pragma unroll
                            for (int c = 0; c < kBody; ++c) {
                                const int kw = c + Pad - (j + Tile::kFirst) * Stride;
                                if (kw < 0 || kw >= Kernel) continue;
#pragma unroll
                                for (int k = 0; k < kWidth; ++k) {
                                    if (chosen.at[j][k] == first_tap + kw)
                                        sum[c][k] += to_accumulate(gradients.at[j][k]);
                                }
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

// As max_pool_backward, for windows of Kernel x Kernel side by side, of which an input has at most one: each
// is read once, and all of its inputs written from there.
//   dy, taps, dx   as there; one byte a tap
//   strip          of a thread: so many times Kernel rows of inputs
// Launch: as backward_strips.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_strips(const T* dy, const unsigned char* taps, T* dx, int strip,
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
            chosen.template load<Whole, 0, kColumns>(taps + start, column, output.width, output.groups,
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

// Either, whichever the windows are for.
template <bool Whole, typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__device__ __forceinline__ void choose_backward(const T* dy, const unsigned char* taps, T* dx, int strip,
                                                const PoolWindow& window) {
    if constexpr (Kernel == Stride && Pad == 0) {
        scatter_strips<Whole, T, Kernel, ChannelsLast>(dy, taps, dx, strip, window);
    } else {
        backward_strips<Whole, T, Kernel, Stride, Pad, ChannelsLast>(dy, taps, dx, strip, window);
    }
}

template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, 4)
    max_pool_backward_tiled(const T* dy, const unsigned char* taps, T* dx, int strip, PoolWindow window) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    if constexpr (!ChannelsLast) {
        if (whole_tiles(window, Tile::kBody, Tile::kColumns)) {
            choose_backward<true, T, Kernel, Stride, Pad, ChannelsLast>(dy, taps, dx, strip, window);
            return;
        }
    }
    choose_backward<false, T, Kernel, Stride, Pad, ChannelsLast>(dy, taps, dx, strip, window);
}
