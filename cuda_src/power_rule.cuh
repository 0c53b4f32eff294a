// What the kernels of power-average pooling share: p, and what a window that is cut off lacks.
#pragma once

#include "pool_window.cuh"

// What powers of a type are computed in. A power multiplies a relative error by p: half types leave float
// bits enough for that, float32 leaves none. Powers of float64 are of values that are scaled without a
// rounding.
template <typename T>
struct Power {
    using type = double;
};
template <>
struct Power<__half> {
    using type = float;
};
template <>
struct Power<__nv_bfloat16> {
    using type = float;
};
template <typename T>
using power_t = typename Power<T>::type;

// Of a whole window, and of each:
//   const C total = sum * rule.share<C>(window, output.at);  // of powers of a window's taps
//   const C root = pow(total, static_cast<C>(rule.root));
//   y = from_accumulate<T>(static_cast<accumulate_t<T>>(root));
struct PowerRule {
    double p, root;    // p and 1 / p
    double taps;       // of a window
    int whole;         // p, where its powers are taken as products; 0: they are not
    int cuts_off;      // whether a window may reach beyond the padding
    int pad_after[3];  // after the last element

    // Taps of the window at `output` over those within the padded extent.
    template <typename C, typename Index>
    __device__ __forceinline__ C share(const PoolWindow& window, const Index (&output)[3]) const {
        if (!cuts_off) return C(1);
        double inside = 1;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            // The first window starts at -pad, so that no tap is before the padding.
            const Index extent = static_cast<Index>(window.input[axis]) + pad_after[axis];
            inside *= AxisTaps<Index>(window, axis, output[axis], extent).end;
        }
        return static_cast<C>(taps / inside);
    }
};

static_assert(sizeof(PowerRule) == 48, "the launcher packs it with this size");

// sum * sign(value); 0 where the value is 0. NaN has no sign.
template <typename A>
__device__ __forceinline__ A signed_as(A value, A sum) {
    if (value != value) return value;
    return value == A(0) ? A(0) : (value < A(0) ? -sum : sum);
}
