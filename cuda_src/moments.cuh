// Mean and variance without cancellation, and sums of gradients: what batch norm reduces to.
#pragma once

#include "reduce.cuh"

// Count, mean and sum of squared deviations of some values, merged as Chan, Golub and LeVeque (1979) do.
// The mean is relative to an origin that all parts share, one of the channel's values: its rounding error is
// then small against their spread, however far from 0 they are.
template <typename A>
struct Moments {
    A count, mean, m2;

    static __device__ __forceinline__ Moments identity() { return {A(0), A(0), A(0)}; }

    __device__ __forceinline__ Moments combine(const Moments& other) const {
        // An empty side has no mean: weighing it by 0 would turn a large mean of the other into NaN.
        if (other.count == A(0)) return *this;
        if (count == A(0)) return other;
        const A total = count + other.count;
        const A delta = other.mean - mean;
        const A weight = other.count / total;
        // Equal means stay that mean to the last bit, whatever the weight.
        return {total, mean + delta * weight, m2 + other.m2 + delta * delta * (count * weight)};
    }

    __device__ __forceinline__ Moments shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, count, delta), __shfl_down_sync(kFullWarp, mean, delta),
                __shfl_down_sync(kFullWarp, m2, delta)};
    }
};

// Moments of the values of one thread, as sums relative to the first of them: no division a value, and no
// cancellation unless the thread's own values are far apart.
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

    __device__ __forceinline__ Moments<A> moments(int count, A origin) const {
        if (count == 0) return Moments<A>::identity();
        const A n = static_cast<A>(count);
        const A mean_deviation = sum / n;
        const A m2 = sum_of_squares - sum * mean_deviation;
        // Rounding may leave a variance of nothing slightly negative; NaN must stay NaN.
        return {n, (shift - origin) + mean_deviation, m2 < A(0) ? A(0) : m2};
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
