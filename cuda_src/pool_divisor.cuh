// What the sum of an averaging window is divided by.
#pragma once

#include "pool_window.cuh"

template <typename A>
struct PoolDivisor {
    A reciprocal;        // of the divisor of a window with `count` taps, or of every window
    int count;           // 0: every window has the same divisor
    int padding_counts;  // whether taps in the padding count
    int pad_after[3];

    // Taps of a window along one axis that count.
    template <typename Index>
    __device__ __forceinline__ int counted(const PoolWindow& window, int axis, Index output,
                                           Index size) const {
        const AxisTaps<Index> taps(window, axis, output, size + (padding_counts ? pad_after[axis] : 0));
        // The first window starts at -pad, so that no tap is before the padding.
        return taps.end - (padding_counts ? 0 : taps.begin);
    }

    // 1 / divisor of the window at `output`. Only a window that is cut off needs a division.
    template <typename Index>
    __device__ __forceinline__ A of(const PoolWindow& window, const Index (&output)[3],
                                    const PoolExtent<Index>& extent) const {
        if (count == 0) return reciprocal;
        int taps = 1;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) taps *= counted(window, axis, output[axis], extent.size[axis]);
        if (taps == count) return reciprocal;
        // A window of nothing but padding sums to 0: any divisor but 0 leaves it 0.
        return A(1) / static_cast<A>(taps > 0 ? taps : 1);
    }
};
