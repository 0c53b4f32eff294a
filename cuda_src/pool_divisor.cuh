// What the sum of an averaging window is divided by.
#pragma once

#include "pool_window.cuh"

// Windows of fewer taps than this have their reciprocals made by the host.
constexpr int kReciprocals = 128;

// 1 / divisor of each window; few need a division.
//   const PoolExtent<Index> extent(window, lengths, sample);
//   y = from_accumulate<T>(sum * divisor.of(window, output.at, extent));  // output.at: depth, height, width
template <typename A>
struct PoolDivisor {
    A reciprocal;        // of the divisor of a window with `count` taps, or of every window
    int count;           // 0: every window has the same divisor; -1: more taps than an int counts
    int padding_counts;  // whether taps in the padding count
    int pad_after[3];
    A reciprocals[kReciprocals];  // of the numbers of taps; of no taps, 1

    // Taps of a window along one axis that count.
    template <typename Index>
    __device__ __forceinline__ int counted(const PoolWindow& window, int axis, Index output,
                                           Index size) const {
        const AxisTaps<Index> taps(window, axis, output, size + (padding_counts ? pad_after[axis] : 0));
        // The first window starts at -pad, so that no tap is before the padding.
        return taps.end - (padding_counts ? 0 : taps.begin);
    }

    // 1 / divisor of the window at `output`. Only one that is cut off, and of many taps, needs a division.
    template <typename Index>
    __device__ __forceinline__ A of(const PoolWindow& window, const Index (&output)[3],
                                    const PoolExtent<Index>& extent) const {
        if (count == 0) return reciprocal;
        long long taps = 1;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) taps *= counted(window, axis, output[axis], extent.size[axis]);
        return of_taps(taps);
    }

    // 1 / divisor of a window with so many taps that count.
    __device__ __forceinline__ A of_taps(long long taps) const {
        if (count == 0 || taps == count) return reciprocal;
        // A window of nothing but padding sums to 0: any divisor but 0 leaves it 0.
        return taps < kReciprocals ? reciprocals[max(static_cast<int>(taps), 0)]
                                   : A(1) / static_cast<A>(taps);
    }

    // Taps that count of a window of Kernel ones along an axis; of one beyond the ends, no more and no fewer.
    //   origin   of the window
    template <int Kernel>
    __device__ __forceinline__ int counted(const PoolWindow& window, int axis, int origin) const {
        const int end = static_cast<int>(window.input[axis]) + (padding_counts ? pad_after[axis] : 0);
        return max(min(Kernel, end - origin) - (padding_counts ? 0 : max(0, -origin)), 0);
    }

    // Of a window of Kernel x Kernel and fewer than kReciprocals taps: those along depth and height that
    // count.
    //   output   in depth
    //   top      origin in height; of one axis, which is a plane of height 1, every window has one row
    template <int Kernel>
    __device__ __forceinline__ int of_plane(const PoolWindow& window, int output, int top) const {
        if (count == 0) return 0;
        const int deep = counted(window, 0, output, static_cast<int>(window.input[0]));
        return window.kernel[1] < Kernel ? deep : deep * counted<Kernel>(window, 1, top);
    }

    // Those along width that count, which are the same all the way down a column of windows.
    //   left   origin in width
    template <int Kernel>
    __device__ __forceinline__ int of_column(const PoolWindow& window, int left) const {
        return count == 0 ? 0 : counted<Kernel>(window, 2, left);
    }

    // 1 / its divisor.
    //   plane, column   of_plane, of_column
    __device__ __forceinline__ A of_few(int plane, int column) const {
        return count == 0 ? reciprocal : reciprocals[plane * column];
    }
};

static_assert(sizeof(PoolDivisor<float>) == 536, "the launcher packs it with this size");
static_assert(sizeof(PoolDivisor<double>) == 1056, "the launcher packs it with this size");
