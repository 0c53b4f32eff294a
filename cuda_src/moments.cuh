// Mean and variance without cancellation, and sums of gradients: what batch norm reduces to.
#pragma once

#include "reduce.cuh"

// What values are multiplied by where squares of them, or their sums, would leave the range: a power of two
// for which those of the largest do not, and those of values that need it do not vanish.
template <typename A>
struct Lowering;
template <>
struct Lowering<float> {
    static constexpr float kDown = 0x1p-100f, kUp = 0x1p100f, kModerate = 0x1p60f;
};
template <>
struct Lowering<double> {
    static constexpr double kDown = 0x1p-800, kUp = 0x1p800, kModerate = 0x1p500;
};

template <typename A>
__device__ __forceinline__ bool is_finite(A value) {
    return value - value == A(0);
}

// Count, mean and variance of some values, merged as Chan, Golub and LeVeque (1979) do. The mean is relative
// to an origin that all parts share, one of the channel's values: its rounding error is then small against
// their spread, however far from 0 they are. A negative count says that all values were lowered: the variance
// itself may be out of range where 1 over its root is not.
template <typename A>
struct Moments {
    A count, mean, var;

    static __device__ __forceinline__ Moments identity() { return {A(0), A(0), A(0)}; }

    __device__ __forceinline__ Moments lowered() const {
        constexpr A kDown = Lowering<A>::kDown;
        if (count < A(0)) return *this;
        return {-count, mean * kDown, var * kDown * kDown};
    }

    __device__ __forceinline__ Moments combine(const Moments& other) const {
        // An empty side has no mean: weighing it by 0 would turn a large mean of the other into NaN.
        if (other.count == A(0)) return *this;
        if (count == A(0)) return other;
        constexpr A kModerate = Lowering<A>::kModerate;
        const bool moderate = count > A(0) && other.count > A(0) && fabs(other.mean - mean) < kModerate &&
                              max(var, other.var) < kModerate * kModerate;
        const Moments a = moderate ? *this : lowered(), b = moderate ? other : other.lowered();
        const A total = a.count + b.count, delta = b.mean - a.mean;
        const A weight = b.count / total, rest = a.count / total;
        // Equal means stay that mean to the last bit, whatever the weight.
        return {total, a.mean + delta * weight,
                a.var * rest + b.var * weight + delta * delta * (rest * weight)};
    }

    __device__ __forceinline__ Moments shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, count, delta), __shfl_down_sync(kFullWarp, mean, delta),
                __shfl_down_sync(kFullWarp, var, delta)};
    }
};

// Moments of the values of one thread, as sums relative to the first of them: no division a value, and no
// cancellation unless the thread's own values are far apart.
//   MomentsAccumulator<A> own;
//   own.shift = values[0];
//   for (int i = 0; i < count; ++i) own.add(values[i]);
//   const Moments<A> both = own.moments(count, origin, false).combine(others);
template <typename A>
struct MomentsAccumulator {
    A shift, sum, sum_of_squares;

    __device__ __forceinline__ MomentsAccumulator() : shift(0), sum(0), sum_of_squares(0) {}

    // shift must have been set to the first value. The caller counts.
    __device__ __forceinline__ void add(A value) {
        const A deviation = value - shift;
        sum += deviation;
        sum_of_squares = fma(deviation, deviation, sum_of_squares);
    }

    // Where these are not finite, lowered values have some, unless there is an infinity or NaN among them.
    //   lowered   whether the values were
    __device__ __forceinline__ Moments<A> moments(int count, A origin, bool lowered) const {
        if (count == 0) return Moments<A>::identity();
        const A n = static_cast<A>(count);
        const A mean_deviation = sum / n;
        const A var = (sum_of_squares - sum * mean_deviation) / n;
        if (lowered) origin *= Lowering<A>::kDown;
        // Rounding may leave a variance of nothing slightly negative; NaN must stay NaN.
        return {lowered ? -n : n, (shift - origin) + mean_deviation, var < A(0) ? A(0) : var};
    }
};

// Sums of dy and of dy * (x - mean).
template <typename A>
struct GradientSums {
    A dy, dy_deviation;

    static __device__ __forceinline__ GradientSums identity() { return {A(0), A(0)}; }

    __device__ __forceinline__ GradientSums combine(const GradientSums& other) const {
        return {dy + other.dy, dy_deviation + other.dy_deviation};
    }

    __device__ __forceinline__ GradientSums shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, dy, delta), __shfl_down_sync(kFullWarp, dy_deviation, delta)};
    }

    __device__ __forceinline__ void add(A gradient, A deviation) {
        dy += gradient;
        dy_deviation = fma(gradient, deviation, dy_deviation);
    }
};
